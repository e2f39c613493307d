"""Adversaries that break the rules of the exchange itself."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from covenant import proxy
from covenant.adversaries import base
from covenant.adversaries import messages
from covenant.node import base as node_lib
from covenant.node import follow
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.wire import commitment as commitment_lib

Command = round_lib.Command
Contribution = local_lib.Contribution
Miner = miner_lib.Miner
Policy = miner_lib.MinerPolicy
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound

_TAIL = 96  # bytes of digest and signature


def late(policy: Policy) -> Policy:
  """Commits after the window, having seen what all others sent."""

  def commit(miner: Miner, command: Command, head: int) -> None:
    """Lets the window pass."""

  def upload(miner: Miner, command: Command, head: int) -> None:
    if head <= miner.schedule.put_closes(command.round):
      raise node_lib.RetryLaterError
    policy.commit(miner, command, head)
    policy.upload(miner, command, head)

  return policy._replace(commit=commit, upload=upload)


def early(policy: Policy) -> Policy:
  """Commits as soon as it has trained, so that a copied miner is the later."""

  def seal(miner: Miner, task: Task, work: TrainedRound) -> Contribution | None:
    made = policy.seal(miner, task, work)
    if made is not None:
      digest = run_storage_lib.digest(made.payload)
      follow.commit(miner, task.round, digest, miner.head)
    return made

  return policy._replace(seal=seal)


def twice(policy: Policy) -> Policy:
  """Commits to two payloads, to choose once it has seen the others'."""

  def commit_to(miner: Miner, round_index: int, digest: bytes) -> None:
    location = miner.objects.location
    role = commitment_lib.Role.MINER
    new = commitment_lib.Commitment(role, location, round_index, digest)
    miner.chain.commit(commitment_lib.encode(new))

  def commit(miner: Miner, command: Command, head: int) -> None:
    r, notes = command.round, miner.role.notes
    if notes.get('first', (-1, -1))[0] != r:
      notes['first'] = r, head
      other = hashlib.blake2b(b'another', digest_size=32).digest()
      commit_to(miner, r, other)
    if head < notes['first'][1] + 2:
      raise node_lib.RetryLaterError  # two in one block would be one
    if (made := miner_lib.due(miner, r)) is not None:
      commit_to(miner, r, run_storage_lib.digest(made.payload))

  return policy._replace(commit=commit)


def absent(policy: Policy) -> Policy:
  """Commits to a payload that it never uploads."""

  def upload(miner: Miner, command: Command, head: int) -> None:
    """Claims that it did."""

  return base.idle(policy, messages.noise)._replace(upload=upload)


def swapped(policy: Policy) -> Policy:
  """Uploads other bytes than it has committed to, under their name."""

  def upload(miner: Miner, command: Command, head: int) -> None:
    made = miner.role.contribution.result()
    assert made is not None
    digest, data = run_storage_lib.digest(made.payload), made.payload
    key = miner.objects.key('payloads', command.round, digest)
    miner.objects.put_once(key, data[:-1] + bytes([data[-1] ^ 1]))

  return base.idle(policy, messages.noise)._replace(upload=upload)


def serve_two_faced(reader: str, bucket: store_lib.Bucket) -> store_lib.Bucket:
  """Shows its payload to every second reader, and junk to the others.

  Validators that disagree about what is there cannot agree on a round.
  """
  odd = reader.isdecimal() and int(reader) % 2
  return _junk(bucket) if odd else bucket


def _junk(bucket: store_lib.Bucket) -> store_lib.Bucket:
  """Returns a bucket whose payloads are replaced by zeros of their length."""

  def call(method: str, *args: Any, **kwargs: Any) -> Any:
    answer = getattr(bucket, method)(*args, **kwargs)
    return bytes(len(answer)) if method == 'get' else answer

  return proxy.make(store_lib.Bucket, call, location=bucket.location)


def malformed(policy: Policy) -> Policy:
  """Commits to bytes that are no payload, of another kind every round.

  A reader that trips over them would lose the round, or the honest after it.
  """
  policy = base.idle(policy, messages.noise)

  def seal(miner: Miner, task: Task, work: TrainedRound) -> Contribution | None:
    made = policy.seal(miner, task, work)
    kind = [*MALFORMED.values()][task.round % len(MALFORMED)]
    return made and made._replace(payload=kind(miner, made.payload, task))

  return policy._replace(seal=seal)


def resigned(miner: Miner, body: bytes) -> bytes:
  """Returns a payload of these bytes, with a right digest and signature."""
  digest = hashlib.blake2b(
    body, digest_size=32, person=b'covenant.payload'
  ).digest()
  return body + digest + miner.chain.sign(digest)


def payload(miner: Miner, task: Task, scale: float = 1.0) -> bytes:
  """Returns a payload of noise, with its values scaled in the bytes."""
  leaves, treedef = jax.tree.flatten(messages.noise(miner, task))
  floats = [
    x * scale if np.issubdtype(x.dtype, np.floating) or x.dtype.kind == 'V'
    else x
    for x in leaves
  ]  # fmt: skip
  work = base.untrained(miner, task, treedef.unflatten(floats))
  return miner_lib.seal(miner, task, work).payload


# name -> the change to a payload that would be valid
MALFORMED: dict[str, Callable[[Miner, bytes, Task], bytes]] = {
  'empty': lambda m, data, task: b'',
  'truncated': lambda m, data, task: data[: len(data) // 2],
  'longer': lambda m, data, task: data + b'\0',
  'random': lambda m, data, task: messages.generator(m, task).bytes(len(data)),
  'flipped bit': lambda m, data, task: (
    data[:200] + bytes([data[200] ^ 1]) + data[201:]
  ),
  'other version': lambda m, data, task: resigned(
    m, b'CVNT\xff\xff' + data[6:-_TAIL]
  ),
  'other round': lambda m, data, task: payload(
    m, task._replace(round=task.round + 1)
  ),
  'other uid': lambda m, data, task: payload(m, task._replace(uid=0)),
  'other root': lambda m, data, task: payload(m, task._replace(root=bytes(32))),
  'unsigned': lambda m, data, task: data[:-64] + bytes(64),
  'random body': lambda m, data, task: resigned(
    m,
    data[:150] + messages.generator(m, task).bytes(len(data) - 150 - _TAIL),
  ),
  'not finite': lambda m, data, task: payload(m, task, np.inf),
  'huge': lambda m, data, task: payload(m, task, 1e12),
}
