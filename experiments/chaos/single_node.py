"""Attacks and faults that one node meets alone.

They are of its files, its clock, its keys, its stores, and the checkpoints that
it reads. Each case counts what was tried and what got through, which has to be
nothing. A case fails as well if what is honest is refused.
"""

import base64
import contextlib
import hashlib
import http.server
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple
from unittest import mock

from covenant import config as config_lib
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as storage_lib
from covenant.pool import client as client_lib
from covenant.pool import server as server_lib
from covenant.pool import server_settings
from covenant.store import backend
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from experiments.chaos import evaluators
from experiments.chaos import oversized
from experiments.chaos import own_files

Config = config_lib.Config
# (config, an empty folder) -> numbers of what was tried, and what got through.
Case = Callable[[Config, pathlib.Path], tuple[int, int]]
_KEY, _OTHER = (keys.Key.from_seed(bytes([n]) * 32) for n in (1, 2))
_PUBLIC = bytes.fromhex(  # of `_KEY`
  '8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c'
)
_RUN = b'r' * 16
_JUMPS = (3600.0, 86400.0, -3600.0, 1e9)  # seconds that a clock is set by
_REDIRECTS = (301, 302, 303, 307, 308)
_SECRET = 'ab12SECRET34cd'
_LETTERS = '123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz'
# Points of order 8; others of small order are computed.
_ORDER_8 = (
  '26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05',
  'c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a',
)


class Outcome(NamedTuple):
  """The result of a case."""

  item: int  # of the review of security
  name: str
  tried: int
  through: int
  wrong: str  # what does not hold; empty: all does

  @property
  def passed(self) -> bool:
    return not self.wrong


def outcomes(config: Config, part: slice = slice(None)) -> Iterator[Outcome]:
  """Runs all cases, or a part of them."""
  for item, name, case in CASES[part]:
    tried = through = 0
    with tempfile.TemporaryDirectory() as folder:
      try:
        tried, through = case(config, pathlib.Path(folder))
        wrong = f'{through} got through' if through else ''
        wrong = wrong or ('' if tried else 'nothing was tried')
      except AssertionError as e:
        wrong = str(e)
    yield Outcome(item, name, tried, through, wrong)


