"""A channel between a pool and a worker: signed messages, both ways, in order.

It is a WebSocket on the pool's server, which the worker opens: so it works from
behind a router, and a message takes half a round trip. Each is signed by its
sender, and numbered under the channel, so nobody on the way can change, repeat
or leave out one without the channel being closed.

A message travels in parts of `PART_BYTES`; a shorter one, perhaps empty, ends
it. So the pool holds one part of a useless message, not all of it.
"""

import asyncio
import contextlib
import hashlib
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

from covenant import typing as ct
from covenant.pool import messages
from covenant.store import traffic

HEARTBEAT_SECONDS = 60.0  # without an answer the other side is gone
_CLOSE_SECONDS = 5.0  # for what was sent before, and for the last words
PART_BYTES = 1 << 20
_SIGNATURE_BYTES = 64
_TEXT_BYTES = PART_BYTES  # of the text of a worker's message


class Socket(Protocol):
  """Either end of aiohttp's WebSocket."""

  async def send_bytes(self, data: bytes) -> None: ...

  async def receive_bytes(self) -> bytes: ...

  async def close(self) -> bool: ...


Receive = Callable[['Channel', dict[str, ct.Json], bytes], None]


class Listener(Protocol):
  """The handlers of a pool's channels; called in threads."""

  def open(self, channel: 'Channel') -> None:
    """Takes a new channel."""

  def longest(self, channel: 'Channel') -> int:
    """Returns the most bytes of a message that are of use; it may not block."""

  def receive(
    self, channel: 'Channel', text: dict[str, ct.Json], data: bytes
  ) -> None:
    """Takes a message; raises one of `messages.MALFORMED` to close it."""

  def close(self, channel: 'Channel') -> None:
    """Learns that a channel is closed."""


Verify = Callable[[bytes, bytes], bool]  # data, signature


class Channel:
  """One end of a channel; messages are sent from any thread.

  Args:
    socket: the WebSocket.
    opening: the signed text of the request that opened it.
    is_pool: whether this is the pool's end.
    sign: signs with the own key.
    verify: returns whether the other side signed some bytes.
    worker: the address of the worker.
    most: returns the most bytes of a message that are of use now. A longer one
      is not received; one of a single part always is.
  """

  def __init__(
    self,
    socket: Socket,
    opening: bytes,
    is_pool: bool,
    sign: ct.Sign,
    verify: Verify,
    worker: str,
    most: Callable[[], float] = lambda: math.inf,
  ):
    self.worker = worker
    self._most = most
    self._sent = self._written = 0  # bytes
    self._socket = socket
    self._session = hashlib.blake2b(opening, digest_size=32).digest()
    self._is_pool = is_pool
    self._sign = sign
    self._verify = verify
    self._numbers = {True: 0, False: 0}  # by whether the pool has sent
    self._loop = asyncio.get_running_loop()
    self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
    self._lock = threading.Lock()
    self._closed = False
    self._over: asyncio.Future[None] = self._loop.create_future()

  def send(self, text: dict[str, ct.Json], data: bytes = b'') -> None:
    """Sends a message; does nothing once the channel is closed."""
    body = messages.pack(text, data)
    with self._lock:  # signed in the order in which they are sent
      if self._closed:
        return
      digest = hashlib.blake2b(body, digest_size=32).digest()
      frame = self._sign(self._text(self._is_pool, digest)) + body
      self._sent += len(frame)
      self._loop.call_soon_threadsafe(self._waiting.put_nowait, frame)

  @property
  def waiting(self) -> int:
    """Bytes of messages that wait for the other side to read."""
    return self._sent - self._written

  def close(self) -> None:
    """Closes the channel, after what was sent before, if it is read soon."""
    with self._lock:
      if not self._closed:
        self._closed = True
        self._loop.call_soon_threadsafe(self._end)

  def _end(self) -> None:
    self._waiting.put_nowait(None)
    self._loop.call_later(_CLOSE_SECONDS, self._cut_off)

  def _cut_off(self) -> None:
    if not self._over.done():
      self._over.set_result(None)

  async def run(self, receive: Receive) -> None:
    """Receives and sends until either side closes the channel.

    Args:
      receive: called with each message, in a thread, one after another.
    """
    writer = asyncio.create_task(self._write())
    try:
      while not (writer.done() or self._over.done()):
        body = await self._body(writer)
        if body is None:
          break
        if body:
          text, data = self._open(body)
          await asyncio.to_thread(receive, self, text, data)
    # A closed socket has no bytes: aiohttp raises TypeError or RuntimeError.
    except (*messages.MALFORMED, RuntimeError, OSError):
      pass
    finally:
      with self._lock:
        self._closed = True
      writer.cancel()
      await asyncio.gather(writer, return_exceptions=True)
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
          await self._socket.close()

  async def _body(self, writer: asyncio.Task[None]) -> bytes | None:
    """Returns the next message, verified; None if there will be none.

    One that is longer than is of use now is read and forgotten: it is empty.

    Raises:
      ValueError: it is not signed, or not the next one.
    """
    signature, parts, size = b'', list[bytes](), 0
    digest, is_kept, is_whole = hashlib.blake2b(digest_size=32), True, False
    while not is_whole:
      part = await self._next(self._socket.receive_bytes(), writer)
      if part is None:
        return None
      traffic.POOLS.add('read', len(part), 0.0, 1)
      is_whole = len(part) < PART_BYTES
      if not size:
        signature, part = part[:_SIGNATURE_BYTES], part[_SIGNATURE_BYTES:]
      size += len(part)
      digest.update(part)
      is_kept = is_kept and (size <= PART_BYTES or size <= self._most())
      if is_kept:
        parts.append(part)
      else:
        parts.clear()
    text = self._text(not self._is_pool, digest.digest())
    if not self._verify(text, signature):
      raise ValueError('a message is not signed, or not the next one')
    return b''.join(parts)

  async def _next(
    self, read: Awaitable[bytes], writer: asyncio.Task[None]
  ) -> bytes | None:
    """Returns the next frame; None if there will be none."""
    reader = asyncio.ensure_future(read)
    try:
      ends = {reader, writer, self._over}
      await asyncio.wait(ends, return_when='FIRST_COMPLETED')
      return reader.result() if reader.done() else None
    finally:
      reader.cancel()

  async def _write(self) -> None:
    while (frame := await self._waiting.get()) is not None:
      for start in range(0, len(frame) + 1, PART_BYTES):
        part = frame[start : start + PART_BYTES]
        await self._socket.send_bytes(part)
        self._written += len(part)
        traffic.POOLS.add('write', len(part), 0.0, 1)

  def _open(self, body: bytes) -> tuple[dict[str, ct.Json], bytes]:
    """Returns the content of a message; raises ValueError if malformed."""
    if self._is_pool and body.find(b'\n', 0, _TEXT_BYTES) < 0:
      raise ValueError(
        f'the text of a message has more than {_TEXT_BYTES} bytes'
      )
    return messages.unpack(body)

  def _text(self, by_pool: bool, digest: bytes) -> bytes:
    """Returns what is signed of the next message of either side."""
    number = self._numbers[by_pool]
    self._numbers[by_pool] += 1
    side = b'pool' if by_pool else b'worker'
    head = b'covenant.pool.channel\n' + self._session + side
    return head + number.to_bytes(8, 'little') + digest
