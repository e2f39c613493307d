"""The HTTP server of a pool, which accepts signed requests of workers.

Workers connect to the pool, so they may sit behind a router. aiohttp serves
them from one thread. A request has the headers of `messages.py`, whose
signature is verified before the body is read, and the body is read only if the
pool awaits it. A reply, which the pool signs, is a line of JSON, then bytes.

Workers may be slow. A connection without progress is closed: one that sends no
headers in ten seconds, and one that passes less than `_LEAST` bytes in half a
minute. Each address and each key has limits (visitors.py).
"""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent import futures
from typing import NamedTuple, TypeVar

from covenant import extras
from covenant import typing as ct
from covenant.pool import channel as channel_lib
from covenant.pool import messages
from covenant.pool import server_settings as settings_lib
from covenant.pool import visitors
from covenant.store import traffic

with extras.needed('pool'):
  from aiohttp import web

_SECONDS = 30.0  # in which a body or a reply must get on
_HANDSHAKE_SECONDS = 10.0
_CLOSE_SECONDS = 1.0  # for the last words on a channel
_LEAST = 1 << 14  # bytes in that time, if so many are left
_PIECE = 1 << 18  # bytes that are written at a time
_PER_KEY = 4  # requests of one key at a time
_LONGEST_PATH = 256
_BACKLOG = 256
_WORKERS = 8  # requests that are answered at the same time

_T = TypeVar('_T')


class Request(NamedTuple):
  """A verified request of a worker; `body` is empty before it is admitted."""

  worker: str
  method: str
  path: str
  body: bytes
  address: str  # network address


class Reply(NamedTuple):
  """A reply: JSON, then bytes, whose digest with the line may be known."""

  status: int
  text: Mapping[str, ct.Json]
  data: bytes = b''


Answer = Callable[[Request], Reply]
# Returns the largest body that is awaited, or a refusal.
Admit = Callable[[Request], int | Reply]
Verify = Callable[[str, bytes, bytes], bool]  # worker, data, signature


class RequestError(Exception):
  """A refused request; args are the HTTP status and the reason."""


