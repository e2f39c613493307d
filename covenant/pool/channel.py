"""A channel between a pool and a worker: signed messages, both ways, in order.

It is a WebSocket on the pool's server, which the worker opens: so it works from
behind a router, and a message takes half a round trip. Each is signed by its
sender, and numbered under the channel, so nobody on the way can change, repeat
or leave out one without the channel being closed.
"""

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

from covenant import typing as ct
from covenant.pool import messages
from covenant.store import traffic

HEARTBEAT_SECONDS = 60.0  # without an answer the other side is gone
_CLOSE_SECONDS = 5.0  # for what was sent before, and for the last words
_SIGNATURE_BYTES = 64
_TEXT_BYTES = 1 << 20  # of the text of a worker's message


class Socket(Protocol):
  """Either end of aiohttp's WebSocket."""

  async def send_bytes(self, data: bytes) -> None: ...

  async def receive_bytes(self) -> bytes: ...

  async def close(self) -> bool: ...


Receive = Callable[['Channel', dict[str, ct.Json], bytes], None]


class Listener(Protocol):
  """What a pool does about its channels; called in threads."""

  def open(self, channel: 'Channel') -> None:
    """Takes a new channel."""

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

  Attributes:
    sent: bytes sent so far.
  """

  def __init__(
    self,
    socket: Socket,
    opening: bytes,
    is_pool: bool,
    sign: ct.Sign,
    verify: Verify,
    worker: str,
  ):
    self.worker = worker
    self.sent = 0
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
      frame = self._sign(self._text(self._is_pool, body)) + body
      self.sent += len(frame)
      self._loop.call_soon_threadsafe(self._waiting.put_nowait, frame)

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
        frame = await self._next(self._socket.receive_bytes(), writer)
        if frame is None:
          break
        traffic.POOLS.add('read', len(frame), 0.0, 1)
        text, data = self._open(frame)
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
      await self._socket.send_bytes(frame)
      traffic.POOLS.add('write', len(frame), 0.0, 1)

  def _open(self, frame: bytes) -> tuple[dict[str, ct.Json], bytes]:
    """Returns the content of a frame; raises ValueError for a false one."""
    signature, body = frame[:_SIGNATURE_BYTES], frame[_SIGNATURE_BYTES:]
    if not self._verify(self._text(not self._is_pool, body), signature):
      raise ValueError('a message is not signed, or not the next one')
    if self._is_pool and body.find(b'\n', 0, _TEXT_BYTES) < 0:
      raise ValueError(
        f'the text of a message has more than {_TEXT_BYTES} bytes'
      )
    return messages.unpack(body)

  def _text(self, by_pool: bool, body: bytes) -> bytes:
    """Returns what is signed of the next message of either side."""
    number = self._numbers[by_pool]
    self._numbers[by_pool] += 1
    side = b'pool' if by_pool else b'worker'
    digest = hashlib.blake2b(body, digest_size=32).digest()
    head = b'covenant.pool.channel\n' + self._session + side
    return head + number.to_bytes(8, 'little') + digest
