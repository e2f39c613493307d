"""The outer steps of a run as a pipeline's stages take them, in order.

An order says how the payloads of a round move the tensors: the factor of each
tensor of each message, where the payloads are, and the digest of every section.
The head makes it from payloads that it has verified whole, as every node does,
and keeps it, so that a stage that comes later follows from a checkpoint. Each
order names the one before, so that a stage knows whether it is on the same
history.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covenant import errors
from covenant import files
from covenant import typing as ct
from covenant.pool import messages
from covenant.protocol import checksums


class OrderError(errors.CovenantError):
  """An order is malformed, or a section is not the one it names."""


class Source(NamedTuple):
  """One payload of an order."""

  uid: int
  round: int
  digest: str  # hexadecimal, of the payload
  locations: tuple[str, ...]  # hexadecimal, of buckets that have it
  ends: tuple[int, ...]  # where its sections begin, and where the last ends
  sections: tuple[str, ...]  # hexadecimal digests


class Order(NamedTuple):
  """One outer step, for all tensors or for some."""

  number: int  # of the orders before it
  before: str  # id of the state that it moves, hexadecimal
  sources: tuple[Source, ...]  # in the order of uids
  factors_RxP: np.ndarray  # float32
  parts_R: np.ndarray  # uint16, weights of the messages
  # Values of the run's first config that amendments have changed, by path.
  changes: dict[str, ct.Json] = {}

  @property
  def after(self) -> str:
    """The id of the state that it leads to."""
    names = [(s.uid, s.round, s.digest, s.sections) for s in self.sources]
    digest = hashlib.blake2b(digest_size=16, person=b'covenant.order')
    rules = [dict(sorted(self.changes.items()))] if self.changes else []
    digest.update(
      json.dumps([self.number, self.before, names, *rules]).encode()
    )
    digest.update(self.factors_RxP.tobytes() + self.parts_R.tobytes())
    return digest.hexdigest()

  def of_tensors(self, places: Sequence[int]) -> 'Order':
    """Returns its part for some tensors, by their places in leaf order.

    The ends of a source are pairs then: the beginning and end of each section.
    """
    sources = tuple(
      s._replace(
        ends=tuple(e for p in places for e in (s.ends[p], s.ends[p + 1])),
        sections=tuple(s.sections[p] for p in places),
      )
      for s in self.sources
    )
    factors = np.ascontiguousarray(self.factors_RxP[:, list(places)])
    return self._replace(sources=sources, factors_RxP=factors)


def encode(order: Order) -> tuple[dict[str, ct.Json], bytes]:
  """Returns an order as JSON and bytes."""
  text: dict[str, ct.Json] = {
    'number': order.number,
    'before': order.before,
    'sources': [s._asdict() for s in order.sources],
  }
  if order.changes:
    text['changes'] = order.changes
  data = order.factors_RxP.astype('<f4').tobytes()
  return text, data + order.parts_R.astype('<u2').tobytes()


def decode(text: dict[str, ct.Json], data: bytes) -> Order:
  """Returns the order of `encode`; raises OrderError."""
  try:
    sources = tuple(
      Source(
        int(raw['uid']),
        int(raw['round']),
        str(raw['digest']),
        tuple(map(str, raw['locations'])),
        tuple(map(int, raw['ends'])),
        tuple(map(str, raw['sections'])),
      )
      for raw in text['sources']
    )
    count = len(sources)
    cut = len(data) - 2 * count
    factors = np.frombuffer(data[:cut], '<f4').reshape(count, -1)
    parts_R = np.frombuffer(data[cut:], '<u2').astype(np.uint16)
    number, before = int(text['number']), str(text['before'])
    changes = {str(k): v for k, v in text.get('changes', {}).items()}
  except messages.MALFORMED as e:
    raise OrderError(f'not an order: {e}') from None
  factors = factors.astype(np.float32)
  return Order(number, before, sources, factors, parts_R, changes)


def section_digest(data: bytes | memoryview) -> str:
  """Returns the digest of a section."""
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def cut(data: bytes, source: Source) -> list[bytes]:
  """Returns the sections of a source for some tensors; raises OrderError."""
  spans = zip(source.ends[::2], source.ends[1::2], strict=True)
  return check([data[a:b] for a, b in spans], source)


def check(sections: list[bytes], source: Source) -> list[bytes]:
  """Returns sections that are those of a source; raises OrderError."""
  for data, digest in zip(sections, source.sections, strict=True):
    if section_digest(data) != digest:
      raise OrderError(
        f'uid {source.uid}, round {source.round}: a section has the digest '
        f'{section_digest(data)}, expected {digest}'
      )
  return sections


class Base(NamedTuple):
  """A state from which stages begin: the run's first, or a checkpoint."""

  number: int  # of the orders before it
  id: str
  files: dict[
    str, list[str]
  ] = {}  # digests of its tensors' pieces; none: first
  places: tuple[str, ...] = ()  # hexadecimal, of buckets that have them


