"""The program of a miner: train, commit, upload, follow.

The digest of its payload goes on the chain within the put window, the bytes
into its own bucket.
"""

import base64
from collections.abc import Mapping
from typing import Any

from covenant.chain import interface as chain_lib
from covenant.islands import island as island_lib
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
    self._under_way: trainer_lib.Begun | None = None
    self.can = round_lib.miner(self.plan)
    self._obey |= {
      Do.BEGIN: self._begin,
      Do.TRAIN: self._train,
      Do.COMMIT: self._commit,
      Do.UPLOAD: self._upload,
    }

  def _fresh(self) -> trainer_lib.Private:
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

  def _task(self, round_index: int) -> trainer_lib.Task:
    """Of a round that begins with the parameters it has now."""
    block = self.plan.draws(round_index)
    uid = roster_lib.read(self.chain, block).uid(self.chain.hotkey)
    seed = self.chain.block_hash(block)
    ahead = island_lib.of(self.config, uid).rounds - 1
    return trainer_lib.Task(uid, round_index, seed, self.root, ahead)

  def _contribute(self, task: trainer_lib.Task) -> None:
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

  def _due(self, round_index: int) -> trainer_lib.Contribution | None:
    """What there is to be sent in a round."""
    made = self.contribution
    return made if made is not None and made.round == round_index else None

  def _commit(self, command: round_lib.Command, head: int) -> None:
    if (made := self._due(command.round)) is not None:
      self.commit(command.round, objects_lib.digest(made.payload), head)

  def _upload(self, command: round_lib.Command, head: int) -> None:
    """Raises NotYet until who copies the bytes must commit to a later block."""
    if (made := self._due(command.round)) is None:
      return
    data = made.payload
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
