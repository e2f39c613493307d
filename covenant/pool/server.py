"""The HTTP server of a pool, which accepts signed requests of workers.

Workers connect to the pool, so they may sit behind a router. A request is

  METHOD path, with the headers
    X-Worker      ss58 address of the worker
    X-Number      above that of the worker's last request in this session
    X-Digest      blake2b-256 of the body, in hexadecimal
    X-Signature   by the worker, over session, method, path, number and digest

so that it is valid for one pool and one session, once. The signature is
verified before the body is read, and each path limits the size of its body.
A reply is a line of JSON, followed by bytes if there are any.
"""

import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from covenant import typing as ct

_SECONDS = 30.0  # timeout without progress
_BODY_SECONDS = 600.0  # timeout of a whole body
_MOST_AT_ONCE = 256  # concurrent connections; more are closed
_MOST_WORKERS = 100_000  # workers whose request numbers are kept
_LONGEST_PATH = 256

_Connection = socket.socket | tuple[bytes, socket.socket]


class Request(NamedTuple):
  """A verified request of a worker."""

  worker: str
  method: str
  path: str
  body: bytes


class Reply(NamedTuple):
  """A reply: JSON, then bytes."""

  status: int
  text: Mapping[str, ct.Json]
  data: bytes = b''


Answer = Callable[[Request], Reply]
Verify = Callable[[str, bytes, bytes], bool]  # worker, data, signature


def digest(body: bytes) -> str:
  return hashlib.blake2b(body, digest_size=32).hexdigest()


def signed_text(
  session: str, method: str, path: str, number: int, body_digest: str
) -> bytes:
  """Returns the bytes of a request that its worker signs."""
  parts = 'covenant.pool', session, method, path, str(number), body_digest
  return '\n'.join(parts).encode()


def unpack(data: bytes) -> tuple[dict[str, ct.Json], bytes]:
  """Splits a reply into JSON and bytes; raises ValueError if malformed."""
  line, _, rest = data.partition(b'\n')
  text = json.loads(line)
  if not isinstance(text, dict):
    raise ValueError('expected a JSON object')
  return text, rest


class PoolServer(http.server.ThreadingHTTPServer):
  """The server of a pool; run `serve_forever` in a thread of its own.

  Args:
    address: host and port; port 0 is any free one.
    session: the id of this start, public.
    hello: returns further public information.
    verify: returns True if a worker signed some bytes.
    answer: replies to a verified request; called from many threads.
    longest: the largest body in bytes, by path.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(
    self,
    address: tuple[str, int],
    session: str,
    hello: Callable[[], Mapping[str, ct.Json]],
    verify: Verify,
    answer: Answer,
    longest: Mapping[str, int],
  ):
    self.session = session
    self.hello = hello
    self.verify = verify
    self.answer = answer
    self.longest = longest
    self._free = threading.BoundedSemaphore(_MOST_AT_ONCE)
    self._lock = threading.Lock()
    self._numbers: dict[str, int] = {}
    super().__init__(address, _Handler)

  @property
  def port(self) -> int:
    return self.server_address[1]

  def is_new(self, worker: str, number: int) -> bool:
    """Returns True if a number exceeds all previous ones of a worker."""
    with self._lock:
      known = self._numbers.get(worker, -1)
      if number <= known or (known < 0 and len(self._numbers) >= _MOST_WORKERS):
        return False
      self._numbers[worker] = number
      return True

  def process_request(
    self, request: _Connection, client_address: object
  ) -> None:
    """Handles a request in a thread, or closes it if too many are busy."""
    if not self._free.acquire(blocking=False):
      self.shutdown_request(request)
      return
    super().process_request(request, client_address)

  def process_request_thread(
    self, request: _Connection, client_address: object
  ) -> None:
    try:
      super().process_request_thread(request, client_address)
    finally:
      self._free.release()

  def handle_error(self, request: _Connection, client_address: object) -> None:
    """Ignores clients that hung up; failures of ours are replied as 500."""


class _RequestError(Exception):
  """A refused request; args are the HTTP status and the reason."""


class _Handler(http.server.BaseHTTPRequestHandler):
  """The handler of one connection with one request."""

  timeout = _SECONDS

  @property
  def _server(self) -> PoolServer:
    assert isinstance(self.server, PoolServer)
    return self.server

  def do_GET(self) -> None:  # noqa: N802
    self._serve()

  def do_POST(self) -> None:  # noqa: N802
    self._serve()

  def log_message(self, format: str, *args: object) -> None:
    """Logs nothing, since strangers control the text."""

  def _serve(self) -> None:
    self.close_connection = True
    try:
      if self.path == '/hello':
        text = {'session': self._server.session, **self._server.hello()}
        reply = Reply(200, text)
      else:
        reply = self._server.answer(self._request())
    except _RequestError as e:
      status, why = e.args
      reply = Reply(status, {'error': why})
    except Exception as e:  # one failing request must not end the server
      reply = Reply(500, {'error': f'the pool failed: {type(e).__name__}'})
    line = json.dumps(reply.text).encode() + b'\n'
    self.send_response(reply.status)
    self.send_header('Content-Type', 'application/octet-stream')
    self.send_header('Content-Length', str(len(line) + len(reply.data)))
    self.end_headers()
    self.wfile.write(line)
    self.wfile.write(reply.data)

  def _request(self) -> Request:
    """Reads and verifies the request; raises `_RequestError`."""
    longest = self._server.longest.get(self.path.partition('?')[0])
    if longest is None or len(self.path) > _LONGEST_PATH:
      raise _RequestError(404, 'unknown path')
    worker = self.headers.get('X-Worker', '')
    said = self.headers.get('X-Digest', '')
    try:
      length = int(self.headers.get('Content-Length', '0'))
      number = int(self.headers.get('X-Number', ''))
      signature = bytes.fromhex(self.headers.get('X-Signature', ''))
    except ValueError:
      raise _RequestError(400, 'malformed headers') from None
    if not 0 <= length <= longest:
      raise _RequestError(
        413, f'expected at most {longest} bytes, not {length}'
      )
    text = signed_text(
      self._server.session, self.command, self.path, number, said
    )
    if not self._server.verify(worker, text, signature):
      raise _RequestError(401, 'not signed by X-Worker for this session')
    if not 0 <= number < 2**63 or not self._server.is_new(worker, number):
      raise _RequestError(409, 'this number has been used; count up')
    body = self._body(length)
    if digest(body) != said:
      raise _RequestError(400, 'the body is not the one that was signed')
    return Request(worker, self.command, self.path, body)

  def _body(self, length: int) -> bytes:
    deadline, chunks = time.monotonic() + _BODY_SECONDS, []
    while length:
      chunk = self.rfile.read1(min(length, 1 << 20))
      if not chunk or time.monotonic() > deadline:
        raise _RequestError(408, 'the body did not come')
      chunks.append(chunk)
      length -= len(chunk)
    return b''.join(chunks)
