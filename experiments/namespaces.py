"""Network namespaces on slow links, with an S3 server, for real processes.

Each namespace is joined to a hub. `tc` limits the rate of every link with a
token bucket, and a relay between TUN devices delays it, as not every kernel has
netem. Nothing leaves the machine, and the namespaces go when the program ends.
They need root.
"""

import contextlib
import fcntl
import heapq
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from covenant.emulate import localnet

STORE, PORT = '10.77.255.1', 9000
BUCKET = (
  f's3://run-{{hotkey}}?endpoint=http://{STORE}:{PORT}'
  '&key_id=public&secret=public'
)
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET = 2048  # bytes of the largest packet


class Link(NamedTuple):
  """The link of a namespace to the hub."""

  upload: float  # bits per second
  download: float  # bits per second
  delay: float  # seconds there and back
  burst: int = 8192  # bytes that a token bucket passes at once


def _command(*words: str) -> None:
  subprocess.run(words, check=True, capture_output=True)


class Wires:
  """Namespaces that are joined by a hub with delayed links; a context.

  Args:
    names: of the namespaces besides the hub.
    link: the link of each; None: without limits.
  """

  def __init__(self, names: Sequence[str], link: Link | None):
    own = f'cov{os.getpid()}'
    self.hub = f'{own}-hub'
    self.spaces = {name: f'{own}-{i}' for i, name in enumerate(names)}
    self._link = link
    self._devices: dict[int, int] = {}  # file of a device -> that of its peer
    self._stack = contextlib.ExitStack()
    self._stop, self._wake = os.pipe()

  def __enter__(self) -> 'Wires':
    with contextlib.ExitStack() as stack:
      for space in (self.hub, *self.spaces.values()):
        _command('ip', 'netns', 'add', space)
        stack.callback(_command, 'ip', 'netns', 'del', space)
        _command('ip', '-n', space, 'link', 'set', 'lo', 'up')
      _command('ip', '-n', self.hub, 'addr', 'add', f'{STORE}/32', 'dev', 'lo')
      forward = 'echo 1 > /proc/sys/net/ipv4/ip_forward'
      _command(*self.under('hub'), 'sh', '-c', forward)
      for i, space in enumerate(self.spaces.values()):
        self._join(i, space)
      relay = threading.Thread(target=self._relay, daemon=True)
      relay.start()
      stack.callback(relay.join)
      stack.callback(os.write, self._wake, b'x')
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error: object) -> None:
    self._stack.close()
    for file in (*self._devices, self._stop, self._wake):
      os.close(file)

  def under(self, name: str) -> list[str]:
    """Returns the command that runs another one in a namespace."""
    return ['ip', 'netns', 'exec', self.spaces.get(name, self.hub)]

  def address(self, name: str) -> str:
    """Returns the address of a namespace."""
    return f'10.77.{list(self.spaces).index(name)}.2'

  def _join(self, index: int, space: str) -> None:
    """Joins a namespace to the hub."""
    near, far = f'10.77.{index}.1', f'10.77.{index}.2'
    upload, download = self._link[:2] if self._link else (0.0, 0.0)
    hub = self._tun(self.hub, f'h{index}', near, far, download)
    end = self._tun(space, f'e{index}', far, near, upload)
    _command('ip', '-n', space, 'route', 'add', 'default', 'via', near)
    self._devices |= {hub: end, end: hub}

  def _tun(
    self, space: str, suffix: str, here: str, there: str, rate: float
  ) -> int:
    """Makes a TUN device in a namespace; returns its file."""
    file = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
    name = f'c{os.getpid() % 100_000}{suffix}'
    request = struct.pack('16sH22x', name.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(file, _TUNSETIFF, request)
    _command('ip', 'link', 'set', name, 'netns', space)
    ends = ('addr', 'add', here, 'peer', there, 'dev', name)
    _command('ip', '-n', space, *ends)
    _command('ip', '-n', space, 'link', 'set', name, 'up')
    if self._link:
      burst = f'{self._link.burst}'
      bucket = ('tbf', 'rate', f'{rate:.0f}bit', 'burst', burst)
      queue = ('latency', '500ms')
      root = ('tc', '-n', space, 'qdisc', 'add', 'dev', name, 'root')
      _command(*root, *bucket, *queue)
    return file

  def _relay(self) -> None:
    """Passes packets on, half of the delay later, until told to stop."""
    delay = self._link.delay / 2 if self._link else 0.0
    held: list[tuple[float, int, int, bytes]] = []
    count, files = 0, [self._stop, *self._devices]
    while True:
      now = time.monotonic()
      while held and held[0][0] <= now:
        _, _, file, packet = heapq.heappop(held)
        with contextlib.suppress(OSError):  # the device is down, or full
          os.write(file, packet)
      wait = max(held[0][0] - now, 0.0) if held else None
      for file in select.select(files, [], [], wait)[0]:
        if file == self._stop:
          return
        with contextlib.suppress(OSError):
          packet = os.read(file, _PACKET)
          heapq.heappush(
            held,
            (time.monotonic() + delay, count, self._devices[file], packet),
          )
          count += 1


def serve(buckets: int) -> None:
  """Runs an S3 server with public buckets until its input ends."""
  from moto import server as moto_server

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server = moto_server.ThreadedMotoServer(STORE, port=PORT)
  server.start()
  for i in range(buckets):
    put = urllib.request.Request(f'http://{STORE}:{PORT}/run-{i}', method='PUT')
    urllib.request.urlopen(put).close()
  print('ready', flush=True)
  sys.stdin.read()
  server.stop()


@contextlib.contextmanager
def store(wires: Wires, buckets: int) -> Iterator[None]:
  """Runs the S3 server in the hub."""
  program = [sys.executable, '-m', 'experiments.namespaces', str(buckets)]
  with subprocess.Popen(
    [*wires.under('hub'), *program],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    assert process.stdout is not None
    if b'ready\n' not in iter(process.stdout.readline, b''):
      raise localnet.LocalnetError('the S3 server did not start')
    yield
    process.communicate()


def prepare() -> None:
  """Sets the keys of the store; namespaces go when the program must end."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
  os.environ |= {'AWS_ACCESS_KEY_ID': 'own', 'AWS_SECRET_ACCESS_KEY': 'secret'}


if __name__ == '__main__':
  serve(int(sys.argv[1]))
