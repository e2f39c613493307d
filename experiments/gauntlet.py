"""Does the Gauntlet hold when 40 % of the miners attack?

  python -m experiments.gauntlet             2.5 hours, 1.5 to 2 minutes a run
  python -m experiments.gauntlet --quick     1 seed, 24 rounds, 10 minutes
  python -m experiments.gauntlet --only=bars,alone,clip,crowd

All runs are of configs/shakespeare.py with 20 uids, at the rates 5e-3 inner
and 0.5 outer, which are stable. Seven miners are honest, five honest and
unlucky, eight adversaries (covenant/adversaries/registry.py); which eight,
depends on the seed, so that three seeds have most of the zoo. `honest alone`
has the first twelve uids on the same data. `plain mean` averages all messages
that can be read; nothing is clipped, compared, evaluated or left out. These
are of three seeds; the row without the Gauntlet, and those of four adversaries
of one kind among 20 uids (30 rounds), of one.

Bars, written before the run:
  loss       with 40 % adversaries the final held-out loss is at most 1 % above
             that of the honest alone, in the mean over the seeds
  emissions  from half of the rounds on (round 30 of 60) adversaries together
             are paid at most 1 % by the chain
  order      from then on every honest uid is paid more than every adversary
  AUC        of the last scores, honest against adversaries, at least 0.99
  bans       no honest uid is ever kept from being heard by a penalty
  crowd      of 256 uids, 20 evaluated: a validator's seconds a round are less
             than 1.5 times those with 64 uids and as many evaluated

An adversary is detected in the first round from which on its weight stays
below a tenth of an equal share. Finished runs are skipped when started again;
rows are written as they come to experiments/results/gauntlet.csv. The figure
is gauntlet.png beside it.
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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib import figure

from covenant import config as config_lib
from covenant.adversaries import registry
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.gauntlet import checks
from covenant.node import validator as validator_lib
from experiments import runner
from experiments import study

ROOT = pathlib.Path(__file__).parent
BASE = str(ROOT.parent / 'configs' / 'shakespeare.py')
UNLUCKY = ('slow', 'joiner', 'missed-one', 'small-batch', 'little-data')
HONEST = 12  # the unlucky among them
MIXES = (
  'noise,scaled,copier,copier-fast,inner-product,colluder,colluder,unassigned',
  'flipped,little,label-flip,copier-hidden,sybil,sybil,sybil,malformed',
  'sleeper,intermittent,backdoor,mixer,repeater,desynchronized,twice,easy',
)
PLAIN = ('optim.aggregation.mean=all', 'optim.aggregation.clip=none')
OFF = ('gauntlet.evaluate=0',)
# name -> who attacks, overrides; '*' is the mix of the seed
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
CROWDS = ((63, 20), (255, 20), (255, 40))  # miners, evaluated
COLUMNS = (
  'cell', 'seed', 'config', 'uids', 'rounds', 'nats_per_byte', 'emissions',
  'least_honest', 'most_adversary', 'auc', 'punished', 'banned', 'detected',
  'undetected', 'evaluated', 'validator_seconds', 'seconds',
)  # fmt: skip
Row = dict[str, Any]
Finding = checks.Finding


class Anything(checks.Checker):
  """Takes all that can be read, whatever its size and whoever made it."""

  def check(self, *args: Any, **kwargs: Any) -> checks.CheckReport:
    report = super().check(*args, **kwargs)
    judged = (Finding.TINY, Finding.HUGE, Finding.COPY, Finding.TWIN)
    found = {
      uid: check._replace(finding=Finding.VALID)
      if check.finding in judged
      else check
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
    BASE,
    [
      'validators=1',
      f'miners={honest + len(names) - len(UNLUCKY)}',
      f'adversaries={",".join(names)}',
      f'seed={seed}',
      f'rounds={rounds}',
      f'optim.inner.warmup_steps={min(50, 2 * rounds)}',
      'optim.inner.learning_rate=5e-3',
      'optim.outer.learning_rate=0.5',
      'gauntlet.evaluate=20',
      'gauntlet.sequences=16',
      *overrides,
    ],
  )
  return dataclasses.replace(config, name=f'gauntlet-{seed}')


def run_cell(
  config: config_lib.Config, plain: bool = False
) -> tuple[Row, dict[str, Any]]:
  """The measurements of one run, and its course over the rounds."""
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
  half, paid, losses = config.rounds // 2, {}, [(0, host.evaluate())]
  for r in range(1, config.rounds + 1):
    host.round()
    if r == half:
      paid = host.chain.earned(host.chain.head())
    if r % 10 == 0 or r == config.rounds:
      losses.append((r, host.evaluate()))
  final = host.chain.earned(host.chain.head())
  pay = {u: final[u] - paid.get(u, 0.0) for u in range(config.miners)}
  total = sum(pay.values()) or 1.0
  honest = [u for u in pay if u not in bad]
  standings = host.validators[0].role.standings.standings
  decisions = [d for v in verdicts for d in v.decisions]
  lost = {
    d['uid']: min(d['after']['penalty'], 1.0)
    for d in sorted(decisions, key=lambda d: -d['after']['penalty'])
    if d['after']['penalty'] < 1 and d['uid'] not in bad
  }
  rounds = {u: detected(verdicts, u, config.miners) for u in sorted(bad)}
  found = [r for r in rounds.values() if r is not None]
  row: Row = dict(
    uids=config.miners,
    rounds=config.rounds,
    nats_per_byte=round(losses[-1][1].nats_per_byte, 5),
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
  trace = {
    'losses': [(r, e.nats_per_byte) for r, e in losses],
    'weights': [v.weights for v in verdicts],
    'pay': pay,
    'detected': rounds,
    'names': registry.names(config),
  }
  return row, trace


class Clock:
  """Counts the seconds that a function takes."""

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
  """The share of (honest, adversary) in which the honest scores more."""
  pairs = [
    (standings[h].score, standings[b].score) for h in honest for b in bad
  ]
  return statistics.mean((a > b) + 0.5 * (a == b) for a, b in pairs)


def detected(
  verdicts: list[validator_lib.Verdict], uid: int, uids: int
) -> int | None:
  """From which round on its weight stays below a tenth of an equal share."""
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
  """The seconds a round of a validator, once everything is compiled."""
  config = config_lib.load(
    BASE,
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
  """Cell, who attacks, overrides, seed and rounds; the most telling first."""
  groups = {
    'bars': (BARS, 3, 60),
    'clip': (CLIPPED, 1, 60),
    'alone': ({'nobody': (',', ()), **ALONE}, 1, 30),
  }
  for group, (members, usual_seeds, usual_rounds) in groups.items():
    if group in only:
      for seed in range(seeds or usual_seeds):
        for cell, (attackers, sets) in members.items():
          yield cell, attackers, sets, seed, rounds or usual_rounds


def report(rows: list[Row]) -> str:
  """The tables, and PASS or FAIL a bar."""
  lines = [
    'cell | n | nats a byte | emissions of adversaries | least honest | '
    'most adversary | AUC | banned | detected | never',
  ]
  for cell in dict.fromkeys(r['cell'] for r in rows):
    of_cell = [r for r in rows if r['cell'] == cell]
    mean = {c: _mean(of_cell, c) for c in COLUMNS[5:]}
    lines.append(
      f'{cell} | {len(of_cell)} | {mean["nats_per_byte"]} | '
      f'{mean["emissions"]} | {mean["least_honest"]} | '
      f'{mean["most_adversary"]} | {mean["auc"]} | {mean["banned"]} | '
      f'{mean["detected"]} | {mean["undetected"]}'
    )
  verdicts = [f'{v.claim}: {v.outcome}, {v.measured}' for v in judge(rows)]
  return '\n'.join([*lines, '', *verdicts])


def _mean(rows: list[Row], column: str) -> str:
  values = [float(r[column]) for r in rows if r.get(column) not in ('', None)]
  return f'{statistics.mean(values):.4g}' if values else '-'


def judge(rows: list[Row]) -> Iterator[study.Verdict]:
  """One verdict a bar; those that were not measured say so."""
  by_cell: dict[str, dict[int, Row]] = {}
  for row in rows:
    by_cell.setdefault(row['cell'], {})[int(row['seed'])] = row
  mixed = by_cell.get('mixed', {})

  def above(cell: str) -> list[float]:
    """The loss of a cell over that of the honest alone, of each seed."""
    alone = by_cell.get('honest alone', {})
    return [
      float(row['nats_per_byte']) / float(alone[seed]['nats_per_byte']) - 1
      for seed, row in by_cell.get(cell, {}).items()
      if seed in alone
    ]

  def of_mixed(column: str) -> list[float]:
    return [float(row[column]) for row in mixed.values()]

  gaps = [
    least - most
    for least, most in zip(
      of_mixed('least_honest'), of_mixed('most_adversary'), strict=True
    )
  ]
  bans = [float(r['banned']) for r in rows if r.get('banned') not in ('', None)]
  times = [
    float(row['validator_seconds'])
    for uids in (255, 63)
    for row in by_cell.get(f'crowd of {uids}, 20', {}).values()
  ]
  crowd = [times[0] / times[1]] if len(times) == 2 else []
  yield _bar(
    'C14, loss',
    'under attack by 40 % the model is as good as with the honest alone',
    'in the mean at most 1 % above',
    above('mixed'), statistics.mean, lambda x: x <= 0.01, '{:+.2%}',
  )  # fmt: skip
  yield _bar(
    'C14, plain mean',
    'a plain mean under the same attack is far worse',
    'in the mean more than 5 % above',
    above('mixed, plain mean'), statistics.mean, lambda x: x > 0.05, '{:+.1%}',
  )  # fmt: skip
  yield _bar(
    'C13, emissions',
    'adversaries together are paid nearly nothing',
    'on every seed at most 1 % from half of the rounds on',
    of_mixed('emissions'), max, lambda x: x <= 0.01, '{:.2%}',
  )  # fmt: skip
  yield _bar(
    'C13, order',
    'every honest uid is paid more than every adversary',
    'on every seed a gap above 0',
    gaps, min, lambda x: x > 0, '{:+.4f}',
  )  # fmt: skip
  yield _bar(
    'C13, AUC',
    'ratings tell the honest from adversaries',
    'on every seed at least 0.99',
    of_mixed('auc'), min, lambda x: x >= 0.99, '{:.4f}',
  )  # fmt: skip
  yield _bar(
    'C13, bans',
    'no honest uid is ever banned',
    'none in any run',
    bans, max, lambda x: x == 0, '{:.0f}',
  )  # fmt: skip
  yield _bar(
    'Crowd',
    'the cost of a validator grows with who is evaluated only',
    '256 uids, 20 evaluated: below 1.5 times that with 64',
    crowd, max, lambda x: x < 1.5, '{:.2f} times',
  )  # fmt: skip


def _bar(
  claim: str,
  says: str,
  criterion: str,
  values: list[float],
  reduce: Callable[[list[float]], float],
  holds: Callable[[float], bool],
  text: str,
) -> study.Verdict:
  """Of a value a seed; undecided if there is none."""
  if not values:
    measured, outcome = 'not measured', 'UNDECIDED'
  else:
    value = reduce(values)
    measured = f'{text.format(value)} (n = {len(values)})'
    outcome = 'PASS' if holds(value) else 'FAIL'
  source = 'Gauntlet, figure 2' if claim[:3] == 'C13' else 'Covenant-72B'
  return study.Verdict(claim, says, source, criterion, measured, outcome)


def draw(traces: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
  """Held-out losses of the bars of seed 0, and the weights of its miners."""
  fig = figure.Figure(figsize=(10, 4), dpi=150, layout='constrained')
  left, right = fig.subplots(1, 2)
  for name, trace in traces.items():
    x, y = zip(*trace['losses'], strict=True)
    left.plot(x, y, label=name, marker='.')
  left.set(xlabel='round', ylabel='held-out loss (nats a byte)')
  if 'honest alone' in traces:
    last = traces['honest alone']['losses'][-1][1]
    left.set_ylim(0.9 * last, 6)
  left.legend(frameon=False)
  if mixed := traces.get('mixed'):
    weights = mixed['weights']
    bad = {int(u): n for u, n in mixed['names'].items() if n not in UNLUCKY}
    uids = sorted({int(u) for w in weights for u in w} | set(bad))
    for uid in uids:
      y = [float(w.get(str(uid), w.get(uid, 0.0))) for w in weights]
      style = (
        dict(color='#D55E00', lw=1.2)
        if uid in bad
        else dict(color='#8C8C8C', lw=0.7)
      )
      label = 'adversaries' if uid == min(bad, default=-1) else None
      label = 'honest' if uid == uids[0] and uid not in bad else label
      right.plot(np.arange(len(y)), y, label=label, **style)
    right.legend(frameon=False)
  right.set(xlabel='round', ylabel='weight')
  fig.savefig(path, metadata={'Software': None})


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--seeds', type=int)
  parser.add_argument('--only', default='bars,clip,alone,crowd')
  parser.add_argument('--workdir', default='runs/gauntlet')
  parser.add_argument('--jobs', type=int, default=os.cpu_count())
  arguments = parser.parse_args()
  only = arguments.only.split(',')
  work = pathlib.Path(arguments.workdir)
  results = ROOT / 'results'
  seeds, rounds = arguments.seeds, None
  if arguments.quick:
    rounds, seeds, results, only = 24, 1, work / 'quick', ['bars', 'crowd']
  work.mkdir(parents=True, exist_ok=True)
  results.mkdir(parents=True, exist_ok=True)
  path = results / 'gauntlet.csv'
  rows: list[Row] = []
  if path.exists():
    with open(path, newline='') as file:
      rows = list(csv.DictReader(file))
  done = {r['config'] for r in rows}

  def write() -> None:
    with open(path, 'w', newline='') as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)

  def add(cell: str, seed: int, name: str, row: Row) -> None:
    row = dict(cell=cell, seed=seed, config=name, **row)
    # A row of the same run by another config is out of date.
    rows[:] = [r for r in rows if (r['cell'], int(r['seed'])) != (cell, seed)]
    rows.append(row)
    write()
    print(json.dumps(row), file=sys.stderr, flush=True)

  traces, wanted = {}, {}
  for cell, attackers, overrides, seed, length in runs(only, seeds, rounds):
    config = make_config(attackers, overrides, seed, length)
    plain = 'no Gauntlet' in cell or 'plain' in cell
    name = f'{study.digest(config)}{"-plain" * plain}'
    wanted[cell, seed, name] = config, plain
  with runner.workers(arguments.jobs) as pool:
    futures = {
      pool.submit(run_cell, *what): key
      for key, what in wanted.items()
      if key[-1] not in done
    }
    for future in concurrent.futures.as_completed(futures):
      (cell, seed, name), (row, trace) = futures[future], future.result()
      (work / f'{name}.json').write_text(json.dumps(trace))
      add(cell, seed, name, row)
  order = {key[:2]: i for i, key in enumerate(wanted)}
  rows.sort(key=lambda r: order.get((r['cell'], int(r['seed'])), len(order)))
  for cell, seed, name in wanted:
    if not seed and cell in BARS and (work / f'{name}.json').exists():
      traces[cell] = json.loads((work / f'{name}.json').read_text())
  for uids, evaluated in CROWDS if 'crowd' in only else ():
    cell = f'crowd of {uids}, {evaluated}'
    if cell not in done:
      add(cell, 0, cell, run_crowd(uids, evaluated, 4))
  write()
  if traces:
    draw(traces, results / 'gauntlet.png')
  print(report(rows))


if __name__ == '__main__':
  main()
