"""The objects of a run: their keys, their owners and the access to them.

  RUN/payloads/ROUND/DIGEST     its miner; validators: those that count
  RUN/proposals/ROUND/DIGEST    validators: the manifests they vote for
  RUN/history/ROUND             validators: the decided manifest, or nothing
  RUN/verdicts/ROUND            validators: their findings, for miners to read
  RUN/checkpoints/ROUND         validators: an index, once all chunks are there
  RUN/chunks/DIGEST             validators: the bytes of checkpoints
  RUN/status/00000000           all: what a node says of itself, signed
  RUN/amendments/00000000       validators: the amendments that they support
  RUN/rules/00000000            validators: those that the run has adopted

An object that is named by its digest can come from any bucket.
"""

import pathlib
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from covenant.protocol import parts as parts_lib
from covenant.store import directory
from covenant.store import interface
from covenant.store import reader
from covenant.wire import commitment as commitment_lib

# A fetch of several objects gives up after these seconds plus the time that all
# of them take at half a gigabit per second, or at half of the rate of the last
# large fetch if that was slower.
_SECONDS, _RATE = 60.0, 2.0**26  # bytes/s
_SLOWEST = 2.0**24  # bytes/s
_MEASURED = 2**24  # bytes from which a fetch says something about the link
_SMALL_SECONDS = 20.0  # that one object or list of each peer may take
_WORKERS = 16
_ROUND = re.compile(r'[0-9]{8}')
_DIGEST = re.compile(r'/[0-9a-f]{64}$')
_LARGE = 2**23  # bytes from which objects are uploaded in parts

_Result = TypeVar('_Result')


class ObjectRef(NamedTuple):
  """An object by its digest, and the location of its owner's bucket."""

  digest: bytes
  location: bytes  # empty if unknown


class _Meter:
  """The bytes of a fetch, and the seconds until the last of them came.

  Neither the time of the caller, who takes them, nor that of sources which do
  not answer says anything about the link.
  """

  def __init__(self, take: Callable[[bytes, bytes], None]):
    self._take = take
    self._began = time.monotonic()
    self.size = 0
    self.seconds = 0.0

  def take(self, digest: bytes, data: bytes) -> None:
    """Counts an object that came, and gives it to the caller."""
    now = time.monotonic()
    self.size += len(data)
    self.seconds = now - self._began
    self._take(digest, data)
    self._began += time.monotonic() - now


