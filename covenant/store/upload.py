"""The puts of a bucket: large objects go to S3 in parts that suit the link.

A part takes about four seconds. Much shorter ones would spend their time on the
answers of a distant store, and much longer ones be sent again in vain when a
slow connection breaks. All parts of an object have one size, as R2 demands.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable

from covenant import extras
from covenant.store import backend
from covenant.store import interface
from covenant.store import object_reader
from covenant.store import retry as retry_lib

with extras.needed('run'):
  import obstore
  import obstore.store

STAGING = '.staging/'  # uploads under way; old ones are left by killed nodes
_MAX_PARTS = 10_000  # S3's
_LEAST_BYTES = 5 * 2**20  # of a part, but for the last: S3's
_MOST_BYTES = 2**26  # of a part
_PART_SECONDS = 4.0

Act = Callable[[], Awaitable[object]]


class Uploader:
  """Puts the objects of one bucket, and measures its link meanwhile.

  Args:
    store: the client of the store.
    parts_store: one that repeats the requests of parts; None: objects of any
      size are put in one request.
    slots: the requests that the bucket may have under way.
    settings: the size of the parts as long as no upload was measured.
    is_own: whether the bucket is the own one.

  Attributes:
    rate: bytes/s of the last upload in parts; None before the first. Each one
      that the store did not take in time halves it.
  """

  def __init__(
    self,
    store: obstore.store.ObjectStore,
    parts_store: obstore.store.ObjectStore | None,
    slots: asyncio.Semaphore,
    settings: backend.StoreSettings,
    is_own: bool,
  ):
    self.rate: float | None = None
    self._store = store
    self._parts_store = parts_store
    self._slots = slots
    self._settings = settings
    self._is_own = is_own
    self._tasks: set[asyncio.Task] = set()  # asyncio keeps weak references

  def part_bytes(self, size: int) -> int:
    """Returns the bytes of a part of an object of so many."""
    part_bytes = self._settings.part_bytes
    if self.rate is not None:
      at_once = object_reader.PARTS_AT_ONCE
      best = int(self.rate / at_once * _PART_SECONDS)
      part_bytes = max(
        min(best, _MOST_BYTES, -(-size // at_once)), _LEAST_BYTES
      )
    return max(part_bytes, -(-size // _MAX_PARTS))

  async def put(
    self, call: retry_lib.Call, key: str, data: bytes, replace: bool
  ) -> None:
    """Puts an object; see `interface.Bucket.put`."""
    if self._parts_store is None or len(data) <= self._settings.part_bytes:
      await self._put_whole(call, key, data, replace)
      return
    # A cancelled upload would leave its parts in the store for good, but
    # obstore aborts an upload that fails. So at the deadline the upload is made
    # to fail, and ends in the background.
    upload = self._upload if replace else self._upload_absent
    task: asyncio.Task = asyncio.ensure_future(upload(call, key, data))
    self._tasks.add(task)
    task.add_done_callback(self._end)
    await asyncio.shield(task)

  async def _put_whole(
    self, call: retry_lib.Call, key: str, data: bytes, replace: bool
  ) -> None:
    mode = 'overwrite' if replace else 'create'

    async def act() -> None:
      async with self._slots:
        await obstore.put_async(
          self._store, key, data, mode=mode, use_multipart=False
        )

    await self._create(call, act, key, data)

  async def _create(
    self, call: retry_lib.Call, act: Act, key: str, data: bytes
  ) -> None:
    """Runs `act`; a lost answer is not mistaken for another node's put."""
    tries = call.tries
    try:
      await self._retry(call, act)
    except interface.ObjectExistsError:
      if call.tries == tries + 1 or not await self._holds(call, key, data):
        raise
    except interface.MissingObjectError as e:  # of the bucket
      raise interface.StoreError(str(e)) from None

  async def _holds(self, call: retry_lib.Call, key: str, data: bytes) -> bool:
    reader = object_reader.ObjectReader(
      self._store, key, len(data), self._slots, self._settings.part_bytes
    )
    try:
      return (
        await retry_lib.retry(call, reader.read, self._settings, self._is_own)
        == data
      )
    except (interface.MissingObjectError, interface.ObjectTooLargeError):
      return False

  async def _retry(self, call: retry_lib.Call, act: Act) -> None:
    await retry_lib.retry(call, act, self._settings, self._is_own)

  def _end(self, task: asyncio.Task) -> None:
    self._tasks.discard(task)
    if not task.cancelled():
      task.exception()  # asyncio logs exceptions that are not retrieved

  async def _upload_absent(
    self, call: retry_lib.Call, key: str, data: bytes
  ) -> None:
    # An upload in parts cannot fail because the object exists, but a copy of
    # obstore can. The time of the copy is that of the end of the upload.
    if await self._there(call, key):
      raise interface.ObjectExistsError('there is one already')
    stage = STAGING + secrets.token_hex(16)

    async def copy() -> None:
      async with self._slots:
        await obstore.copy_async(self._store, stage, key, overwrite=False)

    try:
      await self._upload(call, stage, data)
      await self._create(call, copy, key, data)
    finally:
      with contextlib.suppress(obstore.exceptions.BaseError):
        await obstore.delete_async(self._store, stage)

  async def _there(self, call: retry_lib.Call, key: str) -> bool:
    async def act() -> None:
      async with self._slots:
        await obstore.head_async(self._store, key)

    try:
      await self._retry(call, act)
    except (interface.MissingObjectError, interface.AccessDeniedError):
      return False  # only the upload's refusal says why
    return True

  async def _upload(self, call: retry_lib.Call, key: str, data: bytes) -> None:
    part_bytes = self.part_bytes(len(data))

    async def parts():
      view = memoryview(data)
      for i in range(0, len(data), part_bytes):
        if call.over:
          raise TimeoutError('the call is over')
        yield view[i : i + part_bytes]

    try:
      async with self._slots:
        began = time.monotonic()
        await obstore.put_async(
          self._parts_store,
          key,
          parts(),
          chunk_size=part_bytes,
          max_concurrency=object_reader.PARTS_AT_ONCE,
          use_multipart=True,
        )
        took = time.monotonic() - began
    except Exception as e:
      error = backend.explain(e)
      if isinstance(error, interface.StoreUnavailableError) or call.over:
        self._slow_down(part_bytes)
      if isinstance(error, interface.MissingObjectError):  # the bucket
        error = interface.StoreError(str(error))
      raise error from None
    self.rate = len(data) / max(took, 1e-3)

  def _slow_down(self, part_bytes: int) -> None:
    at_most = part_bytes * object_reader.PARTS_AT_ONCE / _PART_SECONDS
    self.rate = min(self.rate or at_most, at_most) / 2
