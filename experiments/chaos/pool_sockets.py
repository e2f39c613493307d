"""Attacks on the HTTP server of a pool, with real sockets on the loopback.

An honest worker at one address makes requests while strangers at others do
their worst. A scenario passes if each request is answered, signed, as if nobody
else were there, and the strangers' requests are not.
"""

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.chain import keys
from covenant.pool import client as client_lib
from covenant.pool import messages
from covenant.pool import server as server_lib
from covenant.pool import server_settings

REQUESTS = 20  # of the honest worker
SILENT = 256  # connections that say nothing
_SEED = bytes(31)
_RUN = b'r' * 16
_BODY = 8 << 20  # bytes that nobody asked for
_PAUSE = 0.01  # seconds between the bytes of a slow head
Attack = Callable[['Scene'], int]  # returns how often it struck


class Scene(NamedTuple):
  """A server under attack."""

  port: int
  over: threading.Event
  stack: contextlib.ExitStack

  def connect(self, n: int) -> socket.socket:
    """Opens a connection from one of sixteen other addresses."""
    source = f'127.0.0.{2 + n % 16}', 0
    address = '127.0.0.1', self.port
    link = socket.create_connection(address, 20, source_address=source)
    self.stack.callback(link.close)
    return link


class SocketOutcome(NamedTuple):
  """The result of a scenario."""

  name: str
  struck: int
  answered: int  # of `REQUESTS`
  wrong: str  # what does not hold; empty: all does

  @property
  def passed(self) -> bool:
    return not self.wrong


def silent(scene: Scene) -> int:
  """Opens connections and says nothing."""
  for n in range(SILENT):
    scene.connect(n)
  return SILENT


def slow_heads(scene: Scene) -> int:
  """Sends heads that never end, a byte at a time."""
  links = [scene.connect(n) for n in range(32)]

  def trickle() -> None:
    while not scene.over.wait(_PAUSE):
      for link in links:
        with contextlib.suppress(OSError):  # it was closed
          link.sendall(b'x')

  _start(scene, trickle)
  return len(links)


def bodies(scene: Scene) -> int:
  """Sends bodies that nobody has asked for, as strangers without a lease."""
  return _requests(scene, 16, lambda key, n: _signed(scene, key, n, _BODY))


def forged(scene: Scene) -> int:
  """Sends requests in the honest worker's name, with signatures of others."""
  name = _key(0).address
  return _requests(
    scene,
    64,
    lambda key, n: _signed(scene, key, n, 0) | {messages.WORKER: name},
  )


def throw_away_keys(scene: Scene) -> int:
  """Asks for tokens, each time by a new key."""
  for n in range(200):
    _ask(scene, n, 'GET', '/hello?nonce=1', {messages.WORKER: _key(n).address})
  return 200


def nonsense(scene: Scene) -> int:
  """Sends what is no HTTP."""
  for n in range(64):
    link = scene.connect(n)
    with contextlib.suppress(OSError):
      link.sendall(bytes(range(256)) * 64)
  return 64


ATTACKS: dict[str, Attack] = {
  f'{SILENT} silent connections': silent,
  'heads a byte at a time': slow_heads,
  "strangers' bodies": bodies,
  'forged signatures': forged,
  'throw-away keys': throw_away_keys,
  'nonsense': nonsense,
}


def run(name: str) -> SocketOutcome:
  """Runs a scenario."""
  pool, worker = keys.Key.from_seed(b'p' * 32), _key(0)
  seen: list[server_lib.Request] = []

  def admit(request: server_lib.Request) -> int | server_lib.Reply:
    # As a pool does: only a worker with a lease may send a body.
    known = request.worker == worker.address
    return 1 << 10 if known else server_lib.Reply(403, {'error': 'no lease'})

  def answer(request: server_lib.Request) -> server_lib.Reply:
    seen.append(request)
    return server_lib.Reply(200, {'path': request.path}, request.body)

  settings = server_settings.ServerSettings('127.0.0.1', 0)
  server = server_lib.PoolServer(
    settings,
    pool.address,
    pool.sign,
    {'run': _RUN.hex()},
    keys.verify,
    admit,
    answer,
  )
  server.start()
  answered = struck = 0
  with contextlib.ExitStack() as stack:
    stack.callback(server.close)
    scene = Scene(server.port, threading.Event(), stack)
    stack.callback(scene.over.set)
    struck = ATTACKS[name](scene)
    url = f'http://127.0.0.1:{server.port}'
    client = client_lib.Client(url, worker, _RUN, pool.address)
    for n in range(REQUESTS):
      body = bytes([n]) * 100
      with contextlib.suppress(client_lib.PoolUnreachableError):
        _, data = client.ask('POST', f'/work?{n}', body)
        answered += data == body
  others = sum(request.worker != worker.address for request in seen)
  wrong = ''
  if answered < REQUESTS:
    wrong = f'{answered} of {REQUESTS} requests were answered'
  elif others or len(seen) != REQUESTS:
    wrong = f'{len(seen)} requests were served, {others} of strangers'
  elif not struck:
    wrong = 'nothing bad was done'
  return SocketOutcome(name, struck, answered, wrong)