class RunStorage:
  """The objects of a run: reads from all buckets, writes to the own one.

  Args:
    run: the identity of the run.
    bucket: the own bucket.
    location: where others find it.
    open_bucket: opens the bucket at a location.

  Attributes:
    folder: where a checkpoint that is being loaded survives a break; None:
      nowhere.
    in_threads: whether several threads may use it at the same time.
  """

  folder: pathlib.Path | None = None
  in_threads = True

  def __init__(
    self,
    run: bytes,
    bucket: interface.Bucket,
    location: bytes,
    open_bucket: directory.Open,
  ):
    self.bucket = bucket
    self.location = location
    self._run = run.hex()
    self._rate = 2 * _RATE  # bytes/s of the last large fetch
    self._directory = directory.Directory(open_bucket)

  def key(
    self, kind: str, round_index: int, digest: bytes | None = None
  ) -> str:
    """Returns the key of an object of a kind and a round."""
    parts = [self._run, kind, f'{round_index:08d}']
    return '/'.join(parts + ([] if digest is None else [digest.hex()]))

  def chunk_key(self, digest: bytes) -> str:
    """Returns the key of a chunk."""
    return f'{self._run}/chunks/{digest.hex()}'

  def bucket_at(self, location: bytes) -> interface.Bucket | None:
    """Opens another peer's bucket; None if the location is unusable."""
    return self._directory.bucket_at(location)

  def failed(self, location: bytes) -> bool:
    """Returns whether the bucket at a location failed lately."""
    bucket = self.bucket_at(location)
    return bucket is not None and self._directory.failed(bucket)

  def keep_only(self, locations: Collection[bytes]) -> None:
    """Closes the buckets of peers at all but these locations."""
    self._directory.keep_only(locations)

  def buckets_at(self, locations: Iterable[bytes]) -> list[interface.Bucket]:
    """Opens the buckets at those locations that are usable."""
    opened = map(self.bucket_at, filter(None, locations))
    return [bucket for bucket in opened if bucket is not None]

  def locations(self, buckets: Iterable[interface.Bucket]) -> list[bytes]:
    """Returns the locations of buckets that were opened here."""
    return self._directory.locations(buckets)

  def put_once(self, key: str, data: bytes) -> None:
    """Puts an object unless it is there: its key determines its bytes.

    One that is too large for a store is put in parts (parts.py). A large object
    under its digest may be written twice, to the same bytes, but is not copied:
    a store must copy what only one writer may have put.
    """
    is_named = bool(_DIGEST.search(key))
    if is_named and parts_lib.is_cut(len(data)):
      folder, digests = key.rpartition('/')[0], []
      for part in parts_lib.cut(data):
        digests.append(digest(part))
        self.put_once(f'{folder}/{digests[-1].hex()}', part)
      data, is_named = parts_lib.make_list(digests), False
    is_large = is_named and len(data) >= _LARGE
    if is_large and self._has(key, len(data)):
      return
    try:
      self.bucket.put(key, data, replace=is_large)
    except interface.ObjectExistsError:
      pass

  def _has(self, key: str, size: int) -> bool:
    try:
      return self.bucket.head(key).size == size
    except interface.MissingObjectError:
      return False

  def fetch(
    self,
    kind: str,
    round_index: int,
    refs: Sequence[ObjectRef],
    mirrors: Sequence[interface.Bucket],
    limit: int,
    seconds: float | None = None,
    take: Callable[[bytes, bytes], None] = lambda digest, data: None,
  ) -> Mapping[bytes, bytes | interface.StoreError]:
    """Fetches objects from their owners or else from a mirror, by digest.

    Buckets that failed in the last rounds are asked last. The value of an
    object that cannot be had is the error that came last.

    Args:
      kind: the kind of the objects.
      round_index: their round.
      refs: the objects.
      mirrors: buckets that may have them, too.
      limit: bytes per object, at most.
      seconds: the time for all of them; None: as long as they may take, by
        their sizes and the rate of earlier fetches.
      take: called with the digest and the bytes of each object as it comes,
        while others are being read.
    """
    self._directory.begin(round_index)
    # Several peers may commit one digest: a copier cannot hide the original.
    owners: dict[bytes, list[bytes]] = {}
    for digest, location in refs:
      owners.setdefault(digest, []).append(location)
    requests, missing = {}, {}
    for name, locations in owners.items():
      sources = tuple(
        self._directory.by_trust([*self.buckets_at(locations), *mirrors])
      )
      key = self.key(kind, round_index, name)
      if sources:
        requests[name] = parts_lib.request(sources, key, limit, name)
      else:
        missing[name] = interface.MissingObjectError(
          f'{key}: no known peer says where it is'
        )
    in_turn = sorted(
      requests, key=lambda d: self._directory.failed(requests[d].buckets[0])
    )
    requests = {name: requests[name] for name in in_turn}
    if seconds is None:
      seconds = self.longest(len(requests) * limit)
    note, meter = self._directory.note, _Meter(take)
    if parts_lib.is_cut(limit):
      got = parts_lib.fetch(
        requests, limit, seconds, _WORKERS, note, meter.take
      )
    else:
      got = reader.fetch(requests, seconds, _WORKERS, note, meter.take)
    self._measure(meter.size, meter.seconds)
    return got | missing

  def clock(self) -> float:
    """Returns the seconds of the clock by which a caller's deadlines go."""
    return time.monotonic()

  def longest(self, size: int) -> float:
    """Returns the seconds after which a fetch of so many bytes gives up."""
    return _SECONDS + size / min(_RATE, self._rate / 2)

  def _measure(self, size: int, seconds: float) -> None:
    if size >= _MEASURED and seconds > 0:
      # A slow stranger must not make later fetches endless.
      self._rate = max(size / seconds, _SLOWEST)

  def fetch_first(
    self,
    key: str,
    buckets: Sequence[interface.Bucket],
    limit: int,
    accepts: Callable[[bytes], bool],
    seconds: float,
  ) -> bytes:
    """Fetches an object from the first bucket whose bytes are accepted.

    Raises:
      StoreError: there is none.
    """
    sources = tuple(self._directory.by_trust(buckets))
    request = reader.ObjectRequest(sources, key, limit, accepts=accepts)
    got = reader.fetch({key: request}, seconds, _WORKERS)[key]
    if isinstance(got, interface.StoreError):
      raise got
    return got

  def on_disk(self, act: Callable[[], _Result]) -> _Result:
    """Returns what `act` returns, which uses the disk of this process.

    Raises:
      OSError: the disk of a process of this node has failed.
    """
    return act()

  def missing_anywhere(self, digests: Sequence[bytes]) -> list[bytes]:
    """Returns the chunks that a process of this node lacks.

    Args:
      digests: those that this process lacks.
    """
    return list(digests)

  def fetch_chunks(
    self,
    digests: Sequence[bytes],
    sources: Sequence[interface.Bucket],
    limit: int,
    take: Callable[[bytes, bytes], None] = lambda digest, data: None,
  ) -> Mapping[bytes, bytes]:
    """Fetches chunks from any of the sources.

    Each is given to `take` as it comes, also if others then do not come.

    Raises:
      StoreError: one cannot be had.
      OSError: `take` of a process of this node has raised it.
    """
    requests = {
      digest: reader.ObjectRequest(
        tuple(sources), self.chunk_key(digest), limit, digest
      )
      for digest in digests
    }
    seconds = self.longest(len(requests) * limit)
    chunks = {}
    found = reader.fetch(requests, seconds, _WORKERS, take=take)
    for digest, got in found.items():
      if isinstance(got, interface.StoreError):
        raise got
      chunks[digest] = got
    return chunks

  def fetch_each(
    self,
    key: str,
    buckets: Sequence[interface.Bucket],
    limit: int,
    seconds: float | None = None,
  ) -> list[bytes | interface.StoreError]:
    """Fetches what each bucket has under a key, from all at the same time."""
    requests = {
      i: reader.ObjectRequest((bucket,), key, limit)
      for i, bucket in enumerate(buckets)
    }
    if seconds is None:
      seconds = _SMALL_SECONDS + len(requests) * limit / min(_RATE, self._rate)
    got = reader.fetch(requests, seconds, max(len(requests), 1))
    return [got[i] for i in requests]

  def rounds_of_each(
    self, kind: str, buckets: Sequence[interface.Bucket]
  ) -> list[list[int] | interface.StoreError]:
    """Lists the rounds of each bucket's objects, of all at the same time.

    A bucket that has not answered in time has an error.
    """
    answers: list[list[int] | interface.StoreError] = [
      interface.StoreUnavailableError(f'no list within {_SMALL_SECONDS:g} s')
    ] * len(buckets)

    def ask(i: int) -> None:
      try:
        answers[i] = self.rounds(kind, buckets[i])
      except interface.StoreError as e:
        answers[i] = e

    threads = [
      threading.Thread(target=ask, args=(i,), daemon=True)
      for i in range(len(buckets))
    ]
    deadline = time.monotonic() + _SMALL_SECONDS
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(max(deadline - time.monotonic(), 0))
    return list(answers)

  def rounds(self, kind: str, bucket: interface.Bucket) -> list[int]:
    """Returns the rounds of a bucket's objects of a kind, in order."""
    folder = f'{self._run}/{kind}/'
    names = {i.key.removeprefix(folder)[:8] for i in bucket.list(folder)}
    return sorted(int(name) for name in names if _ROUND.fullmatch(name))

  def chunks(self) -> set[str]:
    """Returns the hexadecimal digests of the chunks in the own bucket."""
    folder = f'{self._run}/chunks/'
    return {i.key.removeprefix(folder) for i in self.bucket.list(folder)}

  def delete_before(self, kind: str, before: int) -> None:
    """Deletes own objects of a kind that belong to earlier rounds."""
    if before > 0:
      self._delete(kind, lambda name: name[:8] < f'{before:08d}')

  def delete_chunks_except(self, named: Collection[str]) -> None:
    """Deletes own chunks whose hexadecimal digest is not in `named`."""
    self._delete('chunks', lambda name: name not in named)

  def _delete(self, kind: str, is_old: Callable[[str], bool]) -> None:
    folder = f'{self._run}/{kind}/'
    keys = [info.key for info in self.bucket.list(folder)]
    if old := [key for key in keys if is_old(key.removeprefix(folder))]:
      self.bucket.delete(old)


def digest(data: bytes) -> bytes:
  """Returns the digest that names an object."""
  return commitment_lib.digest(data)
