"""Servers on the loopback that behave as badly as a stranger's bucket can."""

import socket
import threading
import time
from collections.abc import Callable

_PAUSE = 0.2  # seconds between two bytes of a slow answer
_HEADERS = b'HTTP/1.1 200 OK\r\nETag: "x"\r\nLast-Modified: '
_HEADERS += b'Thu, 01 Jan 2026 00:00:00 GMT\r\n'


class HostileServer:
  """One server; use as a context manager.

  Args:
    kind: one of `KINDS`.
  """

  def __init__(self, kind: str):
    self.kind = kind
    self.requests = 0
    self._over = threading.Event()
    self._socket = socket.create_server(('127.0.0.1', 0), backlog=128)
    self.port: int = self._socket.getsockname()[1]

  @property
  def endpoint(self) -> str:
    return f'http://127.0.0.1:{self.port}'

  def __enter__(self) -> 'HostileServer':
    if self.kind == 'refused':
      self._socket.close()  # nobody listens
    elif self.kind != 'silent':  # a silent one never accepts
      threading.Thread(target=self._accept, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._over.set()
    self._socket.close()

  def _accept(self) -> None:
    while not self._over.is_set():
      try:
        client, _ = self._socket.accept()
      except OSError:
        return
      self.requests += 1
      args = (client,)
      threading.Thread(target=self._answer, args=args, daemon=True).start()

  def _answer(self, client: socket.socket) -> None:
    try:
      with client:
        while request := client.recv(1 << 16):
          del request
          _ANSWERS[self.kind](client, self._over)
    except OSError:
      pass  # they have left


def _trickle(client: socket.socket, over: threading.Event) -> None:
  """Sends a byte now and then, for ever: a slow-loris server."""
  client.sendall(_HEADERS + b'Content-Length: 4000\r\n\r\n')
  while not over.is_set():
    client.sendall(b'x')
    time.sleep(_PAUSE)


def _slow_headers(client: socket.socket, over: threading.Event) -> None:
  """Sends headers that never end."""
  client.sendall(_HEADERS)
  while not over.is_set():
    client.sendall(b'X-More: x\r\n')
    time.sleep(_PAUSE)


def _endless(client: socket.socket, over: threading.Event) -> None:
  """Sends a body without an end, as fast as it is read."""
  client.sendall(_HEADERS + b'Transfer-Encoding: chunked\r\n\r\n')
  chunk = b'1000\r\n' + bytes(4096) + b'\r\n'
  while not over.is_set():
    client.sendall(chunk)


def _status(status: str, headers: str = '') -> Callable[..., None]:
  def answer(client: socket.socket, over: threading.Event) -> None:
    del over
    text = f'HTTP/1.1 {status}\r\nContent-Length: 0\r\n{headers}\r\n'
    client.sendall(text.encode())

  return answer


def _nonsense(client: socket.socket, over: threading.Event) -> None:
  del over
  client.sendall(b'\x16\x03\x01 no HTTP at all')
  client.close()


_ANSWERS = {
  'trickle': _trickle,
  'slow headers': _slow_headers,
  'endless': _endless,
  'unavailable': _status('503 Service Unavailable'),
  'busy': _status('429 Too Many Requests'),
  'forbidden': _status('403 Forbidden'),
  'moved': _status('301 Moved', 'Location: http://127.0.0.1:1/\r\n'),
  'nonsense': _nonsense,
}
KINDS = ('refused', 'silent', *_ANSWERS)
