"""A network of real processes that lives through all that a run meets.

configs/localnet.py runs as processes, and meanwhile

- members die by SIGKILL at random times and are started again;
- members are preempted: SIGTERM, and the queue starts them again;
- a twin of a member is started in its workdir, as a job that is queued twice;
- the rounds of one miner are lost by chance, as its loss is not a number;
- the disk of a miner, and later of a validator, is full for some rounds;
- validators amend the outer learning rate, roll the run back, and extend it.

All members must end with equal roots and parameters, after the last round of
the extension, every amendment in force. Times and victims are a function of the
seed; the effect depends on the machine.
"""

import contextlib
import csv
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant import errors
from covenant import files
from covenant.emulate import localnet
from covenant.emulate import proposals
from covenant.node import base as node_lib
from covenant.node import workdir as workdir_lib
from experiments.chaos import soak_faults

Sights = list[localnet.Sight]

ROOT = pathlib.Path(__file__).parents[2]
_AHEAD = 5  # rounds from a proposal to the round of its amendment
_SECONDS_PER_BLOCK = 0.75
# A member whose disk is full does not start until there is room.
_MOST_FAILURES = 1000
_PROPOSE_SECONDS = 20.0  # between two tries of one proposal


class Story(NamedTuple):
  """The rounds in which something is done to a run of some length."""

  rounds: int  # at the genesis
  amend: int
  miner_disk: tuple[int, int]  # full from, room again
  rollback: int
  validator_disk: tuple[int, int]
  extend: int
  extended: int  # rounds of the run in the end


def story(rounds: int) -> Story:
  """Returns the story of a run that ends after some rounds.

  >>> story(75)
  Story(rounds=68, amend=8, miner_disk=(15, 22), rollback=30, \
validator_disk=(41, 48), extend=49, extended=75)
  """

  def at(share: float) -> int:
    return round(share * rounds)

  return Story(
    at(0.9),
    max(at(0.1), 1),
    (at(0.2), max(at(0.3), at(0.2) + 2)),
    at(0.4),
    (at(0.55), max(at(0.64), at(0.55) + 2)),
    at(0.65),
    rounds,
  )


def get_config(rounds: int) -> config_lib.Config:
  """Returns the config of a soak whose run begins with some rounds."""
  base = config_lib.load(str(ROOT / 'configs' / 'localnet.py'))
  return dataclasses.replace(
    base,
    name='soak',
    rounds=rounds,
    checkpoint=dataclasses.replace(base.checkpoint, keep=4),
    network=dataclasses.replace(base.network, block_seconds=_SECONDS_PER_BLOCK),
  )


class _Operators:
  """The operators of the validators, who amend the run.

  A proposal that is not adopted before its round is made anew.
  """

  def __init__(
    self, config: config_lib.Config, workdir: pathlib.Path, plan: Story
  ):
    self._workdir = workdir
    self._due = [
      (plan.amend, 'optim.outer.learning_rate', lambda done: '0.6'),
      # To a state that all validators have published.
      (plan.rollback, 'restore', lambda done: str(done - 2)),
      (plan.extend, 'rounds', lambda done: str(plan.extended)),
    ]
    path = str(workdir / 'network')
    first = config.miners
    self._configs = [
      dataclasses.replace(
        config,
        network=dataclasses.replace(
          config.network, chain='local', path=path, hotkey=str(uid)
        ),
      )
      for uid in range(first, first + config.validators)
    ]
    self._again = 0.0
    self._last = ''
    self.texts: list[str] = []

  @property
  def is_done(self) -> bool:
    """True if the run has adopted all."""
    return not self._due

  def look(self, completed: int, adopted: Sequence[str]) -> None:
    """Proposes what is due, to all validators, until it is adopted."""
    if not self._due or completed < self._due[0][0]:
      return
    _, field, value = self._due[0]
    if field in adopted:
      print(f'round {completed}: {field} is adopted', flush=True)
      self._due.pop(0)
      return
    now = time.monotonic()
    if now < self._again:
      return
    self._again = now + _PROPOSE_SECONDS + _AHEAD * 32 * _SECONDS_PER_BLOCK
    for config in self._configs:
      self._propose(config, completed + _AHEAD, f'{field}={value(completed)}')

  def _propose(
    self, config: config_lib.Config, round_index: int, edit: str
  ) -> None:
    try:
      text = proposals.run(config, self._workdir, round_index, [edit])
    except errors.CovenantError as e:
      text = f'refused: {e}'
      self._again = time.monotonic() + _PROPOSE_SECONDS
    line = f'{edit} from round {round_index} on: {text.splitlines()[-1]}'
    self.texts.append(line)
    print(line, flush=True)


