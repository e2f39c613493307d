"""Does Gauntlet hold when 40 % of the miners attack?

  python -m experiments.gauntlet             2 core hours, 1 to 2 min per run
  python -m experiments.gauntlet --quick     1 seed, 6 rounds, 2 minutes
  python -m experiments.gauntlet --only=bars,clip,alone,single,crowd
  python -m experiments.gauntlet --only=figure    draws what there is

All runs are of configs/shakespeare.py with 20 uids, at stable learning rates of
5e-3 (inner) and 0.5 (outer), with 24 sequences per evaluation and an error
feedback that forgets in a few rounds, as pay needs it (docs/gauntlet.md). Seven
miners are honest, five honest and unlucky, eight adversaries
(covenant/adversaries/registry.py). The eight depend on the seed, so that five
seeds have all of the zoo but strategies, which are those of
experiments/best_response.py. `honest alone` has the first twelve uids on the
same data. `plain mean` averages all messages that can be read; nothing is
clipped, compared, evaluated or left out. These have five seeds; cells with four
adversaries of one kind among 20 uids (30 rounds), with one among 17, and the
one without Gauntlet have one.

Bars, written before the run:
  loss       with 40 % adversaries the final held-out loss is at most 1 % above
             that of the honest alone, in the mean over the seeds
  emissions  in the second half of the rounds the chain pays all adversaries
             together at most 1 %
  order      in that half every honest uid is paid more than every adversary
  AUC        of the last scores, honest against adversaries, at least 0.995
  bans       a penalty never excludes an honest uid
  crowd      of 256 uids, 20 evaluated: a validator's seconds per round are less
             than 1.5 times those with 64 uids and as many evaluated

An adversary is detected in the first round from which its weight stays below a
tenth of an equal share. Finished runs are skipped when started again; rows are
written as they come to experiments/results/gauntlet.csv, the pay of each uid by
our rule and by the deployed one to gauntlet_pay.csv, and gauntlet.png is drawn
from them (with --quick: in quick/ of the workdir).
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from covenant import config as config_lib
from covenant.adversaries import registry
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.gauntlet import checks
from covenant.node import validator as validator_lib
from experiments import gauntlet_pay
from experiments import gauntlet_report
from experiments import runner
from experiments import study

UNLUCKY = ('slow', 'joiner', 'missed-one', 'small-batch', 'little-data')
HONEST = 12  # the unlucky among them
MIXES = (
  'noise,scaled,copier,copier-fast,inner-product,colluder,colluder,unassigned',
  'flipped,little,label-flip,copier-hidden,sybil,sybil,sybil,malformed',
  'sleeper,intermittent,backdoor,mixer,repeater,desynchronized,twice,easy',
  'zeros,flipped-tenfold,token-killer,copier-exact,copier-previous,replayer,'
  'outdated,absent',
  'tiny,copier-perturbed,shadow,early,late,swapped,intermittent,label-flip',
)
PLAIN = ('optim.aggregation.mean=all', 'optim.aggregation.clip=none')
OFF = ('gauntlet.evaluate=0',)
# Cell -> adversaries, overrides; '*' is the mix of the seed.
BARS = {
  'honest alone': ('', ()),
  'mixed': ('*', ()),
  'mixed, plain mean': ('*', (*PLAIN, *OFF)),
}
CLIPPED = {'mixed, no Gauntlet, median clip': ('*', OFF)}
ALONE = {
  name: (','.join([name] * 4), ())
  for name, kind in registry.ADVERSARIES.items()
  if kind.role == 'miner' and not kind.honest
}
# Single strategies run in experiments/best_response.py, five at once.
SINGLE = {
  f'one {name}': (name, sets)
  for name, (_, sets) in ALONE.items()
  if name not in registry.STRATEGIES
}
CROWDS = ((63, 20), (255, 20), (255, 40))  # miners, evaluated
COLUMNS = (
  'cell', 'seed', 'config', 'code', 'uids', 'rounds', 'nats_per_byte',
  'emissions', 'least_honest', 'most_adversary', 'auc', 'punished', 'banned',
  'detected', 'undetected', 'evaluated', 'validator_seconds', 'seconds', 'rule',
)  # fmt: skip
Row = dict[str, Any]
Finding = checks.CheckFinding


class Anything(checks.Checker):
  """Accepts all messages that can be read, of any size and origin."""

  def check(self, *args: Any, **kwargs: Any) -> checks.CheckReport:
    report = super().check(*args, **kwargs)
    judged = (Finding.TINY, Finding.HUGE, Finding.REPLAY)
    found = {
      uid: check._replace(
        finding=Finding.VALID if check.finding in judged else check.finding,
        origin=None,
      )
      for uid, check in report.checks.items()
    }
    return report._replace(checks=found)


def make_config(
  attackers: str, overrides: tuple[str, ...], seed: int, rounds: int
) -> config_lib.Config:
  mix = MIXES[seed % len(MIXES)] if attackers == '*' else attackers
  names = [*UNLUCKY, *filter(None, mix.split(','))]
  alone = attackers not in ('', '*')
  honest = 16 if alone else HONEST
  config = config_lib.load(
    study.BASE,
    [
      'validators=1',
      f'miners={honest + len(names) - len(UNLUCKY)}',
      f'adversaries={",".join(names)}',
      f'seed={seed}',
      f'rounds={rounds}',
      f'optim.inner.warmup_steps={min(50, 2 * rounds)}',
      'optim.inner.learning_rate=5e-3',
      # A short memory of the error, so that units of work can be counted, takes
      # a larger outer rate.
      'optim.compression.error_decay=0.5',
      'optim.outer.learning_rate=1',
      'gauntlet.evaluate=20',
      'gauntlet.sequences=24',
      *overrides,
    ],
  )
  return dataclasses.replace(config, name=f'gauntlet-{seed}')


def run_cell(
  cell: str, config: config_lib.Config, plain: bool = False
) -> tuple[Row, list[gauntlet_pay.Row]]:
  """Runs a cell; returns its measurements, and the pay of each uid."""
  began = time.process_time()
  host = host_lib.Host(config, dataset.load(config))
  if plain:
    rules = (
      host.shared_model.abstract_params,
      host.shared_model.method.compression,
    )
    host.judge = host.judge._replace(checker=Anything(*rules))
    host.init()
  bad = set(registry.dishonest(config))
  verdicts: list[validator_lib.Verdict] = []
  host.announce = lambda uid, verdict: verdicts.append(verdict)
  clock = Clock()
  host.validators[0].poll = clock.timed(host.validators[0].poll)
  half, paid = config.rounds // 2, {}
  for r in range(1, config.rounds + 1):
    host.round()
    if r == half:
      paid = host.chain.earned(host.chain.head())
  final = host.chain.earned(host.chain.head())
  pay = {u: final[u] - paid.get(u, 0.0) for u in range(config.miners)}
  total = sum(pay.values()) or 1.0
  honest = [u for u in pay if u not in bad]
  standings = host.validators[0].role.standings.standings
  lost = _punished(verdicts, bad)
  rounds = {u: detected(verdicts, u, config.miners) for u in sorted(bad)}
  found = [r for r in rounds.values() if r is not None]
  row = dict(
    uids=config.miners,
    rounds=config.rounds,
    nats_per_byte=round(host.evaluate().nats_per_byte, 5),
    emissions=round(sum(pay[u] for u in bad) / total, 5),
    least_honest=round(min(pay[u] for u in honest) / total, 5),
    most_adversary=round(max((pay[u] for u in bad), default=0) / total, 5),
    auc=round(auc(standings, honest, bad), 4) if bad else '',
    punished=len(lost),
    banned=sum(factor <= 0.25 for factor in lost.values()),
    detected=round(statistics.mean(found), 1) if found else '',
    undetected=len(rounds) - len(found),
    evaluated=config.gauntlet.evaluate,
    validator_seconds=round(clock.seconds / config.rounds, 3),
    seconds=round(time.process_time() - began, 1),  # of one core
  )
  if not config.gauntlet.evaluate:
    return row, []
  return row, gauntlet_pay.rows(cell, config, verdicts)


def _punished(
  verdicts: list[validator_lib.Verdict], bad: set[int]
) -> dict[int, float]:
  """Returns the smallest penalty factor of every honest uid that had one."""
  decisions = [d for v in verdicts for d in v.decisions]
  return {
    d['uid']: min(d['after']['penalty'], 1.0)
    for d in sorted(decisions, key=lambda d: -d['after']['penalty'])
    if d['after']['penalty'] < 1 and d['uid'] not in bad
  }


class Clock:
  """A counter of the seconds that a function takes."""

  def __init__(self):
    self.seconds = 0.0

  def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
      began = time.perf_counter()
      try:
        return function(*args)
      finally:
        self.seconds += time.perf_counter() - began

    return call


def auc(standings: Any, honest: list[int], bad: set[int]) -> float:
  """The share of pairs (honest, adversary) in which the honest scores more."""
  pairs = [
    (standings[h].score, standings[b].score) for h in honest for b in bad
  ]
  return statistics.mean((a > b) + 0.5 * (a == b) for a, b in pairs)


def detected(
  verdicts: list[validator_lib.Verdict], uid: int, uids: int
) -> int | None:
  """The first round from which a weight stays below a tenth of a share."""
  since = None
  for verdict in verdicts:
    share = verdict.weights.get(uid, 0.0) / max(
      sum(verdict.weights.values()), 1e-12
    )
    if share >= 0.1 / uids:
      since = None
    elif since is None:
      since = verdict.round
  return since


def run_crowd(uids: int, evaluated: int, rounds: int) -> Row:
  """Measures a validator's seconds per round, without compilation."""
  config = config_lib.load(
    study.BASE,
    [
      f'miners={uids}', 'validators=1', f'rounds={max(rounds, 4)}',
      'optim.inner_steps=1', 'optim.inner.batch_size=8',
      'optim.inner.warmup_steps=1', 'gauntlet.sequences=8', 'adversaries=',
      f'gauntlet.evaluate={evaluated}',
    ],
  )  # fmt: skip
  host = host_lib.Host(config, dataset.load(config))
  clock, times = Clock(), []
  host.validators[0].poll = clock.timed(host.validators[0].poll)
  for _ in range(rounds):
    clock.seconds = 0.0
    host.round()
    times.append(clock.seconds)
  return dict(
    uids=uids,
    rounds=rounds,
    evaluated=evaluated,
    validator_seconds=round(statistics.median(times[1:]), 3),
  )


