"""Adversaries that want to be paid for work that they did not do."""

import collections
from collections.abc import Callable, Iterator

import numpy as np

from covenant import typing as ct
from covenant.adversaries import base
from covenant.adversaries import messages
from covenant.adversaries import poisoning
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import local as local_lib
from covenant.wire import manifest as manifest_lib

Batches = miner_lib.Batches
Contribution = local_lib.Contribution
Future = node_lib.Future
Membership = membership_lib.Membership
Miner = miner_lib.Miner
Policy = miner_lib.MinerPolicy
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound

Find = Callable[[Miner, Task, Membership, int], ct.Message | None]
Change = Callable[[Miner, Task, ct.Message], ct.Message]


def find_published(
  miner: Miner, task: Task, membership: Membership, uid: int
) -> ct.Message | None:
  """Returns the message that a miner has committed to and uploaded."""
  return base.published(miner, task, membership, [uid]).get(uid)


def copier(
  policy: Policy,
  find: Find = find_published,
  change: Change = lambda miner, task, message: message,
) -> Policy:
  """Sends another's message of this round under its own name, signed anew.

  It takes that of the best paid miner that has published, the second copier
  that of the second, and commits as soon as it can read it: a block later.

  Args:
    policy: the policy to change.
    find: looks for the message of a victim.
    change: is applied to it.
  """
  policy = base.untrusted(policy)

  def make(miner: Miner, task: Task, head: int) -> Contribution | None:
    membership = membership_lib.read(miner.chain, head, miner.schedule)
    victims = base.victims(miner, membership)
    for victim in base.in_turn(miner, task, victims):
      found = find(miner, task, membership, victim)
      if found is not None:
        message = change(miner, task, found)
        return policy.seal(miner, task, base.untrained(miner, task, message))
    raise node_lib.RetryLaterError

  return base.waiting(policy, make)


def exact_copier(policy: Policy) -> Policy:
  """Sends another's payload byte for byte, name and signature included."""

  def make(miner: Miner, task: Task, head: int) -> Contribution:
    membership = membership_lib.read(miner.chain, head, miner.schedule)
    limit = miner.shared_model.spec.payload_bytes
    victims = base.victims(miner, membership)
    for victim in base.in_turn(miner, task, victims):
      commitment = membership.commitments.get(victim)
      if commitment is None or commitment.round != task.round:
        continue
      wanted = run_storage_lib.ObjectRef(commitment.digest, commitment.location)
      got = miner.objects.fetch('payloads', task.round, [wanted], [], limit)
      data = got[commitment.digest]
      if isinstance(data, bytes):
        return Contribution(data, 0.0, 0, 0.0, task.round)
    raise node_lib.RetryLaterError

  return base.waiting(policy, make)


def perturbed_copier(policy: Policy, dropped: float = 0.3) -> Policy:
  """Replaces a share of the copied values by noise; 0.6 hides the copy."""

  def change(miner: Miner, task: Task, message: ct.Message) -> ct.Message:
    draw = messages.generator(miner, task)

    def perturb(x: np.ndarray) -> np.ndarray:
      sent = np.abs(x[x != 0])
      kept = np.where(draw.random(x.shape) < dropped, 0, x)
      # Too little to displace what is kept, enough to fill what is dropped.
      size = 0.1 * (sent.mean() if sent.size else 0)
      return (kept + size * draw.normal(size=x.shape)).astype(np.float32)

    return messages.changed(miner, message, perturb)

  return copier(policy, change=change)


def fast_copier(policy: Policy) -> Policy:
  """Copies as soon as the bytes are there, whatever the chain says.

  It lists its victim's bucket. If miners uploaded before their commitment is
  in a block, both would commit in one block, and nobody could see who was
  first.
  """

  def find(
    miner: Miner, task: Task, membership: Membership, uid: int
  ) -> ct.Message | None:
    commitment = membership.commitments.get(uid)
    if commitment is None:
      return None  # nobody knows where its bucket is
    bucket = miner.objects.bucket_at(commitment.location)
    if bucket is None:
      return None
    folder = miner.objects.key('payloads', task.round) + '/'
    for info in bucket.list(folder):
      data = bucket.get(info.key, miner.shared_model.spec.payload_bytes)
      hotkey = membership.peers[uid].hotkey
      entry = manifest_lib.Entry(uid, hotkey, run_storage_lib.digest(data))
      message = base.read(miner, entry, data)
      if message is not None:
        return message
    return None

  return copier(policy, find)