def _clocks_of_chains(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Sets the clock of one of two processes of an embedded chain."""
  path, now = folder / 'chain', time.time()
  rules = storage_lib.ChainRules(block_seconds=12.0, capacity=4)
  tried = wrong = 0
  with contextlib.ExitStack() as stack:
    one = local_chain.LocalChain.create(path, b'', rules, _KEY)
    stack.callback(one.close)
    one.begin(now - 100)
    two = local_chain.LocalChain.open(path, _OTHER)
    stack.callback(two.close)
    for chain in one, two:
      chain.register(chain.hotkey, 1.0, True)
    for seconds in _JUMPS:
      before = two.head()
      with mock.patch('time.time', lambda s=seconds: now + s):
        one.commit(b'jumped')
        one.peers(one.head())
        late = local_chain.LocalChain.open(path)
        stack.callback(late.close)
        heads = [one.head(), late.head()]
      two.commit(b'in time')
      two.peers(two.head())
      tried += 1
      heads.append(two.head())
      # Much less than the smallest jump, 300 blocks.
      wrong += not all(before <= head <= before + 100 for head in heads)
  return tried, wrong


def _clocks_of_pools(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Sets the clocks of a pool and of its workers while they talk."""
  server = server_lib.PoolServer(
    server_settings.ServerSettings('127.0.0.1', 0),
    _OTHER.address,
    _OTHER.sign,
    {'run': _RUN.hex()},
    keys.verify,
    lambda request: 1 << 10,
    lambda request: server_lib.Reply(200, {}, request.body),
  )
  server.start()
  now, tried, refused = time.time(), 0, 0
  with contextlib.closing(server):
    url = f'http://127.0.0.1:{server.port}'
    for seconds in _JUMPS:
      client = client_lib.Client(url, _KEY, _RUN, _OTHER.address)
      with mock.patch('time.time', lambda s=seconds: now + s):
        refused += not _is_answered(client)
      refused += not _is_answered(client)  # the clock is set back
      tried += 2
  return tried, refused


def _is_answered(client: client_lib.Client) -> bool:
  try:
    return client.ask('POST', '/work', b'data')[1] == b'data'
  except client_lib.PoolUnreachableError:
    return False


def _small_orders(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Signs for keys of a small order, for which one signature fits all."""
  p = 2**255 - 19
  points = [bytes.fromhex(x) for x in _ORDER_8]
  points += [y.to_bytes(32, 'little') for y in (0, 1, p - 1, p, p + 1)]
  points += [x[:31] + bytes([x[31] | 128]) for x in points]  # the other x
  identity, accepted = (1).to_bytes(32, 'little'), 0
  for public in points:
    address = _spelled(public)
    accepted += any(
      keys.verify(address, data, some + bytes(32))
      for some in (identity, public)
      for data in (b'data', b'other', b'')
    )
  assert _spelled(_PUBLIC) == _KEY.address, 'addresses are spelled otherwise'
  return len(points), accepted


def _spellings(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Spells an address in other ways: letters, prefixes, spaces, zeros."""
  address, signature = _KEY.address, _KEY.sign(b'data')
  others = {
    address[:at] + letter + address[at + 1 :]
    for at in range(len(address))
    for letter in _LETTERS
  }
  others |= {f'1{address}', f'{address}1', f' {address}', f'{address} '}
  others |= {_spelled(_PUBLIC, prefix) for prefix in (0, 2, 63)}
  others -= {address}
  assert keys.verify(address, b'data', signature), 'an honest key was refused'
  return len(others), sum(
    keys.is_address(other) or keys.verify(other, b'data', signature)
    for other in others
  )


def _spelled(public: bytes, prefix: int = 42) -> str:
  """Returns the SS58 address of a public key."""
  payload = bytes([prefix]) + public
  checksum = hashlib.blake2b(b'SS58PRE' + payload).digest()[:2]
  number, letters = int.from_bytes(payload + checksum, 'big'), []
  while number:
    number, digit = divmod(number, 58)
    letters.append(_LETTERS[digit])
  return ''.join(reversed(letters))


class _Store(http.server.ThreadingHTTPServer):
  """A store that notes requests, and answers each by `answer`."""

  daemon_threads = False

  def __init__(self, status: int = 200, there: str = ''):
    store = self
    self.status, self.there = status, there
    self.seen: list[str] = []  # paths and headers

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self) -> None:  # noqa: N802
        store.seen.append(f'{self.path} {self.headers}')
        self.send_response(store.status)
        if store.there:
          self.send_header('Location', store.there)
        self.send_header('Content-Length', '1')
        self.send_header('ETag', '"1"')
        self.send_header('Last-Modified', 'Thu, 01 Jan 1970 00:00:00 GMT')
        self.end_headers()
        self.wfile.write(b'x')

      def log_message(self, format: str, *args: object) -> None:
        pass

    super().__init__(('127.0.0.1', 0), Handler)

  @contextlib.contextmanager
  def serving(self) -> Generator['_Store']:
    """Yields the store while it serves."""
    thread = threading.Thread(target=self.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield self
    finally:
      self.shutdown()
      thread.join()
      self.server_close()

  def read(self, key: backend.Credentials | None = None) -> bytes:
    """Returns an object as who reads a stranger's bucket gets it."""
    key_id, secret = (key.key_id, key.secret) if key else ('', '')
    location = location_lib.Location(
      's3',
      'abc',
      endpoint=f'http://127.0.0.1:{self.server_port}',
      key_id=key_id,
      secret=secret,
    )
    bucket = bucket_lib.open_for_reading(location, allow_local=True)
    return bucket.get('k', 4)


def _operators_keys(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Reads strangers' buckets in an environment that is full of secrets."""
  secret = base64.b64encode(_SECRET.encode().ljust(32, b'k')[:32]).decode()
  environ = {
    'AWS_SERVER_SIDE_ENCRYPTION': 'sse-c',
    'AWS_SSE_CUSTOMER_KEY_BASE64': secret,
    'AWS_SSE_KMS_KEY_ID': _SECRET,
    'AWS_SECRET_ACCESS_KEY': _SECRET,
    'AWS_ACCESS_KEY_ID': _SECRET,
    'AWS_SESSION_TOKEN': _SECRET,
    'AWS_CONTAINER_AUTHORIZATION_TOKEN': _SECRET,
  }
  with _Store().serving() as store, mock.patch.dict(os.environ, environ):
    for key in None, backend.Credentials('theirs', 'theirs'):
      assert store.read(key) == b'x', 'an honest store was not read'
    words = _SECRET.lower(), secret.lower(), 'customer'
    text = '\n'.join(store.seen).lower()
  return len(environ) * len(store.seen), sum(text.count(x) for x in words)


def _redirects(config: Config, folder: pathlib.Path) -> tuple[int, int]:
  """Lets a store redirect to another host, by each status that can."""
  with _Store().serving() as other, _Store().serving() as store:
    assert store.read() == b'x', 'an honest store was not read'
    store.there = f'http://localhost:{other.server_port}/abc/k'
    for status in _REDIRECTS:
      store.status = status
      with contextlib.suppress(store_lib.StoreError):
        store.read()
    return len(store.seen) - 1, len(other.seen)


CASES: tuple[tuple[int, str, Case], ...] = (
  (7, 'false checkpoints, shown to an evaluator', evaluators.run),
  (9, 'indexes of checkpoints for more memory', oversized.hostile_indexes),
  (9, 'pieces longer or shorter than tensors', oversized.hostile_pieces),
  (21, 'flipped bits of a checkpoint', own_files.rotten_checkpoints),
  (21, 'flipped bits of a sealed file', own_files.rotten_seals),
  (22, 'torn lines in files of JSON lines', own_files.torn_lines),
  (22, 'torn lines in payment orders of a pool', own_files.torn_payouts),
  (22, 'clocks that jump, of a chain on one machine', _clocks_of_chains),
  (22, 'clocks that jump, of a pool and a worker', _clocks_of_pools),
  (22, "an operator's keys, at strangers' stores", _operators_keys),
  (22, 'redirects to another host', _redirects),
  (22, 'secrets, in config.json and report.html', own_files.secrets),
  (22, 'other spellings of one key', _spellings),
  (22, 'keys of a small order', _small_orders),
)
