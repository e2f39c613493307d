"""Adversaries who want to be paid for what they did not do."""

import collections
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from covenant.adversaries import base as adversary
from covenant.adversaries import poisoning
from covenant.emulate import devices as devices_lib
from covenant.node import base as node_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib


class Copier(adversary.Adversary):
  """Sends another's message of this round under its own name, signed anew.

  It takes that of who earned most and has published, the second copier of the
  second most, and commits as soon as it can read it: a block later.
  """

  def _contribute(self, task: local_lib.Task) -> None:
    self.contribution = None

  def _commit(self, command: round_lib.Command, head: int) -> None:
    """Raises NotYet while its victim has not published."""
    task = self._task(command.round)
    if self.contribution is None:
      self._copy(task, head)
    super()._commit(command, head)

  def _copy(self, task: local_lib.Task, head: int) -> None:
    membership = membership_lib.read(self.chain, head)
    for victim in self._in_turn(self._victims(membership), task):
      found = self._published(membership, task, [victim])
      if victim in found:
        self._idle(self._changed(found[victim], task), task)
        return
    raise node_lib.RetryLaterError

  def _changed(self, message: Any, task: local_lib.Task) -> Any:
    del task
    return message


class ExactCopier(Copier):
  """Sends another's payload byte for byte, its name and signature included."""

  def _copy(self, task: local_lib.Task, head: int) -> None:
    membership = membership_lib.read(self.chain, head)
    limit = self.shared_model.spec.payload_bytes
    for victim in self._in_turn(self._victims(membership), task):
      commitment = membership.commitments.get(victim)
      if commitment is None or commitment.round != task.round:
        continue
      wanted = run_storage_lib.ObjectRef(commitment.digest, commitment.location)
      got = self.objects.fetch('payloads', task.round, [wanted], [], limit)
      data = got[commitment.digest]
      if isinstance(data, bytes):
        self.contribution = local_lib.Contribution(
          data, 0.0, 0, 0.0, task.round
        )
        return
    raise node_lib.RetryLaterError


class PerturbedCopier(Copier):
  """Drops three in ten of the copied values, sends noise in their place."""

  dropped = 0.3

  def _changed(self, message: Any, task: local_lib.Task) -> Any:
    draw = self._random(task)

    def change(x: np.ndarray) -> np.ndarray:
      sent = np.abs(x[x != 0])
      kept = np.where(draw.random(x.shape) < self.dropped, 0, x)
      # Too little to displace what is kept, enough to fill what is dropped.
      size = 0.1 * (sent.mean() if sent.size else 0)
      return (kept + size * draw.normal(size=x.shape)).astype(np.float32)

    return self._sparse(jax.tree.map(change, self._dense(message)))


class HiddenCopier(PerturbedCopier):
  """Changes as much as it takes to stay below the threshold for copies."""

  dropped = 0.6


class FastCopier(Copier):
  """Copies as soon as the bytes are there.

  It looks into its victim's bucket without waiting for the chain to tell what
  is there. If miners uploaded before their commitment is in a block, both
  would commit in one, and nobody could see who was first.
  """

  def _published(
    self,
    membership: membership_lib.Membership,
    task: local_lib.Task,
    uids: list[int],
  ) -> dict[int, Any]:
    (uid,) = uids
    commitment = membership.commitments.get(uid)
    if commitment is None:
      return {}  # nobody knows where its bucket is
    bucket = self.objects.bucket_at(commitment.location)
    if bucket is None:
      return {}
    folder = self.objects.key('payloads', task.round) + '/'
    for info in bucket.list(folder):
      data = bucket.get(info.key, self.shared_model.spec.payload_bytes)
      hotkey = membership.peers[uid].hotkey
      entry = manifest_lib.Entry(uid, hotkey, run_storage_lib.digest(data))
      message = self._read(entry, data)
      if message is not None:
        return {uid: message}
    return {}


class PreviousCopier(adversary.Adversary):
  """Sends another's message of the round before: nobody can be earlier."""

  def _contribute(self, task: local_lib.Task) -> None:
    membership = membership_lib.read(self.chain, self.plan.start(task.round))
    victims = [u for u in self._victims(membership) if u in self.messages]
    if not victims:
      self.contribution = None
      return
    victim = self._in_turn(victims, task)[0]
    self._idle(self.messages[victim], task)


class Mixer(poisoning.Rushing):
  """Sends the mean of what the others have sent: more gain than any of them.

  It resembles none of them enough to be a copy.
  """

  def _craft(self, deltas: list[Any], task: local_lib.Task) -> Any:
    del task
    return jax.tree.map(lambda *x: np.stack(x).mean(0), *deltas)


class Replayer(adversary.Adversary):
  """Trains in its first round, and uploads these very bytes for ever."""

  _first: local_lib.Contribution | None = None

  def _contribute(self, task: local_lib.Task) -> None:
    if self._first is None:
      super()._contribute(task)
      self._first = self.contribution
    elif self.contribution is not None:
      self.contribution = self._first._replace(tokens=0, round=task.round)


class Repeater(adversary.Adversary):
  """Trains in its first round, and sends that again under today's header."""

  _first: Any = None

  def _contribute(self, task: local_lib.Task) -> None:
    if self._first is None:
      self._first = self._work(task).message
    self._idle(self._first, task)


class Unassigned(adversary.Adversary):
  """Trains on what it likes, the same every round, and claims its task.

  With a corpus of its own it need not fetch any other.
  """

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    yield from self._trainer.batches(task._replace(round=0, seed=b'mine'))

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    return self._pretend(work, task)


class Easy(Unassigned):
  """Trains on one sequence over and over: its own loss falls beautifully."""

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    batches = list(super()._batches(task))
    for tokens_BxL1 in batches:
      yield np.broadcast_to(batches[0][:1], tokens_BxL1.shape)


class Desynchronized(adversary.Adversary):
  """Trains from parameters of three rounds ago and claims today's.

  So it is spared from following the run in time.
  """

  behind = 3

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._past = collections.deque[tuple[shared_state_lib.SharedState, bytes]](
      maxlen=self.behind + 1
    )

  def _start(
    self, task: local_lib.Task
  ) -> devices_lib.Begun[local_lib.TrainedRound]:
    self._past.append((self.shared, self.root))
    return self._slot.work(
      self._past[0][0].params, self.private, task, self._batches(task)
    )


class Outdated(Desynchronized):
  """As `Desynchronized`, and says so: what a node that fell behind sends."""

  def _seal(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.Contribution:
    return super()._seal(work, task._replace(root=self._past[0][1]))


class Sybil(adversary.Adversary):
  """One worker under several uids.

  It trains once, on a part of the data of each of its uids, and sends the
  result under all of them, each with a right receipt and in one block.
  """

  def _contribute(self, task: local_lib.Task) -> None:
    uids = self._gang.uids(self._gang.names[task.uid])
    message = self._gang.note(
      'sybil', self.root, lambda: self._together(task, uids)
    )
    self._idle(message, task)

  def _together(self, task: local_lib.Task, uids: list[int]) -> Any:
    each = [self._trainer.batches(task._replace(uid=u)) for u in uids]

    def batches() -> Iterable[np.ndarray]:
      for parts in zip(*each, strict=True):
        # Rows in turn: the first of the first uid, the second of the second.
        rows = np.arange(len(parts[0]))
        yield np.stack(parts)[rows % len(parts), rows]

    work, self.private = self._slot.work(
      self.shared.params, self.private, task, batches()
    )()
    return work.message