def run(minutes: float, mean: float, seed: int) -> bool:
  """Runs the soak, and prints what came of it.

  Args:
    minutes: length of the run.
    mean: mean time between deaths, in seconds.
    seed: seed of the draws.

  Returns:
    True if all of the docstring of this module came true.
  """
  length = get_config(1).phases.round_blocks * _SECONDS_PER_BLOCK
  plan = story(max(round(60 * minutes / length), 30))
  config = get_config(plan.rounds)
  workdir = pathlib.Path(tempfile.mkdtemp(prefix='covenant-soak-'))
  print(f'{plan.extended} rounds of {length:g} s, in {workdir}\n{plan}')
  members = localnet.members(config)
  bad, of_validator = members[config.miners - 1], members[-2]
  began = time.monotonic()
  network = localnet.Localnet(
    config,
    workdir,
    {bad: ('-m', 'experiments.chaos.nan_miner')},
    _MOST_FAILURES,
  )
  twins = soak_faults.Twins(network, workdir)
  deaths = soak_faults.Deaths(network, twins, mean, seed)
  operators = _Operators(config, workdir, plan)
  disks = [
    (soak_faults.Disk(network.folder(members[1])), plan.miner_disk),
    (soak_faults.Disk(network.folder(of_validator)), plan.validator_disk),
  ]
  say = _Sayings()

  def look(sights: Sights) -> None:
    completed = max(s.status.get('round') or 0 for s in sights)
    over = any(soak_faults.is_over(s.status) for s in sights)
    say(completed, deaths, twins)
    for disk, rounds in disks:
      disk.look(completed, rounds)
    deaths.look(sights, completed, over)
    operators.look(completed, adopted(network.folder(members[0])))

  with contextlib.ExitStack() as stack:
    for disk, _ in disks:
      stack.enter_context(disk.mounted())
    stack.callback(twins.end)
    outcome = network.run(look)
    found = _Findings.of(outcome, network, plan, deaths, twins)
    wrong = found.wrong(operators, [disk for disk, _ in disks])
    _print_end(outcome, found, workdir / 'evaluator')
  seconds = time.monotonic() - began
  verdict = '; '.join(wrong) if wrong else 'passed'
  print(f'after {seconds / 60:.1f} minutes: {verdict}')
  return not wrong


def adopted(folder: pathlib.Path) -> list[str]:
  """Returns the fields of all amendments that a member knows as adopted."""
  path = folder / workdir_lib.AMENDMENTS
  records = files.read_records(path, 'changes').objects
  return [field for record in records for field in record['changes']]


class _Sayings:
  """A line per ten rounds."""

  def __init__(self):
    self._said = -1

  def __call__(
    self, completed: int, deaths: soak_faults.Deaths, twins: soak_faults.Twins
  ) -> None:
    if completed < self._said + 10:
      return
    self._said = completed
    print(
      f'round {completed}: {sum(deaths.killed.values())} killed, '
      f'{len(deaths.left)} preempted, {twins.refused} twins refused',
      flush=True,
    )