def runs(
  only: list[str], seeds: int | None, rounds: int | None
) -> Iterator[tuple[str, str, tuple[str, ...], int, int]]:
  """Yields cell, adversaries, overrides, seed and rounds of every run."""
  groups = {
    'bars': (BARS, len(MIXES), 60),
    'clip': (CLIPPED, 1, 60),
    'alone': ({'nobody': (',', ()), **ALONE}, 1, 30),
    'single': (SINGLE, 1, 30),
  }
  for group, (members, usual_seeds, usual_rounds) in groups.items():
    if group in only:
      for seed in range(seeds or usual_seeds):
        for cell, (attackers, sets) in members.items():
          yield cell, attackers, sets, seed, rounds or usual_rounds


class Table:
  """The rows of gauntlet.csv, written whenever one is added."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.rows: list[Row] = []
    if path.exists():
      with open(path, newline='') as file:
        self.rows = list(csv.DictReader(file))

  @property
  def done(self) -> set[str]:
    """The configs that have a row by the present rule of pay."""
    return {r['config'] for r in self.rows if r['rule'] == study.rule()}

  def add(self, cell: str, seed: int, name: str, row: Row) -> None:
    row = dict(
      cell=cell, seed=seed, config=name, code=study.code(), rule=study.rule(),
      **row,
    )  # fmt: skip
    # A row of the same cell, seed and rule by another config is out of date.
    key = cell, seed, study.rule()
    self.rows = [
      r for r in self.rows if (r['cell'], int(r['seed']), r['rule']) != key
    ]
    self.rows.append(row)
    self.write()
    print(json.dumps(row), file=sys.stderr, flush=True)

  def sort(self, keys: Iterable[tuple[str, int]]) -> None:
    """Puts the rows in the order of (cell, seed); all others come last."""
    order = {key: i for i, key in enumerate(keys)}
    self.rows.sort(
      key=lambda r: order.get((r['cell'], int(r['seed'])), len(order))
    )
    self.write()

  def write(self) -> None:
    with open(self._path, 'w', newline='') as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
      writer.writeheader()
      writer.writerows(self.rows)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--seeds', type=int)
  parser.add_argument('--only', default='bars,clip,alone,single,crowd')
  parser.add_argument('--workdir', default='runs/gauntlet')
  parser.add_argument('--jobs', type=int, default=os.cpu_count())
  return parser.parse_args()


def main() -> None:
  arguments = _arguments()
  only = arguments.only.split(',')
  work = pathlib.Path(arguments.workdir)
  results = study.RESULTS
  seeds, rounds, crowds = arguments.seeds, None, CROWDS
  if arguments.quick:
    rounds, seeds, results, only = 6, 1, work / 'quick', ['bars', 'crowd']
    crowds = CROWDS[:1]
  work.mkdir(parents=True, exist_ok=True)
  results.mkdir(parents=True, exist_ok=True)
  table = Table(results / 'gauntlet.csv')
  pay = gauntlet_pay.Table(results / 'gauntlet_pay.csv')
  done, wanted = table.done, {}
  for cell, attackers, overrides, seed, length in runs(only, seeds, rounds):
    config = make_config(attackers, overrides, seed, length)
    plain = 'no Gauntlet' in cell or 'plain' in cell
    name = f'{study.digest(config)}{"-plain" * plain}'
    wanted[cell, seed, name] = config, plain
  with runner.workers(arguments.jobs) as pool:
    futures = {
      pool.submit(run_cell, key[0], *what): key
      for key, what in wanted.items()
      if key[-1] not in done
    }
    for future in concurrent.futures.as_completed(futures):
      cell, seed, name = futures[future]
      row, paid = future.result()
      table.add(cell, seed, name, row)
      pay.add(paid)
  for uids, evaluated in crowds if 'crowd' in only else ():
    cell = f'crowd of {uids}, {evaluated}'
    if cell not in done:
      table.add(cell, 0, cell, run_crowd(uids, evaluated, 4))
  table.sort((cell, seed) for cell, seed, _ in wanted)
  gauntlet_report.draw(table.rows, results / 'gauntlet.png')
  print(gauntlet_report.tables(table.rows))
  print(gauntlet_report.alone_table(table.rows, pay.rows))


if __name__ == '__main__':
  main()
