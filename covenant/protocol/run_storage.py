"""The objects of a run: who keeps what, under which key, in whose bucket.

  RUN/payloads/ROUND/DIGEST     its miner; validators, of those that count
  RUN/proposals/ROUND/DIGEST    validators: the manifests they stand for
  RUN/history/ROUND             validators: the manifest that held, or nothing
  RUN/verdicts/ROUND            validators: what they found, for miners to read
  RUN/checkpoints/ROUND         validators: an index of chunks, once all are up
  RUN/chunks/DIGEST             validators: the bytes of checkpoints

What is named by its digest can come from anybody's bucket.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from covenant.store import gather
from covenant.store import interface
from covenant.wire import commitment as commitment_lib

Open = Callable[[bytes], interface.Bucket]  # a location from the chain

# A fetch of several objects gives up after so long, and the time in which all
# of them come over half a gigabit a second.
_SECONDS, _RATE = 60.0, 2.0**26  # bytes/s
_WORKERS = 16


class Wanted(NamedTuple):
  """An object named by its digest, and the location of who made it."""

  digest: bytes
  location: bytes


class Objects:
  """Reads everybody's objects, writes the own ones."""

  def __init__(
    self,
    run: bytes,
    bucket: interface.Bucket,
    location: bytes,
    open_bucket: Open,
  ):
    """Of a run, in `bucket`, which strangers find at `location`."""
    self.bucket = bucket
    self.location = location
    self._run = run.hex()
    self._open = open_bucket
    self._buckets: dict[bytes, interface.Bucket] = {}

  def key(
    self, kind: str, round_index: int, digest: bytes | None = None
  ) -> str:
    parts = [self._run, kind, f'{round_index:08d}']
    return '/'.join(parts + ([] if digest is None else [digest.hex()]))

  def chunk_key(self, digest: bytes) -> str:
    return f'{self._run}/chunks/{digest.hex()}'

  def bucket_at(self, location: bytes) -> interface.Bucket | None:
    """A stranger's bucket; None where the location is of no use."""
    if location not in self._buckets:
      try:
        self._buckets[location] = self._open(location)
      except (ValueError, interface.StoreError):  # what a stranger wrote
        return None
    return self._buckets[location]

  def buckets_at(self, locations: Iterable[bytes]) -> list[interface.Bucket]:
    opened = map(self.bucket_at, filter(None, locations))
    return [bucket for bucket in opened if bucket is not None]

  def keep(self, key: str, data: bytes) -> None:
    """Puts an object that only ever has these bytes."""
    try:
      self.bucket.put(key, data)
    except interface.ObjectExistsError:
      pass

  def fetch(
    self,
    kind: str,
    round_index: int,
    wanted: Sequence[Wanted],
    mirrors: Sequence[interface.Bucket],
    limit: int,
  ) -> Mapping[bytes, bytes | interface.StoreError]:
    """Objects by digest, from who made them or else from a mirror.

    One that nobody has is there as the error that came last.
    """
    # Several may name one digest: who copies it from the chain hides nothing.
    makers: dict[bytes, list[bytes]] = {}
    for digest, location in wanted:
      makers.setdefault(digest, []).append(location)
    requests, missing = {}, {}
    for digest, locations in makers.items():
      sources = tuple(dict.fromkeys([*self.buckets_at(locations), *mirrors]))
      key = self.key(kind, round_index, digest)
      if sources:
        requests[digest] = gather.Request(sources, key, limit, digest)
      else:
        missing[digest] = interface.MissingObjectError(
          f'{key}: nobody says where it is'
        )
    seconds = _SECONDS + len(requests) * limit / _RATE
    return gather.fetch(requests, seconds, _WORKERS) | missing

  def fetch_chunk(
    self, digest: bytes, sources: Sequence[interface.Bucket], limit: int
  ) -> bytes:
    """A chunk from whoever has it; raises StoreError."""
    key = self.chunk_key(digest)
    request = gather.Request(tuple(sources), key, limit, digest)
    got = gather.fetch({digest: request}, _SECONDS, _WORKERS)[digest]
    if isinstance(got, interface.StoreError):
      raise got
    return got

  def rounds(self, kind: str, bucket: interface.Bucket) -> list[int]:
    """The rounds of which a bucket has objects of a kind, rising."""
    folder = f'{self._run}/{kind}/'
    names = {i.key.removeprefix(folder)[:8] for i in bucket.list(folder)}
    return sorted(int(name) for name in names if name.isdecimal())

  def forget(self, kind: str, before: int) -> None:
    """Deletes the own objects of a kind of all rounds before one."""
    if before <= 0:
      return
    folder = f'{self._run}/{kind}/'
    old = [
      info.key
      for info in self.bucket.list(folder)
      if info.key.removeprefix(folder)[:8] < f'{before:08d}'
    ]
    if old:
      self.bucket.delete(old)

  def forget_chunks(self, named: Collection[str]) -> None:
    """Deletes own chunks whose digest, in hexadecimal, is not named."""
    folder = f'{self._run}/chunks/'
    old = [
      info.key
      for info in self.bucket.list(folder)
      if info.key.removeprefix(folder) not in named
    ]
    if old:
      self.bucket.delete(old)


def digest(data: bytes) -> bytes:
  return commitment_lib.digest(data)