def previous_copier(policy: Policy) -> Policy:
  """Sends another's message of the round before: nobody can be earlier."""

  def make(miner: Miner, task: Task) -> ct.Message | None:
    block = miner.schedule.start(task.round)
    membership = membership_lib.read(miner.chain, block, miner.schedule)
    victims = base.victims(miner, membership)
    victims = [uid for uid in victims if uid in miner.messages]
    if not victims:
      return None
    return miner.messages[base.in_turn(miner, task, victims)[0]]

  return base.idle(policy, make)


def mixer(policy: Policy) -> Policy:
  """Sends the mean of the others' messages: more gain than any of them.

  It resembles none of them enough to be a copy.
  """
  return poisoning.rushing(policy, lambda draw, x: np.stack(x).mean(0))


def replayer(policy: Policy) -> Policy:
  """Trains in its first round and uploads these very bytes ever after."""

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    if 'replayed' not in miner.role.notes:
      return policy.train(miner, task, params, batches)
    return Future.done(TrainedRound(None, b'', 0, 0.0, 0.0))

  def seal(miner: Miner, task: Task, work: TrainedRound) -> Contribution | None:
    if 'replayed' not in miner.role.notes:
      miner.role.notes['replayed'] = made = policy.seal(miner, task, work)
      return made
    return miner.role.notes['replayed']._replace(tokens=0, round=task.round)

  return policy._replace(train=train, seal=seal)


def repeater(policy: Policy) -> Policy:
  """Trains in its first round and sends that again under today's header."""

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    notes = miner.role.notes
    if 'repeated' not in notes:
      notes['repeated'] = policy.train(miner, task, params, batches)
    first: Future[TrainedRound | None] = notes['repeated']
    return first.then(
      lambda w: None if w is None else base.untrained(miner, task, w.message)
    )

  return base.untrusted(policy)._replace(train=train)


def unassigned(policy: Policy) -> Policy:
  """Trains on the same data of its choice every round and claims its task.

  With a corpus of its own it need not fetch any other.
  """

  def batches(miner: Miner, task: Task) -> Batches:
    mine = task._replace(round=0, seed=b'mine')
    is_late = miner_lib.deadline(miner, task.round)
    return miner.role.slot.trainer.batches(mine, is_late)

  return base.spoiled(policy._replace(batches=batches), base.pretended)


def easy(policy: Policy) -> Policy:
  """Trains on one sequence over and over: its own loss falls beautifully."""

  def change(miner: Miner, task: Task, batches: Batches) -> Batches:
    del miner, task
    row_1xL1 = None
    for tokens_BxL1 in batches:
      row_1xL1 = tokens_BxL1[:1] if row_1xL1 is None else row_1xL1
      yield np.broadcast_to(row_1xL1, tokens_BxL1.shape)

  return base.rebatched(unassigned(policy), change)


def desynchronized(
  policy: Policy, behind: int = 3, admits: bool = False
) -> Policy:
  """Trains from parameters of some rounds ago, to be spared from following.

  Args:
    policy: the policy to change.
    behind: how many rounds ago.
    admits: whether its header names these parameters, as that of a node that
      fell behind, rather than today's.
  """

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    past = miner.role.notes.setdefault(
      'past', collections.deque(maxlen=behind + 1)
    )
    past.append((params, task.root))
    return policy.train(miner, task, past[0][0], batches)

  def seal(miner: Miner, task: Task, work: TrainedRound) -> Contribution | None:
    root = miner.role.notes['past'][0][1] if admits else task.root
    return policy.seal(miner, task._replace(root=root), work)

  return policy._replace(train=train, seal=seal)


def sybil(policy: Policy) -> Policy:
  """Is one worker under several uids.

  It trains once, on a part of the data of each of its uids, and sends the
  result under all of them, each with a right receipt and in one block.
  """

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    del batches
    gang = base.accomplices(miner)
    uids = gang.uids(gang.names[task.uid])
    each = [policy.batches(miner, task._replace(uid=uid)) for uid in uids]
    together = gang.note(
      'sybil',
      miner.root,
      lambda: policy.train(miner, task, params, _alternated(each)),
    )
    return together.then(
      lambda work: work and base.untrained(miner, task, work.message)
    )

  return base.untrusted(policy)._replace(train=train)


def _alternated(each: list[Batches]) -> Iterator[np.ndarray]:
  """Yields batches of rows in turn: the first of the first uid, and so on."""
  for parts in zip(*each, strict=True):
    rows = np.arange(len(parts[0]))
    yield np.stack(parts)[rows % len(parts), rows]
