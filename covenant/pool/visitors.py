"""Limits of a pool's visitors: their connections, requests and tokens.

Until a signature is verified, a visitor is known by its network address alone,
and keys cost nothing. So every limit is by address, and the memory of a key can
be forgotten without harm.
"""

import collections
import hashlib
import hmac
import ipaddress
import logging
import math
import secrets
import socket
import threading
import time
from collections.abc import Callable

PER_ADDRESS = 64  # connections of one address at a time
_MOST = 768  # connections at a time; the longest silent one makes room
_LOG_SECONDS = 60.0  # between two records about requests that failed
_SILENT_SECONDS = 10.0  # until a connection must have sent its headers
_REQUESTS, _BURST = 50.0, 500.0  # per address: per second, and at once
_ADDRESSES = 10_000  # addresses whose requests are counted
_KEYS = 10_000  # keys whose numbers are remembered


def group(address: str) -> str:
  """Returns what counts as one address: of IPv6 a /64, which is one customer's.

  >>> group('2001:db8::1'), group('192.0.2.1'), group('::ffff:192.0.2.1')
  ('2001:db8::/64', '192.0.2.1', '192.0.2.1')
  """
  try:
    found = ipaddress.ip_address(address.partition('%')[0])
  except ValueError:
    return address
  if isinstance(found, ipaddress.IPv6Address):
    if found.ipv4_mapped:
      return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
  return str(found)


class Connections:
  """The open connections of a server; used by one thread.

  Args:
    unlimited: addresses without a limit of their own, such as a proxy's.
    clock: returns seconds.
  """

  def __init__(
    self,
    unlimited: frozenset[str] = frozenset(),
    clock: Callable[[], float] = time.monotonic,
  ):
    self._unlimited = unlimited
    self._clock = clock
    self._open: dict[tuple[str, int], tuple[socket.socket, float]] = {}
    self._silent: dict[tuple[str, int], None] = {}  # the oldest first

  def enter(self, connection: socket.socket, peer: tuple[str, int]) -> bool:
    """Admits a connection, unless its address has too many."""
    self._forget_closed()
    address = group(peer[0])
    mine = sum(group(host) == address for host, _ in self._open)
    if mine >= PER_ADDRESS and peer[0] not in self._unlimited:
      return False
    if len(self._open) >= _MOST:
      if not self._silent:
        return False
      self.close(next(iter(self._silent)))
    self._open[peer] = connection, self._clock()
    self._silent[peer] = None
    return True

  def heard(self, peer: tuple[str, int]) -> None:
    """Notes that a connection has sent the headers of a request."""
    self._silent.pop(peer, None)

  def close_silent(self) -> None:
    """Closes the connections that have sent no headers in time."""
    for peer in list(self._silent):
      if self._clock() - self._open[peer][1] < _SILENT_SECONDS:
        break
      self.close(peer)
    self._forget_closed()

  def close(self, peer: tuple[str, int]) -> None:
    """Closes a connection."""
    self._silent.pop(peer, None)
    connection, _ = self._open.pop(peer)
    try:
      connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed already
      pass

  def _forget_closed(self) -> None:
    for peer, (connection, _) in list(self._open.items()):
      if connection.fileno() < 0:
        del self._open[peer]
        self._silent.pop(peer, None)


class Seldom(logging.Filter):
  """Lets one record a minute pass, as strangers may cause any number.

  Args:
    clock: returns seconds.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    super().__init__()
    self._clock, self._next = clock, -math.inf

  def filter(self, record: logging.LogRecord) -> bool:
    """Returns whether a record is written."""
    del record
    if self._clock() < self._next:
      return False
    self._next = self._clock() + _LOG_SECONDS
    return True


LOG = logging.getLogger(__name__)  # of requests that cannot be served
LOG.addFilter(Seldom())


class Requests:
  """The rates of requests, by address; used by one thread."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._left: dict[str, tuple[float, float]] = {}  # requests, since

  def enter(self, address: str) -> bool:
    """Returns whether an address may send one more request now."""
    now, name = self._clock(), group(address)
    left, since = self._left.pop(name, (_BURST, now))
    left = min(left + (now - since) * _REQUESTS, _BURST)
    self._left[name] = max(left - 1.0, 0.0), now  # the newest is the last
    if len(self._left) > _ADDRESSES:
      del self._left[next(iter(self._left))]
    return left >= 1.0


class Tokens:
  """The tokens of workers, and the numbers of their requests.

  A token has the time at which it was issued, by this clock, and a code that
  nobody else can compute. The numbers of the last workers are remembered. A
  worker that was forgotten needs a newer token than any that was forgotten, so
  no request is accepted twice, and flooding a pool with keys costs an honest
  worker no more than one more greeting.

  Args:
    is_known: returns whether a worker's numbers must not be forgotten.
    clock: returns nanoseconds that increase.
  """

  def __init__(
    self,
    is_known: Callable[[str], bool] = lambda worker: False,
    clock: Callable[[], int] = time.monotonic_ns,
  ):
    self._is_known = is_known
    self._clock = clock
    self._secret = secrets.token_bytes(32)
    self._lock = threading.Lock()
    self._last: dict[str, tuple[int, int]] = {}  # issued, number
    self._floor = -1  # newest token of a worker that was forgotten

  def issue(self, worker: str) -> str:
    """Returns a new token for a worker."""
    issued = self._clock()
    return f'{issued:x}.{self._code(worker, issued)}'

  def accept(self, worker: str, token: str, number: int) -> bool:
    """Returns whether a token is this worker's and a number is new."""
    text, _, code = token.partition('.')
    try:
      issued = int(text, 16)
    except ValueError:
      return False
    if not code.isascii() or not 0 <= number < 2**63:
      return False
    if not hmac.compare_digest(code, self._code(worker, issued)):
      return False
    with self._lock:
      last = self._last.pop(worker, (self._floor, 2**63))
      is_new = (issued, number) > last
      self._last[worker] = (issued, number) if is_new else last
      if len(self._last) > _KEYS:
        self._forget()
      return is_new

  def _forget(self) -> None:
    """Forgets the worker that was not heard of for the longest time."""
    for _ in range(len(self._last)):
      worker = next(iter(self._last))
      last = self._last.pop(worker)
      if not self._is_known(worker):
        self._floor = max(self._floor, last[0])
        return
      self._last[worker] = last

  def _code(self, worker: str, issued: int) -> str:
    text = f'{issued:x}\n{worker}'.encode(errors='replace')
    return hmac.new(self._secret, text, hashlib.sha256).hexdigest()


class Shares:
  """Requests that are under way, by key; used by one thread."""

  def __init__(self, most: int):
    self._most = most
    self._now: collections.Counter[str] = collections.Counter()

  def enter(self, name: str) -> bool:
    """Counts one more, unless there are too many; `leave` follows."""
    if self._now[name] >= self._most:
      return False
    self._now[name] += 1
    return True

  def leave(self, name: str) -> None:
    """Counts one less."""
    self._now[name] -= 1
    if not self._now[name]:
      del self._now[name]
