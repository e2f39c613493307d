"""A miner of an emulation: it trains while others of its host do, too."""

from collections.abc import Callable
from typing import Any

from covenant.emulate import devices as devices_lib
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from covenant.train import local as local_lib

Begun = Callable[[], tuple[local_lib.Contribution, local_lib.MinerState]]


class Miner(miner_lib.Miner):
  """A miner whose training may be under way after it was told to train.

  What comes of it, `contribution` and `private`, is waited for where it is
  read or replaced; nothing else of the protocol can tell the difference.

  Args:
    *args: as `node.Node`.
    seat: where it trains.
    **kwargs: as `miner.Miner`, but for the trainer.
  """

  def __init__(self, *args: Any, slot: devices_lib.Slot, **kwargs: Any):
    self._slot = slot
    self._begun: Begun | None = None
    super().__init__(*args, trainer=slot.trainer, **kwargs)

  @property
  def contribution(self) -> local_lib.Contribution | None:
    self.finish()
    return self._contribution

  @contribution.setter
  def contribution(self, value: local_lib.Contribution | None) -> None:
    self.finish()
    self._contribution = value

  @property
  def private(self) -> local_lib.MinerState:
    self.finish()
    return self._private

  @private.setter
  def private(self, value: local_lib.MinerState) -> None:
    self.finish()
    self._private = value

  def finish(self) -> None:
    """Returns once no training is under way; raises what the training did."""
    if self._begun is not None:
      begun, self._begun = self._begun, None
      self._contribution, self._private = begun()

  def _fresh(self) -> local_lib.MinerState:
    return self._slot.init(self.shared.params, self.state.round)

  def _begin(self, command: round_lib.Command, head: int) -> None:
    """Later, with all other steps: what they lead to is the same.

    They go on from what is private, and virtual time does not pass meanwhile.
    """

  def _contribute(self, task: local_lib.Task) -> None:
    self._begun = self._slot.contribute(
      self.shared.params, self.private, task, self.chain.sign
    )
