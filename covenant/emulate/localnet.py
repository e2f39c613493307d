"""A whole network on one machine: real processes, real time.

The emulator (host.py) runs all nodes in one process and in virtual time; here
each is a process of its own, and they share only a chain and buckets. Localnet
registers them, starts the clock when all are ready, restarts those that die,
and at the end compares what they hold.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import IO, NamedTuple

from covenant import config as config_lib
from covenant import errors
from covenant import files
from covenant import typing as ct
from covenant.chain import local_chain
from covenant.emulate import environment
from covenant.node import connect

_READY_SECONDS = 900.0
_STOP_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_MOST_FAILURES = 5  # of a member, but for deaths by signals
# Of each GPU's memory, for all processes together.
_DEVICE_SHARE = 0.9
_ROOT = pathlib.Path(__file__).resolve().parents[2]


class LocalnetError(errors.CovenantError):
  """The network cannot go on; names the process and the reason."""


class Member(NamedTuple):
  """One process of the network."""

  role: str
  uid: int | None  # None: an evaluator, which has no uid

  @property
  def name(self) -> str:
    return self.role if self.uid is None else f'{self.role}-{self.uid}'


class Sight(NamedTuple):
  """The state of a member, as seen from outside."""

  member: Member
  status: dict[str, ct.Json]  # its status.json
  stake: float
  weight: float  # share of the pay by the validators' weights
  restarts: int


class NetworkOutcome(NamedTuple):
  """The end of a network."""

  sights: list[Sight]
  finished: bool  # False: asked to stop before the last round

  @property
  def equal(self) -> bool:
    """True if all members hold the same history and parameters."""
    held = {
      (s.status.get('round'), s.status.get('root'), s.status.get('fingerprint'))
      for s in self.sights
    }
    return len(held) == 1


def members(config: config_lib.Config) -> list[Member]:
  """Returns the processes of a network: miners, validators, an evaluator."""
  first = config.miners
  last = first + config.validators
  return [
    *(Member('miner', uid) for uid in range(first)),
    *(Member('validator', uid) for uid in range(first, last)),
    Member('evaluator', None),
  ]


def device_share(config: config_lib.Config) -> float:
  """Returns the share of each GPU's memory that one process may take.

  The process that starts the others compiles, and counts as one.
  """
  return config.devices.memory_fraction or _DEVICE_SHARE / (
    len(members(config)) + 1
  )


class Localnet:
  """The processes of one network, in a folder of its own each.

  Args:
    config: the config of the run, whose `network` section is filled in.
    workdir: a folder without a network.
    programs: the arguments to Python of members that run another program than
      that of their role.
    most_failures: the ends with an error after which a member is given up.
    under: returns the command that a member's process is started by, such as
      one that isolates it.
    flags: returns the flags that a member has besides those of its role.

  Raises:
    LocalnetError: the folder holds a network.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: str | os.PathLike[str],
    programs: Mapping[Member, Sequence[str]] = types.MappingProxyType({}),
    most_failures: int = _MOST_FAILURES,
    under: Callable[[Member], Sequence[str]] = lambda member: (),
    flags: Callable[[Member], Sequence[str]] = lambda member: (),
  ):
    self._most_failures = most_failures
    self._programs = programs
    self._under, self._flags = under, flags
    self._workdir = pathlib.Path(workdir).absolute()
    network = dataclasses.replace(
      config.network, chain='local', path=str(self._workdir / 'network')
    )
    self._config = dataclasses.replace(config, network=network)
    path = connect.chain_file(self._config)
    if path.exists():
      raise LocalnetError(
        f'{self._workdir}: expected a folder without a network; a network in '
        'real time cannot be resumed. Choose another --workdir'
      )
    path.parent.mkdir(parents=True, exist_ok=True)
    self.chain = local_chain.LocalChain.create(
      path,
      seed=environment.chain_seed(config),
      rules=environment.rules(self._config),
    )
    environment.register(self.chain, config)
    self._file = self._workdir / 'config.json'
    files.write(self._file, config_lib.to_json(self._config))
    self._file.chmod(0o600)  # its processes need the secrets in it
    self._members = members(config)
    self._processes: dict[Member, subprocess.Popen[bytes]] = {}
    self._restarts = dict.fromkeys(self._members, -1)
    self._failures = dict.fromkeys(self._members, 0)  # ends with an error

  def run(
    self,
    observe: Callable[[list[Sight]], None] = lambda sights: None,
    stop: Callable[[], bool] = lambda: False,
  ) -> NetworkOutcome:
    """Runs the network from its first to its last round.

    Args:
      observe: called with all members twice per second.
      stop: called as often; True ends the network.

    Raises:
      LocalnetError: a process does not start, or dies again and again.
    """
    try:
      for member in self._members:
        self.start(member)
      if self._wait_until_ready(observe, stop):
        self.chain.begin(time.time() + 1.0)
        while not stop() and self._tend():
          observe(self.sights())
          time.sleep(_LOOK_SECONDS)
    finally:
      self._end()
    sights = self.sights()
    observe(sights)
    finished = all(s.status.get('phase') == 'finished' for s in sights)
    return NetworkOutcome(sights, finished)

  def sights(self) -> list[Sight]:
    """Returns the present state of all members."""
    # Reading the newest block would delay the writes of others.
    head = self.chain.head() - 1
    peers = {p.uid: p for p in self.chain.peers(head)} if head >= 0 else {}
    weights = _shares(self.chain.weights())
    return [
      Sight(
        member,
        self._status(member),
        peers[member.uid].stake if member.uid in peers else 0.0,
        weights.get(member.uid, 0.0) if member.uid is not None else 0.0,
        max(self._restarts[member], 0),
      )
      for member in self._members
    ]

  def process(self, member: Member) -> subprocess.Popen[bytes]:
    """Returns the process of a member, for tests that kill it."""
    return self._processes[member]

  def folder(self, member: Member) -> pathlib.Path:
    """Returns the workdir of a member."""
    return self._workdir / member.name

  def _status(self, member: Member) -> dict[str, ct.Json]:
    try:
      return json.loads((self.folder(member) / 'status.json').read_text())
    except FileNotFoundError:
      return {}

  def start(self, member: Member) -> None:
    """Starts a member that does not run, as a supervisor or a queue does."""
    folder = self.folder(member)
    folder.mkdir(exist_ok=True)
    self._restarts[member] += 1
    with open(folder / 'log.txt', 'ab') as log:
      self._processes[member] = self._popen(self.command(member), log)

  def command(self, member: Member) -> list[str]:
    """Returns the command that starts a member."""
    hotkey = member.name if member.uid is None else str(member.uid)
    return [
      *self._under(member),
      sys.executable,
      *self._programs.get(member, _program()),
      f'--role={member.role}',
      f'--config={self._file}',
      f'--config.network.hotkey={hotkey}',
      f'--config.devices.memory_fraction={device_share(self._config):.3f}',
      f'--workdir={self.folder(member)}',
      *self._flags(member),
    ]

  def _popen(
    self, command: list[str], log: IO[bytes]
  ) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      # Ctrl-C reaches the parent only, which stops the members.
      start_new_session=True,
    )

  def _wait_until_ready(
    self,
    observe: Callable[[list[Sight]], None],
    stop: Callable[[], bool],
  ) -> bool:
    """Returns True once all are ready, False if asked to stop before."""
    deadline = time.monotonic() + _READY_SECONDS
    while not stop():
      phases = {m: self._status(m).get('phase') for m in self._members}
      if all(phase is not None for phase in phases.values()):
        return True
      for member, process in self._processes.items():
        if process.poll() is not None:
          raise LocalnetError(
            f'{member.name} ended: {self._last_words(member)}'
          )
      if time.monotonic() > deadline:
        late = [m.name for m, phase in phases.items() if phase is None]
        raise LocalnetError(
          f'not ready after {_READY_SECONDS:.0f} s: {", ".join(late)}; see '
          f'log.txt in their folders in {self._workdir}'
        )
      observe(self.sights())
      time.sleep(_LOOK_SECONDS)
    return False

  def _tend(self) -> bool:
    """Restarts dead processes; returns True while any process runs."""
    for member, process in self._processes.items():
      code = process.poll()
      if code is None or code == 0:
        continue
      self._failures[member] += code > 0
      if self._failures[member] > self._most_failures:
        raise LocalnetError(
          f'{member.name} ended {self._failures[member]} times with an error: '
          f'{self._last_words(member)}'
        )
      self.start(member)
    return any(p.poll() is None for p in self._processes.values())

  def _last_words(self, member: Member) -> str:
    lines = (self.folder(member) / 'log.txt').read_text().splitlines()
    return lines[-1] if lines else 'its log is empty'

  def _end(self) -> None:
    """Asks all processes to stop, and kills those that do not."""
    for process in self._processes.values():
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    for process in self._processes.values():
      try:
        process.wait(max(deadline - time.monotonic(), 0.1))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _program() -> list[str]:
  """Returns the program's arguments to Python, in a checkout or installed."""
  in_checkout = (_ROOT / 'setup.py').is_file()
  return [str(_ROOT / 'run.py')] if in_checkout else ['-m', 'covenant']


def _shares(weights: dict[int, dict[int, int]]) -> dict[int, float]:
  """Returns the mean weight over validators, by uid."""
  shares: dict[int, float] = {}
  for row in weights.values():
    total = sum(row.values())
    for uid, weight in row.items():
      shares[uid] = shares.get(uid, 0.0) + weight / total / len(weights)
  return shares
