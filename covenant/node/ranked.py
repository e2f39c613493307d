"""The chain and the store of several processes: rank 0 alone talks to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from covenant import proxy
from covenant.chain import interface as chain_lib
from covenant.node import multihost as multihost_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib


def chain(
  process_group: multihost_lib.ProcessGroup,
  connect: Callable[[], chain_lib.Chain],
) -> chain_lib.Chain:
  """Returns the chain that `connect` opens on rank 0; raises as that."""
  if process_group.is_single:
    return connect()
  return _chain(process_group, connect)


def storage(
  process_group: multihost_lib.ProcessGroup,
  run: bytes,
  connect: Callable[[], run_storage_lib.RunStorage],
) -> run_storage_lib.RunStorage:
  """Returns the storage that `connect` opens on rank 0; raises as that."""
  if process_group.is_single:
    return connect()
  return RankedStorage(process_group, run, connect)


def _chain(
  process_group: multihost_lib.ProcessGroup,
  connect: Callable[[], chain_lib.Chain],
) -> chain_lib.Chain:
  """Returns a chain that rank 0 calls."""
  chain: chain_lib.Chain | None = None  # of rank 0

  def first() -> tuple[str, float]:
    nonlocal chain
    chain = connect()
    return chain.hotkey, chain.block_seconds

  def call(method: str, *args: Any) -> Any:
    if method in ('set_weights', 'check_weights'):
      args = (dict(args[0]), *args[1:])
    answer = process_group.broadcast_from(
      0, ('chain', method, args), lambda: getattr(chain, method)(*args)
    )
    match method:
      case 'peers':
        return tuple(chain_lib.Peer(*peer) for peer in answer)
      case 'subnet' if answer is not None:
        return chain_lib.Subnet(*answer)
      case 'commitments':
        return {uid: chain_lib.CommittedData(*c) for uid, c in answer.items()}
    return answer

  hotkey, block_seconds = process_group.broadcast_from(0, 'chain', first)
  return proxy.make(
    chain_lib.Chain, call, hotkey=hotkey, block_seconds=block_seconds
  )


def _bucket(
  process_group: multihost_lib.ProcessGroup,
  connect: Callable[[], store_lib.Bucket | None],
) -> store_lib.Bucket:
  """Returns a bucket that rank 0 reads and writes.

  Its attribute `bucket` is a function that returns the bucket of rank 0.

  Raises:
    ValueError: `connect` finds none.
  """
  bucket: store_lib.Bucket | None = None  # of rank 0

  def first() -> str:
    nonlocal bucket
    bucket = connect()
    if bucket is None:
      raise ValueError('expected the location of a bucket that can be opened')
    return bucket.location

  location = process_group.broadcast_from(0, 'bucket', first)

  def call(method: str, *args: Any, **kwargs: Any) -> Any:
    answer = process_group.broadcast_from(
      0,
      (location, method, args, kwargs),
      lambda: getattr(bucket, method)(*args, **kwargs),
    )
    match method:
      case 'head':
        return store_lib.Info(*answer)
      case 'list':
        return [store_lib.Info(*info) for info in answer]
    return answer

  return proxy.make(
    store_lib.Bucket, call, location=location, bucket=lambda: bucket
  )


class RankedStorage(run_storage_lib.RunStorage):
  """A run storage that rank 0 reads and writes."""

  in_threads = False  # all ranks ask in one order

  def __init__(
    self,
    process_group: multihost_lib.ProcessGroup,
    run: bytes,
    connect: Callable[[], run_storage_lib.RunStorage],
  ):
    self._process_group = process_group
    self._objects: run_storage_lib.RunStorage | None = None  # of rank 0

    def first() -> bytes:
      self._objects = connect()
      return self._objects.location

    location = process_group.broadcast_from(0, 'objects', first)
    super().__init__(
      run,
      _bucket(process_group, lambda: self._real.bucket),
      location,
      lambda data: _bucket(process_group, lambda: self._real.bucket_at(data)),
    )

  @property
  def _real(self) -> run_storage_lib.RunStorage:
    assert self._objects is not None
    return self._objects

  def fetch(
    self,
    kind: str,
    round_index: int,
    refs: Sequence[run_storage_lib.ObjectRef],
    mirrors: Sequence[Any],
    limit: int,
    seconds: float | None = None,
    take: Callable[[bytes, bytes], None] = lambda digest, data: None,
  ) -> Mapping[bytes, bytes | store_lib.StoreError]:
    def answer() -> Mapping[bytes, bytes | tuple[str, str]]:
      buckets = [mirror.bucket() for mirror in mirrors]
      got = self._real.fetch(kind, round_index, refs, buckets, limit, seconds)
      return {digest: _to_plain(data) for digest, data in got.items()}

    label = ('fetch', kind, round_index, refs, limit)
    got = self._process_group.broadcast_from(0, label, answer)
    found = {digest: _from_plain(data) for digest, data in got.items()}
    for digest, data in found.items():
      if isinstance(data, bytes):
        take(digest, data)
    return found

  def fetch_chunks(
    self,
    digests: Sequence[bytes],
    sources: Sequence[Any],
    limit: int,
    take: Callable[[bytes, bytes], None] = lambda digest, data: None,
  ) -> Mapping[bytes, bytes]:
    def answer() -> Mapping[bytes, bytes]:
      buckets = [source.bucket() for source in sources]
      return self._real.fetch_chunks(digests, buckets, limit)

    found = self._process_group.broadcast_from(
      0, ('fetch_chunks', list(digests), limit), answer
    )
    for digest, data in found.items():
      take(digest, data)
    return found

  def fetch_each(
    self,
    key: str,
    buckets: Sequence[Any],
    limit: int,
    seconds: float | None = None,
  ) -> list[bytes | store_lib.StoreError]:
    def answer() -> list[Any]:
      real = [bucket.bucket() for bucket in buckets]
      got = self._real.fetch_each(key, real, limit, seconds)
      return list(map(_to_plain, got))

    got = self._process_group.broadcast_from(
      0, ('fetch_each', key, len(buckets), limit), answer
    )
    return list(map(_from_plain, got))

  def rounds_of_each(
    self, kind: str, buckets: Sequence[Any]
  ) -> list[list[int] | store_lib.StoreError]:
    def answer() -> list[Any]:
      real = [bucket.bucket() for bucket in buckets]
      return list(map(_to_plain, self._real.rounds_of_each(kind, real)))

    got = self._process_group.broadcast_from(
      0, ('rounds_of_each', kind, len(buckets)), answer
    )
    answers = map(_from_plain, got)
    return [list(x) if isinstance(x, tuple) else x for x in answers]


def _to_plain(answer: Any) -> Any:
  """Returns an answer as it is sent: an error as its name and message."""
  if isinstance(answer, Exception):
    return {'error': multihost_lib.error_to_plain(answer)}
  return answer


def _from_plain(answer: Any) -> Any:
  """Returns the answer of `_to_plain`."""
  if isinstance(answer, dict):
    name, message = answer['error']
    return multihost_lib.ERRORS[name](message)
  return answer