def base_id(files: dict[str, list[str]]) -> str:
  """Returns the id of the state of a checkpoint."""
  text = json.dumps(files, sort_keys=True).encode()
  return hashlib.blake2b(text, digest_size=16).hexdigest()


class OrderLog:
  """The orders of a run, on disk, from a base on.

  Args:
    folder: where they are kept, one file each.
    genesis: the id of the state before the first.

  Raises:
    ChecksumError: a file differs from what was written. A head without its
      workdir begins from a published checkpoint.

  Attributes:
    base: the state that they begin from.
    number: the number of orders.
    id: the id of the state after the last.
  """

  def __init__(self, folder: str | os.PathLike[str], genesis: str):
    self._folder = pathlib.Path(folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    self.base = Base(0, genesis)
    if self._base_path.exists():
      content = checksums.unseal(self._base_path)
      number, state, pieces, places = json.loads(content)
      self.base = Base(number, state, pieces, tuple(places))
    self.number, self.id = self.base[:2]
    # The id of the state after so many orders: to look one up reads no file.
    self._states = {self.number: self.id}
    while (found := self.get(self.number)) is not None:
      if found.before != self.id:
        break
      self._end_at(self.number + 1, found.after)

  def get(self, number: int) -> Order | None:
    """Returns an order; None if there is none."""
    try:
      content = checksums.unseal(self._path(number))
    except FileNotFoundError:
      return None
    return decode(*messages.unpack(content))

  def has(self, number: int, state: str) -> bool:
    """Returns whether a state is on this history."""
    return self._states.get(number) == state

  def state(self, number: int) -> str:
    """Returns the id of the state after so many orders.

    A number that is not on this history has that of the base.
    """
    return self._states.get(number, self.base.id)

  def _end_at(self, number: int, state: str) -> None:
    self.number, self.id = number, state
    self._states[number] = state

  def fingerprint(self, number: int) -> str | None:
    """Returns the run's fingerprint after so many orders, if it is known."""
    path = self._path(number).with_suffix('.fingerprint')
    return path.read_text() if path.exists() else None

  def set_fingerprint(self, number: int, found: str) -> None:
    """Keeps the run's fingerprint after so many orders."""
    files.write(self._path(number).with_suffix('.fingerprint'), found)

  def forget_fingerprint(self, number: int) -> None:
    """Forgets the run's fingerprint after so many orders."""
    self._path(number).with_suffix('.fingerprint').unlink(missing_ok=True)

  def add(self, order: Order) -> None:
    """Adds an order in its place, unless it is there; others after it go."""
    known = self.get(order.number)
    if known is not None and known.after == order.after:
      return
    self.rewind(order.number)
    content = checksums.seal(messages.pack(*encode(order)))
    files.write(self._path(order.number), content)
    self._end_at(order.number + 1, order.after)

  def rewind(self, number: int) -> None:
    """Forgets the orders from a number on."""
    for later in range(number, self.number):
      self._path(later).unlink(missing_ok=True)
      self.forget_fingerprint(later + 1)
      self._states.pop(later + 1, None)
    self.number, self.id = number, self.state(number)

  def rebase(self, base: Base) -> None:
    """Begins from another state; forgets the orders that led to it.

    Orders of another history are forgotten as well.
    """
    is_here = self.has(base.number, base.id)
    first = self.base.number
    last = base.number if is_here else self.number
    for number in range(first, last):
      self._path(number).unlink(missing_ok=True)
      if not is_here:
        self.forget_fingerprint(number + 1)
    self.base = base
    if not is_here:
      self._states.clear()
      self._end_at(*base[:2])
    for number in range(first, base.number):
      self._states.pop(number, None)
    files.write(self._base_path, checksums.seal(json.dumps(base).encode()))

  @property
  def _base_path(self) -> pathlib.Path:
    return self._folder / 'base.json'

  def _path(self, number: int) -> pathlib.Path:
    return self._folder / f'{number:08d}'
