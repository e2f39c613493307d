"""Faults of the processes of a soak: deaths, twins and full disks."""

import collections
import contextlib
import errno
import math
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator

from covenant.emulate import localnet
from experiments.chaos import faults

Member = localnet.Member
Sights = list[localnet.Sight]

_DISK_BYTES = 96 << 20  # of a member whose disk gets full
_PREEMPTED = 0.3  # of the deaths are by SIGTERM


class Twins:
  """Second processes of members that run, in the same workdir."""

  def __init__(self, network: localnet.Localnet, folder: pathlib.Path):
    self.refused = 0
    self.without_room = 0
    self.wrong: list[str] = []
    self._network = network
    self._folder = folder
    self._running: dict[Member, subprocess.Popen[bytes]] = {}
    self._count = 0

  def __contains__(self, member: Member) -> bool:
    return member in self._running

  def start(self, member: Member) -> None:
    """Starts a twin of a member that runs."""
    self._count += 1
    with open(self._log(member), 'wb') as log:
      self._running[member] = subprocess.Popen(
        self._network.command(member),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
      )

  def look(self) -> None:
    """Checks the last words of the twins that have ended."""
    for member, twin in [*self._running.items()]:
      if twin.poll() is None:
        continue
      del self._running[member]
      lines = self._log(member).read_text().splitlines()
      said = lines[-1] if lines else ''
      pid = self._network.process(member).pid
      if twin.returncode and f'pid {pid}' in said:
        self.refused += 1
      elif twin.returncode and '  disk: ' in said:
        self.without_room += 1  # it looks at the disk first
      else:
        self.wrong.append(
          f'{member.name}: a twin ended with {twin.returncode}: {said!r}'
        )

  def end(self) -> None:
    """Kills the twins that still run, without a verdict."""
    for twin in self._running.values():
      twin.kill()
      twin.wait()

  def _log(self, member: Member) -> pathlib.Path:
    return self._folder / f'twin-{member.name}.txt'


class Disk:
  """A small file system under the folder of a member, full for some rounds."""

  def __init__(self, folder: pathlib.Path):
    self.is_mounted = False
    self.was_full = False
    self._folder = folder
    self._balloon = folder / 'balloon'

  @contextlib.contextmanager
  def mounted(self) -> Iterator[None]:
    """Mounts it, if this user may."""
    self._folder.mkdir(parents=True, exist_ok=True)
    options = f'size={_DISK_BYTES}'
    command = ['mount', '-t', 'tmpfs', '-o', options, 'soak']
    done = subprocess.run(
      [*command, str(self._folder)], capture_output=True, check=False
    )
    self.is_mounted = not done.returncode
    try:
      yield
    finally:
      if self.is_mounted:
        subprocess.run(['umount', '-l', str(self._folder)], check=False)

  def look(self, completed: int, rounds: tuple[int, int]) -> None:
    """Fills the disk, or makes room, as the rounds say."""
    first, last = rounds
    if self.is_mounted and first <= completed < last:
      self._fill()
      self.was_full = True
    elif self._balloon.exists():
      self._balloon.unlink()

  def _fill(self) -> None:
    """Fills what is left, also of what others have deleted meanwhile."""
    try:
      with open(self._balloon, 'ab', buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
          with contextlib.suppress(OSError):
            while file.write(bytes(size)) == size:
              pass
    except OSError as e:
      if e.errno != errno.ENOSPC:
        raise


class Deaths:
  """Members that are killed, preempted, or queued twice, by chance."""

  def __init__(
    self, network: localnet.Localnet, twins: Twins, mean: float, seed: int
  ):
    self.killed: collections.Counter[str] = collections.Counter()
    self.left: list[float] = []  # seconds from SIGTERM to the end
    self._network = network
    self._twins = twins
    self._mean = mean
    self._seed = seed
    self._draws = 0
    self._next = math.inf
    self._leaving: dict[Member, float] = {}

  def look(self, sights: Sights, completed: int, over: bool) -> None:
    """Does what is due; called twice per second."""
    now = time.monotonic()
    self._twins.look()
    for member, asked in [*self._leaving.items()]:
      process = self._network.process(member)
      if process.poll() is not None:
        del self._leaving[member]
        self.left.append(now - asked)
        if process.returncode == 0 and not is_over(self._status(member)):
          self._network.start(member)
    if over:
      self._next = math.inf
    elif self._next == math.inf and completed:
      self._next = now + self._wait()
    if now < self._next:
      return
    self._next = now + self._wait()
    self._strike(sights, now)

  def _strike(self, sights: Sights, now: float) -> None:
    self._draws += 1
    sight = sights[int(self._lot('who') * len(sights))]
    member, process = sight.member, self._network.process(sight.member)
    if process.poll() is not None or member in self._leaving:
      return
    is_running = sight.status.get('pid') == process.pid
    if member in self._twins:
      return  # the twin must meet the member
    if is_running and self._draws % 4 == 0:
      self._twins.start(member)
    elif is_running and self._lot('how') < _PREEMPTED:
      process.send_signal(signal.SIGTERM)
      self._leaving[member] = now
    else:
      process.send_signal(signal.SIGKILL)
      self.killed[member.role] += 1

  def _status(self, member: Member) -> dict[str, object]:
    return next(s.status for s in self._network.sights() if s.member == member)

  def _wait(self) -> float:
    """Draws an exponential waiting time, in seconds."""
    return -self._mean * math.log(1 - self._lot('when'))

  def _lot(self, what: str) -> float:
    return faults.draw(self._seed, what, self._draws)


def is_over(status: dict[str, object]) -> bool:
  """Returns whether a member has finished the run, by its status."""
  return status.get('phase') == 'finished'