class PoolServer:
  """The server of a pool; serves in a thread of its own until `close`.

  Args:
    settings: where it listens.
    pool: ss58 address of the pool's hotkey.
    sign: signs with that hotkey.
    hello: public information.
    verify: returns True if a worker signed some bytes.
    admit: decides on a request before its body is read.
    answer: replies to a verified request; called from many threads.
    is_known: returns whether a worker has proved itself.
    channels: is told of channels and their messages; None: there are none.

  Raises:
    OSError: the address or the certificate cannot be used.
  """

  def __init__(
    self,
    settings: settings_lib.ServerSettings,
    pool: str,
    sign: ct.Sign,
    hello: Mapping[str, ct.Json],
    verify: Verify,
    admit: Admit,
    answer: Answer,
    is_known: Callable[[str], bool] = lambda worker: False,
    channels: channel_lib.Listener | None = None,
  ):
    self._channels = channels
    self._pool = pool
    self._sign = sign
    self._hello = hello
    self._verify = verify
    self._admit = admit
    self._answer = answer
    self._proxies = frozenset(settings.proxies)
    self._connections = visitors.Connections(self._proxies)
    self._requests = visitors.Requests()
    self._tokens = visitors.Tokens(is_known)
    self._keys = visitors.Shares(_PER_KEY)
    # Threads of their own, so that a slow answer delays no channel.
    self._answering = futures.ThreadPoolExecutor(_WORKERS)
    self._last = b'', b'', ''  # data and line of a long reply, their digest
    self._ssl = settings_lib.ssl_context(settings)
    family = socket.AF_INET6 if ':' in settings.host else socket.AF_INET
    self._socket = socket.create_server(
      (settings.host, settings.port), family=family, backlog=_BACKLOG
    )
    self._socket.setblocking(False)
    self.address = self._socket.getsockname()[:2]
    self._loop = asyncio.new_event_loop()
    self._end = asyncio.Event()
    self._thread = threading.Thread(
      target=lambda: self._loop.run_until_complete(self._main()), daemon=True
    )
    self._tasks: set[asyncio.Task[None]] = set()

  @property
  def port(self) -> int:
    return self.address[1]

  def start(self) -> None:
    """Begins to serve."""
    self._thread.start()

  def close(self) -> None:
    """Ends serving; replies that are under way are cut off."""
    if self._thread.is_alive():
      self._loop.call_soon_threadsafe(self._end.set)
      self._thread.join()
    self._socket.close()
    self._loop.close()
    self._answering.shutdown(wait=False, cancel_futures=True)

  async def _main(self) -> None:
    server = web.Server(
      self._serve,
      handler_cancellation=True,
      max_line_size=2 * _LONGEST_PATH,
      max_field_size=4096,
      access_log=None,
      logger=visitors.LOG,
      keepalive_timeout=5.0,
      lingering_time=2.0,
      auto_decompress=False,
    )
    self._spawn(self._accept(server))
    self._spawn(self._sweep())
    await self._end.wait()
    for task in list(self._tasks):
      task.cancel()
    await asyncio.gather(*self._tasks, return_exceptions=True)
    await server.shutdown(_CLOSE_SECONDS)  # of 0 aiohttp makes no limit
    if rest := asyncio.all_tasks() - {asyncio.current_task()}:
      await asyncio.wait(rest, timeout=_CLOSE_SECONDS)

  def _spawn(self, work: Coroutine[None, None, None]) -> None:
    task = self._loop.create_task(work)
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  async def _sweep(self) -> None:
    while True:
      await asyncio.sleep(1.0)
      self._connections.close_silent()

  async def _accept(self, server: web.Server) -> None:
    while True:
      try:
        connection, peer = await self._loop.sock_accept(self._socket)
      except OSError:  # such as out of file descriptors
        self._connections.close_silent()
        await asyncio.sleep(0.1)
        continue
      if not self._connections.enter(connection, peer[:2]):
        connection.close()
        continue
      self._spawn(self._connect(server, connection, peer[:2]))

  async def _connect(
    self, server: web.Server, connection: socket.socket, peer: tuple[str, int]
  ) -> None:
    timeout = _HANDSHAKE_SECONDS if self._ssl else None
    try:
      await self._loop.connect_accepted_socket(
        server, connection, ssl=self._ssl, ssl_handshake_timeout=timeout
      )
    except (OSError, TimeoutError):  # among them the errors of ssl
      connection.close()

  async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
    text, signed = b'', True
    try:
      address = self._visitor(request)
      if request.path == '/hello':
        text, reply = self._greet(request)
      elif request.path == '/channel' and self._channels:
        return await self._open_channel(request, address, self._channels)
      else:
        text, reply = await self._serve_worker(request, address)
    except RequestError as e:
      reply, signed = Reply(e.args[0], {'error': e.args[1]}), False
    return await self._send(request, text, reply, signed)

  def _visitor(self, request: web.BaseRequest) -> str:
    """Returns the address of a request; raises RequestError for too many."""
    peer = request.transport and request.transport.get_extra_info('peername')
    if not peer:
      raise RequestError(400, 'the connection is closed')
    self._connections.heard(peer[:2])
    address = peer[0]
    if address in self._proxies:
      chain = request.headers.get('X-Forwarded-For', '').split(',')
      address = chain[-1].strip() or address
    if not self._requests.enter(address):
      raise RequestError(429, 'too many requests from this address; wait')
    return address

  def _greet(self, request: web.BaseRequest) -> tuple[bytes, Reply]:
    worker = request.headers.get(messages.WORKER, '')[:64]
    nonce = request.query.get('nonce', '')[:128]
    text = {'token': self._tokens.issue(worker), 'pool': self._pool}
    return nonce.encode(), Reply(200, {**self._hello, **text})

  async def _open_channel(
    self,
    request: web.BaseRequest,
    address: str,
    listener: channel_lib.Listener,
  ) -> web.StreamResponse:
    """Serves a channel until it is closed."""
    text, asked, *_ = self._verified(request, address)
    if isinstance(refusal := await self._call(self._admit, asked), Reply):
      raise RequestError(refusal.status, refusal.text.get('error'))
    socket = web.WebSocketResponse(
      heartbeat=channel_lib.HEARTBEAT_SECONDS,
      max_msg_size=2 * channel_lib.PART_BYTES,
      timeout=_CLOSE_SECONDS,
    )
    await socket.prepare(request)
    channel = channel_lib.Channel(
      socket,
      text,
      True,
      self._sign,
      lambda data, by: self._verify(asked.worker, data, by),
      asked.worker,
      lambda: listener.longest(channel),
    )
    try:
      await asyncio.to_thread(listener.open, channel)
      await channel.run(listener.receive)
    finally:
      if request.transport is not None:
        request.transport.abort()  # frees the bytes that were not read
      news = asyncio.to_thread(listener.close, channel)
      await asyncio.shield(news)  # the lost connection cancels what waits
    return socket

  def _verified(
    self, request: web.BaseRequest, address: str
  ) -> tuple[bytes, Request, int, str]:
    """Verifies a request; raises RequestError.

    Returns:
      The signed text, the request without its body, and its length and digest.
    """
    if len(request.raw_path) > _LONGEST_PATH:
      raise RequestError(404, 'unknown path')
    headers = request.headers
    worker = headers.get(messages.WORKER, '')
    token = headers.get(messages.TOKEN, '')
    said = headers.get(messages.DIGEST, '')
    try:
      length = int(headers.get('Content-Length', '0'))
      number = int(headers.get(messages.NUMBER, ''))
      signature = bytes.fromhex(headers.get(messages.SIGNATURE, ''))
      asked = token, request.method, request.raw_path, number, said
      text = messages.request_text(self._pool, *asked)  # has to be UTF-8
    except ValueError:
      raise RequestError(400, 'malformed headers') from None
    if not self._verify(worker, text, signature):
      raise RequestError(401, 'not signed by X-Worker for this pool and token')
    if not self._tokens.accept(worker, token, number):
      raise RequestError(409, 'the token or the number is not new; say hello')
    _, method, path, _, _ = asked
    return text, Request(worker, method, path, b'', address), length, said

  async def _serve_worker(
    self, request: web.BaseRequest, address: str
  ) -> tuple[bytes, Reply]:
    """Verifies a request and answers it; raises RequestError."""
    text, asked, length, said = self._verified(request, address)
    worker = asked.worker
    if not self._keys.enter(worker):
      raise RequestError(429, 'too many requests of this key at a time')
    try:
      admitted = await self._call(self._admit, asked)
      if isinstance(admitted, Reply):
        return text, admitted
      if not 0 <= length <= admitted:
        why = f'expected at most {admitted} bytes, not {length}'
        return text, Reply(413, {'error': why})
      body = await self._read(request, asked, length)
      if messages.digest(body) != said:
        return text, Reply(400, {'error': 'the body is not what was signed'})
      asked = asked._replace(body=body)
      return text, await self._call(self._answer, asked, self._answering)
    finally:
      self._keys.leave(worker)

  async def _call(
    self,
    function: Callable[[Request], _T],
    asked: Request,
    threads: futures.Executor | None = None,
  ) -> _T:
    """Calls a function in a thread, of any if None; a bug costs one request."""
    try:
      return await self._loop.run_in_executor(threads, function, asked)
    except Exception as e:
      raise RequestError(500, f'the pool failed: {type(e).__name__}') from e

  async def _read(
    self, request: web.BaseRequest, asked: Request, length: int
  ) -> bytes:
    """Reads a body, for as long as it makes progress and is awaited."""
    body = bytearray()
    while len(body) < length:
      wanted = min(len(body) + _LEAST, length)
      try:
        async with asyncio.timeout(_SECONDS):
          while len(body) < wanted:
            chunk = await request.content.readany()
            if not chunk:
              raise RequestError(400, 'the body broke off')
            body += chunk
      except TimeoutError:
        raise RequestError(408, 'the body did not come') from None
      if len(body) > length:
        raise RequestError(400, 'the body is longer than Content-Length')
      if len(body) < length and not isinstance(
        await self._call(self._admit, asked), int
      ):
        raise RequestError(410, 'the lease has ended')
    traffic.POOLS.add('read', len(body), 0.0, 1)
    return bytes(body)

  async def _send(
    self, request: web.BaseRequest, text: bytes, reply: Reply, signed: bool
  ) -> web.StreamResponse:
    line = json.dumps(reply.text).encode() + b'\n'
    digest = await self._digest(line, reply.data)
    response = web.StreamResponse(status=reply.status)
    response.content_type = 'application/octet-stream'
    response.content_length = len(line) + len(reply.data)
    response.force_close()
    if signed:
      signature = self._sign(messages.reply_text(text, reply.status, digest))
      response.headers[messages.SIGNATURE] = signature.hex()
    await response.prepare(request)
    await self._write(response, line)
    data = memoryview(reply.data)
    for start in range(0, len(data), _PIECE):
      await self._write(response, data[start : start + _PIECE])
    async with asyncio.timeout(_SECONDS):
      await response.write_eof()
    return response

  async def _digest(self, line: bytes, data: bytes) -> str:
    """Returns the digest of a reply; that of the last long one is kept."""
    if len(data) < _PIECE:
      return messages.digest(line, data)
    if self._last[0] is not data or self._last[1] != line:
      digest = await asyncio.to_thread(messages.digest, line, data)
      self._last = data, line, digest
    return self._last[2]

  async def _write(
    self, response: web.StreamResponse, piece: bytes | memoryview
  ) -> None:
    """Writes a piece; raises TimeoutError if the reader does not get on."""
    async with asyncio.timeout(_SECONDS):
      await response.write(piece)
    traffic.POOLS.add('write', len(piece), 0.0, 1)
