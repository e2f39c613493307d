"""The program of a miner: train, commit, upload, follow.

The digest of its payload goes on the chain within the put window, the bytes
into its own bucket.
"""

import base64
from collections.abc import Mapping
from typing import Any

from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import island as island_lib
from covenant.train import local as local_lib

Phase = round_lib.Phase


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
    trainer: local_lib.Trainer,
    private: local_lib.MinerState | None = None,
    **kwargs: Any,
  ):
    super().__init__(*args, **kwargs)
    self._trainer = trainer
    self.private = private or self._fresh()
    self.contribution: local_lib.Contribution | None = None  # the last one
    self._under_way: local_lib.RoundInProgress | None = None
    self.can = round_lib.miner(self.plan)
    self._obey |= {
      Phase.BEGIN: self._begin,
      Phase.TRAIN: self._train,
      Phase.COMMIT: self._commit,
      Phase.UPLOAD: self._upload,
    }

  def _fresh(self) -> local_lib.MinerState:
    return self._trainer.init(self.shared.params, self.state.round)

  def _begin(self, command: round_lib.Command, head: int) -> None:
    """Starts the first steps of a round and returns while they are under way.

    The devices work on them as this program goes on to exchange the last round.
    """
    r, made = command.round, self.contribution
    if made is None or made.round < r:
      task = self._task(r)
      batches = self._trainer.batches(task, lambda: self._is_late(task.due))
      self._under_way, self.private = self._trainer.begin(
        self.private, task, batches
      )

  def _train(self, command: round_lib.Command, head: int) -> None:
    """Makes the contribution of a round, if it is not under way already."""
    r, made = command.round, self.contribution
    if made is None or made.round < r:
      self._contribute(self._task(r))

  def _task(self, round_index: int) -> local_lib.Task:
    """Of a round that begins with the parameters it has now."""
    block = self.plan.assignment_block(round_index)
    uid = membership_lib.read(self.chain, block).uid(self.chain.hotkey)
    seed = self.chain.block_hash(block)
    ahead = island_lib.of(self.config, uid).rounds - 1
    return local_lib.Task(uid, round_index, seed, self.root, ahead)

  def _contribute(self, task: local_lib.Task) -> None:
    """Makes what will be published."""
    self.contribution, self.private = self._trainer.contribute(
      self.shared.params,
      self.private,
      task,
      self.chain.sign,
      late=lambda: self._is_late(task.due),
      begun=self._under_way,
    )
    self._under_way = None

  def _is_late(self, round_index: int) -> bool:
    """Whether the put window is open: who has not done all sends what it has.

    Where the chain does not say, there is time.
    """
    try:
      return self.chain.head() >= self.plan.put_opens(round_index)
    except chain_lib.ChainError:
      return False

  def _due(self, round_index: int) -> local_lib.Contribution | None:
    """What there is to be sent in a round."""
    made = self.contribution
    return made if made is not None and made.round == round_index else None

  def _commit(self, command: round_lib.Command, head: int) -> None:
    if (made := self._due(command.round)) is not None:
      self.commit(command.round, run_storage_lib.digest(made.payload), head)

  def _upload(self, command: round_lib.Command, head: int) -> None:
    """Raises NotYet until who copies the bytes must commit to a later block."""
    if (made := self._due(command.round)) is None:
      return
    data = made.payload
    digest = run_storage_lib.digest(data)
    membership = membership_lib.read(self.chain, self.plan.finalized(head))
    mine = membership.commitments.get(membership.uid(self.chain.hotkey))
    if mine is None or mine.digest != digest:
      raise node_lib.RetryLaterError
    key = self.objects.key('payloads', command.round, digest)
    self.objects.put_once(key, data)

  def _resume(
    self, place: apply.Position, replayed: Mapping[int, bytes]
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
      self.contribution = local_lib.Contribution(
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
