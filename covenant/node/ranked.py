"""The chain and the store of several processes.

Rank 0 alone talks to the chain, and to the store but for what is large:
payloads and chunks. Each rank reads its share of these from the store, and
their devices exchange what came. So none of it passes through rank 0 alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from covenant import proxy
from covenant.chain import interface as chain_lib
from covenant.node import multihost as multihost_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib

_Result = TypeVar('_Result')


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
  connect: Callable[..., run_storage_lib.RunStorage],
) -> run_storage_lib.RunStorage:
  """Returns the storage that `connect` opens on rank 0; raises as that.

  Args:
    process_group: the ranks.
    run: the identity of the run.
    connect: opens it; with `writes=False`, on the other ranks, without a bucket
      of its own.
  """
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
  open_here: Callable[[], store_lib.Bucket | None],
) -> store_lib.Bucket:
  """Returns a bucket that rank 0 reads and writes.

  Its attribute `bucket` is a function that returns the bucket of rank 0, and
  `here` one that returns the bucket from which this rank reads its share.

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
    store_lib.Bucket,
    call,
    location=location,
    bucket=lambda: bucket,
    here=lambda: bucket or open_here(),
  )


class RankedStorage(run_storage_lib.RunStorage):
  """A run storage that rank 0 writes, and that all ranks read."""

  in_threads = False  # all ranks ask in one order

  def __init__(
    self,
    process_group: multihost_lib.ProcessGroup,
    run: bytes,
    connect: Callable[..., run_storage_lib.RunStorage],
  ):
    self._process_group = process_group
    self._objects: run_storage_lib.RunStorage | None = None  # of rank 0

    def first() -> bytes:
      self._objects = connect()
      return self._objects.location

    location = process_group.broadcast_from(0, 'objects', first)
    self._here = self._objects or connect(writes=False)
    super().__init__(
      run,
      _bucket(
        process_group,
        lambda: self._real.bucket,
        lambda: self._here.bucket_at(location),
      ),
      location,
      lambda data: _bucket(
        process_group,
        lambda: self._real.bucket_at(data),
        lambda: self._here.bucket_at(data),
      ),
    )

  @property
  def of_first(self) -> run_storage_lib.RunStorage:
    """The storage of rank 0, for its threads: no other rank takes part."""
    return self._real

  @property
  def _real(self) -> run_storage_lib.RunStorage:
    assert self._objects is not None
    return self._objects

  def clock(self) -> float:
    return self._process_group.broadcast_from(0, 'clock', super().clock)

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
    owners: dict[bytes, list[run_storage_lib.ObjectRef]] = {}
    for ref in refs:
      owners.setdefault(ref.digest, []).append(ref)

    def read(some: Sequence[bytes]) -> Mapping[bytes, Any]:
      mine = [ref for digest in some for ref in owners[digest]]
      sources = _opened(mirrors)
      return self._here.fetch(kind, round_index, mine, sources, limit, seconds)

    label = ('fetch', kind, round_index, refs, limit)
    found = self._read_in_shares(label, list(owners), read, take)
    self._directory.begin(round_index)
    for ref in refs:
      got = found[ref.digest]
      error = got if isinstance(got, store_lib.StoreError) else None
      if (bucket := self.bucket_at(ref.location)) is not None:
        self._directory.note(bucket, error)
    return found

  def _read_in_shares(
    self,
    label: object,
    names: Sequence[bytes],
    read: Callable[[Sequence[bytes]], Mapping[bytes, Any]],
    take: Callable[[bytes, bytes], None],
  ) -> dict[bytes, Any]:
    """Returns what each rank reads of objects by digest, or the errors.

    Args:
      label: says what is read, see `ProcessGroup.broadcast_from`.
      names: the digests of all, in one order on all ranks.
      read: reads some of them on this rank.
      take: called with each object that came, in that order.

    Raises:
      OSError: `take` of a rank has raised it.
    """
    group = self._process_group
    group.broadcast_from(0, label, lambda: None)
    mine = names[group.index :: group.size]
    got = read(mine) if mine else {}
    found: dict[bytes, Any] = {}
    failed: OSError | None = None
    for first in range(0, len(names), group.size):
      turn = names[first : first + group.size]
      own = turn[group.index] if group.index < len(turn) else None
      packed = b'' if own is None else _packed(got[own], group.index)
      for name, data in zip(turn, group.exchange(packed), strict=False):
        found[name] = answer = _unpacked(data)
        # The others wait for this rank, also if its disk is full.
        if isinstance(answer, bytes) and failed is None:
          try:
            take(name, answer)
          except OSError as e:
            failed = e
    self._raise_anywhere(failed)
    return found

  def on_disk(self, act: Callable[[], _Result]) -> _Result:
    try:
      result = act()
    except OSError as e:
      self._raise_anywhere(e)
      raise
    self._raise_anywhere(None)
    return result

  def _raise_anywhere(self, error: OSError | None) -> None:
    """Raises on all ranks the errors that some of them have."""
    index = self._process_group.index
    own = '' if error is None else f'rank {index}: {error}'
    if errors := [
      text.decode()
      for text in self._process_group.exchange(own.encode())
      if text
    ]:
      raise OSError('; '.join(errors)) from error

  def fetch_first(
    self,
    key: str,
    buckets: Sequence[Any],
    limit: int,
    accepts: Callable[[bytes], bool],
    seconds: float,
  ) -> bytes:
    # Whether bytes are right may depend on what all ranks ask the chain.
    got = self.fetch_each(key, buckets, limit, seconds)
    for data in got:
      if isinstance(data, bytes) and accepts(data):
        return data
    errors = [str(e) for e in got if isinstance(e, store_lib.StoreError)]
    raise store_lib.StoreUnavailableError(
      '; '.join(errors) or f'{key}: no bucket has the right bytes'
    )

  def fetch_chunks(
    self,
    digests: Sequence[bytes],
    sources: Sequence[Any],
    limit: int,
    take: Callable[[bytes, bytes], None] = lambda digest, data: None,
  ) -> Mapping[bytes, bytes]:
    def read(some: Sequence[bytes]) -> Mapping[bytes, Any]:
      came: dict[bytes, Any] = {}
      try:
        self._here.fetch_chunks(some, _opened(sources), limit, came.__setitem__)
      except store_lib.StoreError as e:
        return {digest: came.get(digest, e) for digest in some}
      return came

    label = ('fetch_chunks', list(digests), limit)
    names = list(dict.fromkeys(digests))
    found = self._read_in_shares(label, names, read, take)
    for got in found.values():
      if isinstance(got, store_lib.StoreError):
        raise got
    return found

  def missing_anywhere(self, digests: Sequence[bytes]) -> list[bytes]:
    some = self._process_group.exchange(b''.join(digests))
    listed = b''.join(some)
    names = (listed[i : i + 32] for i in range(0, len(listed), 32))
    return list(dict.fromkeys(names))

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


def _opened(buckets: Sequence[Any]) -> list[store_lib.Bucket]:
  """Returns the buckets from which this rank reads, for those of all ranks."""
  return [b for bucket in buckets if (b := bucket.here()) is not None]


def _packed(answer: bytes | Exception, rank: int) -> bytes:
  """Returns an object as it is exchanged, after a byte; or a rank's error."""
  if isinstance(answer, bytes):
    return b'+' + answer
  name, message = multihost_lib.error_to_plain(answer)
  return f'-{name}\0rank {rank}: {message}'.encode()


def _unpacked(data: bytes) -> bytes | Exception:
  """Returns the answer of `_packed`."""
  if data[:1] == b'+':
    return data[1:]
  name, _, message = data[1:].decode().partition('\0')
  return multihost_lib.ERRORS[name](message)


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