def impostor() -> SocketOutcome:
  """Runs the scenario of somebody who answers in a pool's place."""
  pool, other = keys.Key.from_seed(b'p' * 32), _key(1)
  struck = answered = 0
  for claimed in pool.address, other.address:
    server = server_lib.PoolServer(
      server_settings.ServerSettings('127.0.0.1', 0),
      claimed,
      other.sign,
      {'run': _RUN.hex()},
      keys.verify,
      lambda request: 1 << 10,
      lambda request: server_lib.Reply(200, {}),
    )
    server.start()
    with contextlib.closing(server):
      url = f'http://127.0.0.1:{server.port}'
      client = client_lib.Client(url, _key(0), _RUN, pool.address)
      struck += 1
      with contextlib.suppress(
        client_lib.PoolUnreachableError, config_lib.ConfigError
      ):
        client.ask('POST', '/work')
        answered += 1
  wrong = f'{answered} impostors were believed' if answered else ''
  return SocketOutcome(
    "replies that the pool's key did not sign", struck, REQUESTS, wrong
  )


def _requests(
  scene: Scene,
  count: int,
  headers: Callable[[keys.Key, int], dict[str, str]],
) -> int:
  """Sends requests of as many keys, and as much of their bodies as is taken."""
  for n in range(count):
    found = headers(_key(100 + n), n)
    text = ''.join(f'{name}: {value}\r\n' for name, value in found.items())
    link = scene.connect(n)
    with contextlib.suppress(OSError):
      link.sendall(f'POST /work HTTP/1.1\r\nHost: x\r\n{text}\r\n'.encode())
      link.settimeout(0.2)
      link.sendall(bytes(int(found['Content-Length'])))
  return count


def _signed(scene: Scene, key: keys.Key, n: int, length: int) -> dict[str, str]:
  """Returns the headers of a request that a stranger signs."""
  pool = keys.Key.from_seed(b'p' * 32).address
  who = {messages.WORKER: key.address}
  answer = _ask(scene, n, 'GET', '/hello?nonce=1', who)
  token = str(messages.unpack(answer)[0]['token'])
  digest = messages.digest(bytes(length))
  text = messages.request_text(pool, token, 'POST', '/work', 1, digest)
  return {
    **who,
    messages.TOKEN: token,
    messages.NUMBER: '1',
    messages.DIGEST: digest,
    messages.SIGNATURE: key.sign(text).hex(),
    'Content-Length': str(length),
  }


def _ask(
  scene: Scene, n: int, method: str, path: str, headers: dict[str, str]
) -> bytes:
  source = f'127.0.0.{2 + n % 16}', 0
  link = http.client.HTTPConnection(
    '127.0.0.1', scene.port, timeout=20, source_address=source
  )
  with contextlib.closing(link):
    link.request(method, path, headers=headers)
    return link.getresponse().read()


def _start(scene: Scene, work: Callable[[], None]) -> None:
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  scene.stack.callback(thread.join)
  scene.stack.callback(scene.over.set)


def _key(n: int) -> keys.Key:
  return keys.Key.from_seed(n.to_bytes(1, 'little') + _SEED)


def outcomes(part: slice = slice(None)) -> Iterator[SocketOutcome]:
  """Runs all scenarios, or a part of the attacks and the impostor."""
  for name in list(ATTACKS)[part]:
    yield run(name)
  yield impostor()
