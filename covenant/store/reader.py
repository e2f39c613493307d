"""Reads a large object in parts; a read that broke is resumed."""

import asyncio
import io
from collections.abc import Mapping
from typing import Any

import obstore

from covenant.store import backend
from covenant.store import interface

PARTS_AT_ONCE = 4  # of one object
_CHUNK_BYTES = 2**16  # bytes that a break may lose


class ObjectReader:
  """The reader of one object, with the parts read so far."""

  def __init__(
    self,
    store: Any,
    key: str,
    limit: int,
    slots: asyncio.Semaphore,
    part_bytes: int,
  ):
    self._store = store
    self._key = key
    self._limit = limit
    self._slots = slots
    self._part_bytes = part_bytes
    self._restart()

  def _restart(self) -> None:
    self._size = 0
    self._identity: tuple | None = None  # of the object, once it answered
    self._parts = [bytearray()]

  async def read(self) -> bytes:
    """Returns the whole object; after a failure, call again to resume."""
    try:
      # Without a range: one request is enough for a small object, and tells the
      # size of a large one.
      await self._fill(0)
      count = max(1, -(-self._size // self._part_bytes))
      self._parts += [bytearray() for _ in range(count - len(self._parts))]
      turns = asyncio.Semaphore(PARTS_AT_ONCE)
      async with asyncio.TaskGroup() as group:
        for index in range(1, count):
          group.create_task(self._fill_in_turn(index, turns))
    except Exception as e:
      error = backend.explain(e)
      if isinstance(error, backend.ObjectReplacedError):
        self._restart()
      raise error from None
    whole = io.BytesIO()  # gives its bytes away without a copy
    for part in self._parts:
      whole.write(part)
      part.clear()
    return whole.getvalue()

  async def _fill_in_turn(self, index: int, turns: asyncio.Semaphore) -> None:
    async with turns:
      await self._fill(index)

  async def _fill(self, index: int) -> None:
    part = self._parts[index]
    at = index * self._part_bytes + len(part)
    end = (index + 1) * self._part_bytes
    options: Any = {}
    if self._identity is not None:
      end = min(end, self._size)
      if at >= end:
        return
      options['range'] = (at, end)
      if e_tag := self._identity[1]:
        options['if_match'] = e_tag
    async with self._slots:
      result = await obstore.get_async(self._store, self._key, options=options)
      self._meet(result.meta)
      end = min(end, self._size)
      # Received bytes are counted, whatever length was announced.
      async for chunk in result.stream(_CHUNK_BYTES):
        part += chunk[: end - at]
        at = min(at + len(chunk), end)
        if at == end:
          return
    if at < end:
      raise interface.StoreUnavailableError(
        'the object broke off in the middle'
      )

  def _meet(self, meta: Mapping[str, Any]) -> None:
    identity = meta['size'], meta['e_tag'], meta['last_modified']
    if self._identity not in (None, identity):
      raise backend.ObjectReplacedError(
        'the object was replaced while it was read'
      )
    if meta['size'] > self._limit:
      raise interface.ObjectTooLargeError(
        f'it has {meta["size"]} bytes, {self._limit} are allowed'
      )
    self._size, self._identity = meta['size'], identity