@dataclasses.dataclass
class _Findings:
  """The observations in the folders of the members, and outside of them."""

  outcome: localnet.NetworkOutcome
  plan: Story
  deaths: soak_faults.Deaths
  twins: soak_faults.Twins
  lost_rounds: int
  full: int  # lines about a full disk
  tracebacks: int  # in the logs of members
  without: list[str]  # members that lack an amendment
  events: int
  out_of_sync: int

  @classmethod
  def of(
    cls,
    outcome: localnet.NetworkOutcome,
    network: localnet.Localnet,
    plan: Story,
    deaths: soak_faults.Deaths,
    twins: soak_faults.Twins,
  ) -> '_Findings':
    """Reads the folders of the members, whose disks are still there."""
    events, full, traces, without = [], 0, 0, []
    for sight in outcome.sights:
      folder = network.folder(sight.member)
      events += files.read_records(folder / 'events.jsonl', 'error').objects
      log = (folder / 'log.txt').read_text(errors='replace')
      traces += log.count('Traceback')
      full += log.count('the disk is full') + log.count('No space left')
      if sight.member.uid is None:
        continue  # an evaluator writes no amendments
      lacks = {'optim.outer.learning_rate', 'restore', 'rounds'} - {
        *adopted(folder)
      }
      without += [f'{sight.member.name} ({", ".join(lacks)})'] if lacks else []
    return cls(
      outcome,
      plan,
      deaths,
      twins,
      sum(e.get('what') == node_lib.LOST_ROUND for e in events),
      full,
      traces,
      without,
      len(events),
      sum('OutOfSyncError' in e['error'] for e in events),
    )

  def wrong(
    self, operators: _Operators, disks: Sequence[soak_faults.Disk]
  ) -> list[str]:
    """Returns what did not come true; empty if the soak passes."""
    rounds = {s.status.get('round') for s in self.outcome.sights}
    checks = {
      'not all members finished': self.outcome.finished,
      'roots or parameters are NOT EQUAL': self.outcome.equal,
      f'ended in rounds {sorted(map(str, rounds))}': rounds
      == {self.plan.extended},
      'nobody was killed': bool(self.deaths.killed),
      'nobody was preempted': bool(self.deaths.left),
      'a member printed a traceback': not self.tracebacks,
      'no twin was refused': self.twins.refused > 0,
      f'twins: {self.twins.wrong}': not self.twins.wrong,
      'no round of the miner without numbers was lost': self.lost_rounds > 0,
      'an amendment was not adopted': operators.is_done,
      'a disk was not full (a mount needs root; try unshare -rm)': all(
        disk.was_full for disk in disks
      ),
    }
    return [text for text, is_well in checks.items() if not is_well]


def _print_end(
  outcome: localnet.NetworkOutcome, found: _Findings, evaluator: pathlib.Path
) -> None:
  """Prints the numbers of a soak."""
  for role in 'miner', 'validator', 'evaluator':
    restarts = sum(s.restarts for s in outcome.sights if s.member.role == role)
    print(f'{role}s: killed {found.deaths.killed[role]}, restarted {restarts}')
  left = found.deaths.left
  longest = f'{max(left):.1f}' if left else '-'
  print(f'preempted {len(left)}, gone within {longest} s of SIGTERM')
  twins = found.twins
  print(
    f'twins refused: {twins.refused}, and {twins.without_room} for want of '
    f'room; else: {twins.wrong}'
  )
  print(f'rounds lost to numbers that are none: {found.lost_rounds}')
  print(f'lines about a full disk: {found.full}')
  print(f'members that did not write down an amendment: {found.without}')
  print(f'events: {found.events}, OutOfSyncError in {found.out_of_sync}')
  keys = ('round', 'root', 'fingerprint')
  rows = {tuple(str(s.status.get(k)) for k in keys) for s in outcome.sights}
  for row in sorted(rows):
    print('ended in round {}, root {}, parameters {}'.format(*row))
  with contextlib.suppress(OSError):
    with open(evaluator / 'evaluations.csv', newline='') as file:
      evaluations = list(csv.DictReader(file))
    for row in evaluations[:1] + evaluations[-1:]:
      nats = float(row['nats_per_token'])
      print(f'held-out loss after round {row["round"]}: {nats:.3f} nats')
