"""The parts that adversaries are made of: changes to the policy of a miner.

An adversary is a function from a policy to a policy, as an optax transformation
wraps another: `poisoning.scaled(miner.HONEST, factor=100.0)`. It knows what a
real one could: its own state, the chain, and the buckets of the others.
Accomplices also share notes, which in a real network would be a private
channel. What one remembers is in `miner.role.notes`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from covenant import typing as ct
from covenant.data import assignment
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.node import validator as validator_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.wire import manifest as manifest_lib
from covenant.wire import payload as payload_lib

Command = round_lib.Command
Future = node_lib.Future
Miner = miner_lib.Miner
Node = miner_lib.Miner | validator_lib.Validator
Policy = miner_lib.MinerPolicy
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound

T = TypeVar('T')

_ACCOMPLICES = 'accomplices'  # the name of the note that a host writes


class Adversary(NamedTuple):
  """One kind of misbehavior.

  Attributes:
    wrap: changes the policy of an honest node: a `MinerPolicy`, or of a
      validator a `ValidatorPolicy`.
    role: 'miner' or 'validator'.
    honest: True if it means well and must not be punished.
    serve: its bucket as the node of a name finds it.
  """

  wrap: Callable[[Any], Any]
  role: str = 'miner'
  honest: bool = False
  serve: Callable[[str, store_lib.Bucket], store_lib.Bucket] | None = None


class Accomplices(NamedTuple):
  """The dishonest nodes of a run, and their private channel."""

  names: Mapping[int, str]  # kind of adversary, by uid
  notes: dict[str, tuple[object, Any]]  # made by one, used by the others

  def uids(self, name: str) -> list[int]:
    return sorted(u for u, n in self.names.items() if n == name)

  def note(self, name: str, when: object, make: Callable[[], T]) -> T:
    """Returns `make()`, called once for all; a note of another time is gone."""
    if name not in self.notes or self.notes[name][0] != when:
      self.notes[name] = when, make()
    return self.notes[name][1]


def introduce(node: Node, accomplices: Accomplices) -> None:
  """Tells a node of its accomplices, itself among them."""
  node.role.notes[_ACCOMPLICES] = accomplices


def accomplices(node: Node) -> Accomplices:
  """Returns what a host told an adversary of its accomplices."""
  return node.role.notes[_ACCOMPLICES]


def spoiled(
  policy: Policy, spoil: Callable[[Miner, Task, TrainedRound], TrainedRound]
) -> Policy:
  """Trains by `policy` and sends `spoil` of the work."""

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: miner_lib.Batches
  ) -> Future[TrainedRound | None]:
    done = policy.train(miner, task, params, batches)
    return done.then(
      lambda work: None if work is None else spoil(miner, task, work)
    )

  return policy._replace(train=train)


def rebatched(
  policy: Policy,
  change: Callable[[Miner, Task, miner_lib.Batches], miner_lib.Batches],
) -> Policy:
  """Trains on `change` of the batches of `policy`."""

  def batches(miner: Miner, task: Task) -> miner_lib.Batches:
    return change(miner, task, policy.batches(miner, task))

  return policy._replace(batches=batches)


def idle(
  policy: Policy, make: Callable[[Miner, Task], ct.Message | None]
) -> Policy:
  """Sends `make` without training, under a right receipt; nothing for None."""

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: miner_lib.Batches
  ) -> Future[TrainedRound | None]:
    del params, batches
    message = make(miner, task)
    if message is None:
      return Future.done(None)
    return Future.done(untrained(miner, task, message))

  return untrusted(policy)._replace(train=train)


def untrusted(policy: Policy) -> Policy:
  """Counts none of its tokens as trained on."""

  def seal(
    miner: Miner, task: Task, work: TrainedRound
  ) -> local_lib.Contribution | None:
    made = policy.seal(miner, task, work)
    return None if made is None else made._replace(tokens=0)

  return policy._replace(seal=seal)


def waiting(
  policy: Policy,
  make: Callable[[Miner, Task, int], local_lib.Contribution | None],
) -> Policy:
  """Does not train, and sends what it finds once the put window is open.

  Args:
    policy: the policy to change.
    make: (miner, task, head) -> a contribution; raises RetryLaterError while
      there is none.
  """

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: miner_lib.Batches
  ) -> Future[TrainedRound | None]:
    del miner, task, params, batches
    return Future.done(None)

  def commit(miner: Miner, command: Command, head: int) -> None:
    if miner.role.contribution.result() is None:
      task = miner_lib.task(miner, command.round)
      miner.role.contribution = Future.done(make(miner, task, head))
    policy.commit(miner, command, head)

  return policy._replace(train=train, commit=commit)


def untrained(miner: Miner, task: Task, message: ct.Message) -> TrainedRound:
  """Returns a message as work on the assigned data.

  Whoever reads the data can make the receipt.
  """
  return pretended(miner, task, TrainedRound(message, b'', 0, 0.0, 0.0))


def pretended(
  miner: Miner, task: Task, work: TrainedRound, sequences: int | None = None
) -> TrainedRound:
  """Returns `work` under the receipt of the first assigned `sequences`."""
  split, context = miner.role.slot.trainer.split, miner.config.data.context
  ids = local_lib.assigned_ids(miner.config, task, split)[:sequences]
  receipt = assignment.receipt_of(split, ids, context)
  return work._replace(receipt=receipt, sequences=len(ids))


def victims(miner: Miner, membership: membership_lib.Membership) -> list[int]:
  """Returns the miners outside the gang, the best paid first."""
  earned, gang = miner.chain.earned(membership.block), accomplices(miner).names
  uids = [p.uid for p in membership.miners if p.uid not in gang]
  return sorted(uids, key=lambda u: (-earned.get(u, 0.0), u))


def in_turn(miner: Miner, task: Task, uids: list[int]) -> list[int]:
  """Returns `uids` rotated, by another number for every accomplice."""
  rank = sorted(accomplices(miner).names).index(task.uid) % max(len(uids), 1)
  return uids[rank:] + uids[:rank]


def published(
  miner: Miner,
  task: Task,
  membership: membership_lib.Membership,
  uids: list[int],
) -> dict[int, ct.Message]:
  """Returns the messages of this round that some have already uploaded."""
  entries = {}
  for uid in uids:
    commitment = membership.commitments.get(uid)
    if commitment is not None and commitment.round == task.round:
      hotkey = membership.peers[uid].hotkey
      entries[uid] = manifest_lib.Entry(uid, hotkey, commitment.digest)
  wanted = [
    run_storage_lib.ObjectRef(e.digest, membership.location(u))
    for u, e in entries.items()
  ]
  limit = miner.shared_model.spec.payload_bytes
  got = miner.objects.fetch('payloads', task.round, wanted, [], limit)
  messages = {}
  for uid, entry in entries.items():
    data = got[entry.digest]
    if isinstance(data, bytes):
      message = read(miner, entry, data)
      if message is not None:
        messages[uid] = message
  return messages


def read(
  miner: Miner, entry: manifest_lib.Entry, data: bytes
) -> ct.Message | None:
  """Returns the message in a payload of this round; None if it is refused."""
  try:
    return apply.decode(
      miner.shared_model, miner.chain, entry, miner.place, data
    ).message
  except payload_lib.PayloadError:
    return None
