"""The program of a miner: train, commit, upload, follow.

The digest of its payload goes on the chain within the put window, the bytes
into its own bucket.
"""

import base64
from collections.abc import Mapping
from typing import Any

from covenant.chain import interface as chain_lib
from covenant.node import agreement
from covenant.node import node as node_lib
from covenant.node import objects as objects_lib
from covenant.node import roster as roster_lib
from covenant.node import round as round_lib
from covenant.node import trainer as trainer_lib

Do = round_lib.Do


class Miner(node_lib.Node):
  """One miner.

  Args:
    *args: as `node.Node`.
    trainer: compiled once for all miners of a process.
    private: its own state, if it had one; consumed.
    **kwargs: as `node.Node`.
  """

  can = round_lib.MINER

  def __init__(
    self,
    *args: Any,
    trainer: trainer_lib.Trainer,
    private: trainer_lib.Private | None = None,
    **kwargs: Any,
  ):
    super().__init__(*args, **kwargs)
    self._trainer = trainer
    self.private = private or self._fresh()
    self.contribution: trainer_lib.Contribution | None = None  # the last one
    self._obey |= {
      Do.TRAIN: self._train,
      Do.COMMIT: self._commit,
      Do.UPLOAD: self._upload,
    }

  def _fresh(self) -> trainer_lib.Private:
    return self._trainer.init(self.shared.params, self.state.round)

  def _train(self, command: round_lib.Command, head: int) -> None:
    r = command.round
    start = self.plan.start(r)
    roster = roster_lib.read(self.chain, start)
    task = trainer_lib.Task(
      roster.uid(self.chain.hotkey), r, self.chain.block_hash(start), self.root
    )
    self._contribute(task)

  def _contribute(self, task: trainer_lib.Task) -> None:
    """Makes what will be published."""
    self.contribution, self.private = self._trainer.contribute(
      self.shared.params,
      self.private,
      task,
      self.chain.sign,
      late=lambda: self._is_late(task.round),
    )

  def _is_late(self, round_index: int) -> bool:
    """Whether the put window is open: who has not done all sends what it has.

    Where the chain does not say, there is time.
    """
    try:
      return self.chain.head() >= self.plan.put_opens(round_index)
    except chain_lib.ChainError:
      return False

  def _commit(self, command: round_lib.Command, head: int) -> None:
    assert self.contribution is not None
    digest = objects_lib.digest(self.contribution.payload)
    self.commit(command.round, digest, head)

  def _upload(self, command: round_lib.Command, head: int) -> None:
    """Raises NotYet until who copies the bytes must commit to a later block."""
    assert self.contribution is not None
    data = self.contribution.payload
    digest = objects_lib.digest(data)
    roster = roster_lib.read(self.chain, self.plan.settled(head))
    mine = roster.commitments.get(roster.uid(self.chain.hotkey))
    if mine is None or mine.digest != digest:
      raise node_lib.NotYet
    key = self.objects.key('payloads', command.round, digest)
    self.objects.keep(key, data)

  def _resume(
    self, place: agreement.Place, replayed: Mapping[int, bytes]
  ) -> None:
    """Private state outlives an absence: the error feedback is still owed."""
    super()._resume(place, replayed)
    self.contribution = None

  @property
  def savable(self) -> bool:
    """What is trained must not be trained again: the error feedback is new."""
    return self.state.trained and not self.state.committed

  def save(self) -> dict[str, Any]:
    return super().save() | {'private': self.private}

  def load(self, saved: dict[str, Any]) -> dict[str, Any]:
    text = super().load(saved)
    self.private = saved['private']
    if text['contribution'] is not None:
      payload = base64.b64decode(text['contribution'][0])
      self.contribution = trainer_lib.Contribution(
        payload, *text['contribution'][1:]
      )
      self.state = self.state._replace(trained=True)
    return text

  def _text(self) -> dict[str, Any]:
    contribution = None
    if self.contribution is not None and self.state.trained:
      payload, *numbers = self.contribution
      contribution = [base64.b64encode(payload).decode(), *numbers]
    return super()._text() | {'contribution': contribution}
