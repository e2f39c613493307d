"""Reads one object in ranges, into one buffer, and digests it meanwhile."""

import asyncio
import hashlib
import io

from covenant import extras
from covenant.store import backend
from covenant.store import interface
from covenant.store import transfer as transfer_lib

with extras.needed('run'):
  import obstore

PARTS_AT_ONCE = 4  # of one object
_CHUNK_BYTES = 2**16  # bytes that a break may lose
_INLINE_BYTES = 2**18  # bytes that are digested without a thread of their own


class ObjectReader:
  """The reader of one object, with the bytes that have come so far.

  Args:
    store: the store.
    key: the key of the object.
    limit: the most bytes that it may have.
    slots: the requests that the bucket may have under way.
    part_bytes: bytes of one request.
    is_local: True for the memory and the disk of this machine: a part is read
      in one piece, as its length can be trusted.
    transfer: is told what comes, and the digest.
  """

  def __init__(
    self,
    store: obstore.store.ObjectStore,
    key: str,
    limit: int,
    slots: asyncio.Semaphore,
    part_bytes: int,
    is_local: bool = False,
    transfer: transfer_lib.Transfer | None = None,
  ):
    self._store = store
    self._key = key
    self._limit = limit
    self._slots = slots
    self._part_bytes = part_bytes
    self._is_local = is_local
    self._transfer = transfer or transfer_lib.Transfer()
    self._restart()

  def _restart(self) -> None:
    self._size = 0
    self._identity: tuple | None = None  # of the object, once it answered
    self._have: list[int] = [0]  # bytes that have come, by part
    # It gives its bytes away without a copy. It grows with what comes: a size
    # that a stranger only announces takes no memory.
    self._buffer = io.BytesIO()
    self._transfer.received = 0

  async def read(self) -> bytes:
    """Returns the whole object; after a failure, call again to resume."""
    in_turn = asyncio.Lock()
    # A thread of an earlier call may still be digesting: into its own object.
    self._digest = hashlib.blake2b(digest_size=32)
    self._digested = 0  # parts, in their order
    try:
      # Without a range: one request is enough for a small object, and tells the
      # size of a large one.
      await self._fill(0)
      turns = asyncio.Semaphore(PARTS_AT_ONCE)
      async with asyncio.TaskGroup() as group:
        for index in range(len(self._have)):
          group.create_task(self._fill_in_turn(index, turns, in_turn))
    except Exception as e:
      error = backend.explain(e)
      if isinstance(error, backend.ObjectReplacedError):
        self._restart()
      raise error from None
    data = self._buffer.getvalue()
    self._transfer.read_as(data, self._digest.digest())
    return data

  async def _fill_in_turn(
    self, index: int, turns: asyncio.Semaphore, in_turn: asyncio.Lock
  ) -> None:
    async with turns:
      await self._fill(index)
    async with in_turn:
      await self._digest_ready()

  async def _digest_ready(self) -> None:
    """Digests the parts that have come and whose predecessors are digested."""
    loop = asyncio.get_running_loop()
    while self._digested < len(self._have):
      begin, end = self._range(self._digested)
      if self._have[self._digested] < end - begin:
        return
      with self._buffer.getbuffer() as view:
        part: memoryview | bytes = view[begin:end]
        if sum(self._have) < self._size:
          # A copy, as a buffer that is looked at cannot grow.
          part = bytes(part)
      if len(part) <= _INLINE_BYTES:
        self._digest.update(part)
      else:
        await loop.run_in_executor(None, self._digest.update, part)
      del part  # else the bytes of the buffer are copied in the end
      self._digested += 1

  def _range(self, index: int) -> tuple[int, int]:
    begin = index * self._part_bytes
    return begin, min(begin + self._part_bytes, self._size)

  async def _fill(self, index: int) -> None:
    options: obstore.GetOptions = {}
    if self._identity is not None:
      begin, end = self._range(index)
      if begin + self._have[index] >= end:
        return
      options['range'] = (begin + self._have[index], end)
      if e_tag := self._identity[1]:
        options['if_match'] = e_tag
    async with self._slots:
      result = await obstore.get_async(self._store, self._key, options=options)
      self._meet(result.meta)
      begin, end = self._range(index)
      at = begin + self._have[index]
      if self._is_local and (options or self._size <= self._part_bytes):
        self._take(index, memoryview(await result.bytes_async()), end)
        return
      if self._is_local:
        whole = obstore.get_range_async(
          self._store, self._key, start=at, end=end
        )
        self._take(index, memoryview(await whole), end)
        return
      # Received bytes are counted, whatever length was announced.
      async for chunk in result.stream(_CHUNK_BYTES):
        if self._take(index, memoryview(chunk), end):
          return
    if begin + self._have[index] < end:
      raise interface.StoreUnavailableError(
        'the object broke off in the middle'
      )

  def _take(self, index: int, chunk: memoryview, end: int) -> bool:
    """Keeps bytes of a part up to `end`; returns whether it is complete."""
    at = self._range(index)[0] + self._have[index]
    some = chunk[: end - at]
    self._buffer.seek(at)
    self._buffer.write(some)
    self._have[index] += len(some)
    self._transfer.received += len(some)
    return at + len(some) == end

  def _meet(self, meta: 'obstore.ObjectMeta') -> None:
    identity = meta['size'], meta['e_tag'], meta['last_modified']
    if self._identity not in (None, identity):
      raise backend.ObjectReplacedError(
        'the object was replaced while it was read'
      )
    if meta['size'] > self._limit:
      raise interface.ObjectTooLargeError(
        f'it has {meta["size"]} bytes, {self._limit} are allowed'
      )
    if self._identity is None:
      self._size, self._identity = meta['size'], identity
      self._transfer.size = self._size
      self._have = [0] * max(1, -(-self._size // self._part_bytes))
