"""Adversaries who break the rules of the exchange itself."""

import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from covenant.adversaries import base as adversary
from covenant.node import base as node_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.wire import commitment as commitment_lib

_TAIL = 96  # bytes of digest and signature


class Late(adversary.Adversary):
  """Commits after the window, when it has seen what all others sent."""

  def _commit(self, command: round_lib.Command, head: int) -> None:
    """Lets the window pass."""

  def _upload(self, command: round_lib.Command, head: int) -> None:
    """Raises NotYet until then, and until it has committed."""
    if head <= self.plan.put_closes(command.round):
      raise node_lib.RetryLaterError
    super()._commit(command, head)
    super()._upload(command, head)


class Early(adversary.Adversary):
  """Commits as soon as it has trained, so that who is copied is the later."""

  def _train(self, command: round_lib.Command, head: int) -> None:
    super()._train(command, head)
    super()._commit(command, head)


class Twice(adversary.Adversary):
  """Commits to two payloads, to choose when it has seen the others'."""

  _first: tuple[int, int] = (-1, -1)  # round, block

  def _commit(self, command: round_lib.Command, head: int) -> None:
    if self._first[0] != command.round:
      self._first = command.round, head
      self._commit_to(hashlib.blake2b(b'another', digest_size=32).digest())
    if head < self._first[1] + 2:
      raise node_lib.RetryLaterError  # two of one block would be one
    if self.contribution is not None:
      self._commit_to(run_storage_lib.digest(self.contribution.payload))

  def _commit_to(self, digest: bytes) -> None:
    r = self.state.round
    new = commitment_lib.Commitment(self.objects.location, r, digest)
    self.chain.commit(commitment_lib.encode(new))


class Absent(adversary.Adversary):
  """Commits to a payload that it never uploads."""

  def _contribute(self, task: local_lib.Task) -> None:
    self._idle(self._sparse(self._noise(task)), task)

  def _upload(self, command: round_lib.Command, head: int) -> None:
    """Says that it did."""


class Swapped(Absent):
  """Uploads other bytes than it has committed to, under their name."""

  def _upload(self, command: round_lib.Command, head: int) -> None:
    assert self.contribution is not None
    data = self.contribution.payload
    key = self.objects.key(
      'payloads', command.round, run_storage_lib.digest(data)
    )
    self.objects.put_once(key, data[:-1] + bytes([data[-1] ^ 1]))


class TwoFaced(adversary.Adversary):
  """Its bucket has its payload for every second reader, and junk for others.

  Validators who disagree about what is there cannot agree on a round.
  """

  @staticmethod
  def serve(reader: str, bucket: store_lib.Bucket) -> store_lib.Bucket:
    odd = reader.isdecimal() and int(reader) % 2
    return _Junk(bucket) if odd else bucket


class _Junk:
  """A bucket in which every payload is another one of the same length."""

  def __init__(self, bucket: store_lib.Bucket):
    self._bucket = bucket
    self.location = bucket.location

  def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
    self._bucket.put(key, data, replace=replace)

  def get(self, key: str, limit: int) -> bytes:
    return bytes(len(self._bucket.get(key, limit)))

  def head(self, key: str) -> store_lib.Info:
    return self._bucket.head(key)

  def list(self, prefix: str) -> Sequence[store_lib.Info]:
    return self._bucket.list(prefix)

  def delete(self, keys: Sequence[str]) -> None:
    self._bucket.delete(keys)


class ManifestError(adversary.Adversary):
  """Commits to bytes that are no payload, another kind of them every round.

  A reader that trips over them would lose the round, or the honest after it.
  """

  def _contribute(self, task: local_lib.Task) -> None:
    self._idle(self._sparse(self._noise(task)), task)
    assert self.contribution is not None
    kind = [*MALFORMED.values()][task.round % len(MALFORMED)]
    data = kind(self, self.contribution.payload, task)
    self.contribution = self.contribution._replace(payload=data)

  def resigned(self, body: bytes) -> bytes:
    """A payload of these bytes, with a right digest and signature."""
    digest = hashlib.blake2b(
      body, digest_size=32, person=b'covenant.payload'
    ).digest()
    return body + digest + self.chain.sign(digest)

  def of(self, task: local_lib.Task, scale: float = 1.0) -> bytes:
    """A payload of another task, or with its values scaled in the bytes."""
    message = self._sparse(self._noise(task))
    leaves, treedef = jax.tree.flatten(message)
    floats = [
      x * scale if np.issubdtype(x.dtype, np.floating) or x.dtype.kind == 'V'
      else x
      for x in leaves
    ]  # fmt: skip
    self._idle(treedef.unflatten(floats), task)
    assert self.contribution is not None
    return self.contribution.payload


_Spoil = Callable[[ManifestError, bytes, local_lib.Task], bytes]
# name -> what is made of a payload that would be valid
MALFORMED: dict[str, _Spoil] = {
  'empty': lambda m, data, task: b'',
  'truncated': lambda m, data, task: data[: len(data) // 2],
  'longer': lambda m, data, task: data + b'\0',
  'random': lambda m, data, task: m._random(task).bytes(len(data)),
  'flipped bit': lambda m, data, task: (
    data[:200] + bytes([data[200] ^ 1]) + data[201:]
  ),
  'other version': lambda m, data, task: m.resigned(
    b'CVNT\xff\xff' + data[6:-_TAIL]
  ),
  'other round': lambda m, data, task: m.of(
    task._replace(round=task.round + 1)
  ),
  'other uid': lambda m, data, task: m.of(task._replace(uid=0)),
  'other root': lambda m, data, task: m.of(task._replace(root=bytes(32))),
  'unsigned': lambda m, data, task: data[:-64] + bytes(64),
  'random body': lambda m, data, task: m.resigned(
    data[:150] + m._random(task).bytes(len(data) - 150 - _TAIL)
  ),
  'not finite': lambda m, data, task: m.of(task, np.inf),
  'huge': lambda m, data, task: m.of(task, 1e12),
}
