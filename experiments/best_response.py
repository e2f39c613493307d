"""Does any strategy of a miner pay more per unit of work than honesty?

  python -m experiments.best_response             80 core minutes
  python -m experiments.best_response --quick     2 runs of 10 rounds, 2 minutes

A search over `strategic.Strategy`: error feedback kept, norm, mask, work done,
repeats of the data, mixing with the others' messages, rounds without work,
batch, learning rate, part of the sequences. A run has ten honest miners and
six strategies at once, 45 rounds of configs/shakespeare.py at the learning
rates of experiments/gauntlet.py, and all are evaluated in every round. The
measure is what the chain's weights give a strategy over what they give the mean
honest miner, per token that it trains on, from round 15 on.

The search begins with the strategies that the registry names and with random
ones; each later generation changes one or two fields of the best so far. The
best three and all named ones then run on five seeds, five strategies at once.
To search another space, add a field to `Strategy` and a draw to `FIELDS`:
generations that are complete stay as they were drawn, before the field was.

Bars, written before the run:
  response   no strategy earns more than 1.05 of honest pay per unit of work, by
             the mean of five seeds less two standard errors
  fairness   the pay of honest miners with equal work over the rounds from 15 on
             has a coefficient of variation of at most 10 %

Rows are written as they come to experiments/results/best_response.csv, the
figure to best_response.png (with --quick: to quick/ in the workdir). Finished
runs are skipped when started again, unless they were paid by another rule; the
column `rule` tells.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import figure

from covenant import config as config_lib
from covenant.adversaries import registry
from covenant.adversaries import strategic
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import validator as validator_lib
from experiments import gauntlet
from experiments import runner
from experiments import study

HONEST, TOGETHER, FINAL, ROUNDS, FROM = 10, 6, 5, 45, 15
GENERATIONS, FINALISTS, SEEDS = 3, 3, 5
FIELDS = {
  'error': (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
  'norm': (0.0, 0.5, 1.0, 2.0, 3.0),
  'mask': (0.2, 0.4, 0.7, 1.0),
  'work': (0.25, 0.5, 0.7, 0.85, 1.0),
  'repeats': (1, 2),
  'mix': (0.0, 0.5, 1.0, 3.0),
  'period': (1, 2, 3),
  'batch': (0.34, 1.0, 3.0),
  'rate': (0.5, 1.0, 2.0),
  'pieces': (1, 2, 4),
  'length': (0.5, 0.75, 1.0),
  'start': (-1.0, 0.0),
}
NAMED = registry.STRATEGIES
Strategy = strategic.Strategy


class Row(NamedTuple):
  """The pay of a strategy in one run."""

  stage: str  # 'generation 0' or 'final'
  strategy: str  # its fields that are not honest ones
  seed: int
  cost: float  # tokens trained on, in those of an honest miner
  pay: float  # over that of the mean honest miner
  per_work: float
  honest_variation: float  # coefficient of variation of honest pay in that run
  nats_per_byte: float
  code: str
  rule: str  # of pay, see `study.rule`


def make_config(
  strategies: Sequence[str], seed: int, rounds: int
) -> config_lib.Config:
  return dataclasses.replace(
    gauntlet.make_config('', (), seed, rounds),
    name='best-response',
    miners=HONEST + len(strategies),
    adversaries=tuple(f'strategy:{text}' for text in strategies),
  )


def run(
  stage: str, strategies: Sequence[str], seed: int, rounds: int
) -> list[Row]:
  """Runs ten honest miners and some strategies; returns a row for each."""
  config = make_config(strategies, seed, rounds)
  host = host_lib.Host(config, dataset.load(config))
  verdicts: list[validator_lib.Verdict] = []
  host.announce = lambda uid, verdict: verdicts.append(verdict)
  for _ in range(rounds):
    host.round()
  first = min(FROM, rounds // 3)
  weights_RxM = np.array(
    [
      [verdict.weights.get(uid, 0.0) for uid in range(config.miners)]
      for verdict in verdicts[first:]
    ]
  )
  paid_M = weights_RxM.mean(0)
  honest = paid_M[:HONEST].mean()
  variation = paid_M[:HONEST].std(ddof=1) / honest
  loss = host.evaluate().nats_per_byte
  costs = [Strategy.parse(text).cost for text in strategies]
  return [
    Row(
      stage, name, seed, round(cost, 3), round(float(pay / honest), 4),
      round(float(pay / honest / cost), 4), round(float(variation), 4),
      round(loss, 4), study.code(), study.rule(),
    )
    for name, cost, pay in zip(strategies, costs, paid_M[HONEST:], strict=True)
  ]  # fmt: skip


def offspring(
  parents: Sequence[Strategy], count: int, draw: np.random.Generator
) -> list[Strategy]:
  """Returns strategies that differ from a parent in one or two fields."""
  found: list[Strategy] = []
  while len(found) < count:
    child = parents[int(draw.integers(len(parents)))]
    for name in draw.choice(list(FIELDS), int(draw.integers(1, 3)), False):
      values = FIELDS[str(name)]
      value = values[int(draw.integers(len(values)))]
      child = child._replace(**{str(name): value})
    if child not in found and child != Strategy():
      found.append(child)
  return found


def mean_of(rows: Sequence[Row]) -> dict[str, list[float]]:
  """Returns the pay per work of every strategy, a number per run."""
  found = collections.defaultdict[str, list[float]](list)
  for row in rows:
    found[row.strategy].append(row.per_work)
  return dict(found)


def best(rows: Sequence[Row], count: int) -> list[str]:
  """Returns the strategies with the largest mean pay per work."""
  means = {s: statistics.mean(x) for s, x in mean_of(rows).items()}
  return sorted(means, key=lambda s: (-means[s], s))[:count]


class Search:
  """The rows so far by the present rule of pay, and the missing runs."""

  def __init__(self, path: pathlib.Path, jobs: int, rounds: int):
    self._path, self._jobs, self._rounds = path, jobs, rounds
    self.rows, self._before = by_rule(
      study.read_csv(path, Row) if path.exists() else []
    )

  def complete(
    self, stage: str, groups: Sequence[tuple[int, list[str]]]
  ) -> None:
    """Does the runs of a stage, (seed, strategies) each, that are missing."""
    done = {(r.stage, r.seed, r.strategy) for r in self.rows}
    missing = [
      (seed, names)
      for seed, names in groups
      if any((stage, seed, name) not in done for name in names)
    ]
    began = time.monotonic()
    with runner.workers(self._jobs) as pool:
      futures = [
        pool.submit(run, stage, names, seed, self._rounds)
        for seed, names in missing
      ]
      for i, future in enumerate(concurrent.futures.as_completed(futures), 1):
        self.rows += future.result()
        study.write_csv(self._path, [*self.rows, *self._before])
        left = (time.monotonic() - began) / i * (len(missing) - i) / 60
        print(
          f'{stage} {i}/{len(missing)}, {left:.0f} min left; best so far: '
          f'{best(self.rows, 1)[0]}',
          file=sys.stderr,
          flush=True,
        )


def search(task: Search, generations: int, seeds: int, groups: int) -> None:
  """Searches, then runs the best and the named strategies on all seeds."""
  wanted = list(map(str, NAMED.values()))
  for generation in range(generations):
    stage, parents = f'generation {generation}', list(NAMED.values())
    if generation:
      # Rows of earlier ones only: a resumed search has later ones.
      known = {f'generation {g}' for g in range(generation)}
      searched = [r for r in task.rows if r.stage in known]
      parents, wanted = [*map(Strategy.parse, best(searched, TOGETHER))], []
    if sum(r.stage == stage for r in task.rows) >= groups * TOGETHER:
      continue
    draw = np.random.default_rng(generation)
    wanted += map(str, offspring(parents, groups * TOGETHER, draw))
    task.complete(
      stage,
      [
        (generation, wanted[i : i + TOGETHER])
        for i in range(0, groups * TOGETHER, TOGETHER)
      ],
    )
  searched = [r for r in task.rows if r.stage != 'final']
  finals = list(
    dict.fromkeys([*best(searched, FINALISTS), *map(str, NAMED.values())])
  )
  task.complete(
    'final',
    [
      (seed, finals[i : i + FINAL])
      for seed in range(seeds)
      for i in range(0, len(finals), FINAL)
    ],
  )


def by_rule(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
  """Returns the rows by the present rule of pay, and those by earlier ones."""
  here = study.rule()
  return (
    [row for row in rows if row.rule == here],
    [row for row in rows if row.rule != here],
  )


def judge(rows: Sequence[Row]) -> list[study.Verdict]:
  """Returns a verdict per bar, from the final runs.

  They are judged by an earlier rule, which is said, if no strategy has run
  twice by the present one.
  """
  present, before = by_rule(rows)
  return _judge(present, '') or _judge(before, ', by an earlier rule')


def _judge(rows: Sequence[Row], note: str) -> list[study.Verdict]:
  """Returns the verdicts from the final runs by one rule of pay."""
  final = [r for r in rows if r.stage == 'final']
  found = {s: study.spread(x) for s, x in mean_of(final).items() if len(x) > 1}
  if not found:
    return []
  worst = max(found, key=lambda s: found[s].mean - 2 * found[s].error)
  lower = found[worst].mean - 2 * found[worst].error
  variation = statistics.mean(r.honest_variation for r in final)
  return [
    study.Verdict(
      'C14, response',
      'no strategy is paid more than 1.05 of honest pay per unit of work',
      'docs/gauntlet.md',
      'mean less two standard errors at most 1.05',
      f'{found[worst].mean:.3f} +- {found[worst].error:.3f} by {worst}{note}',
      'PASS' if lower <= 1.05 else 'FAIL',
    ),
    study.Verdict(
      'C14, fairness',
      'honest miners with equal work are paid alike',
      'docs/gauntlet.md',
      'coefficient of variation at most 10 %',
      f'{variation:.1%}{note}',
      'PASS' if variation <= 0.1 else 'FAIL',
    ),
  ]


def table(rows: Sequence[Row]) -> str:
  """Returns a line per strategy of the final runs, the best paid first."""
  final = [r for r in rows if r.stage == 'final']
  lines = ['| strategy | work | paid | paid per work | runs |',
           '| --- | --- | --- | --- | --- |']  # fmt: skip
  named = {str(s): name for name, s in NAMED.items()}
  for strategy in best(final, len(final)):
    own = [r for r in final if r.strategy == strategy]
    per = [r.per_work for r in own]
    error = statistics.stdev(per) / len(per) ** 0.5 if len(per) > 1 else 0.0
    name = named.get(strategy, '')
    lines.append(
      f'| {f"{name}: " if name else ""}`{strategy}` | {own[0].cost:.2f} | '
      f'{statistics.mean(r.pay for r in own):.2f} | '
      f'{statistics.mean(per):.2f} +- {error:.2f} | {len(own)} |'
    )
  return '\n'.join(lines)


def draw_figure(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Draws pay over work of every strategy that was tried."""
  drawing = figure.Figure(figsize=(7, 4.2), layout='constrained')
  axes = drawing.subplots()
  marks = {'final': ('o', '#0b3d91', 'final')}
  for stage in dict.fromkeys(r.stage for r in rows):
    mark, color, label = marks.get(stage, ('x', '#888888', 'search'))
    own = [r for r in rows if r.stage == stage]
    axes.scatter(
      [r.cost for r in own], [r.pay for r in own], marker=mark, s=22,
      color=color, label=label, alpha=0.7, linewidths=1,
    )  # fmt: skip
  limit = max(r.cost for r in rows) * 1.05
  axes.plot([0, limit], [0, limit], color='black', linewidth=1,
            label='honest pay per unit of work')  # fmt: skip
  axes.plot([0, limit], [0, 1.05 * limit], color='black', linewidth=1,
            linestyle=':', label='bar: 1.05 of it')  # fmt: skip
  axes.set_xlabel('work: tokens, relative to an honest miner')
  axes.set_ylabel('pay, relative to an honest miner')
  handles, labels = axes.get_legend_handles_labels()
  unique = dict(zip(labels, handles, strict=True))
  axes.legend(unique.values(), unique.keys(), frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  drawing.savefig(path, dpi=150)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--seeds', type=int, default=SEEDS)
  parser.add_argument('--generations', type=int, default=GENERATIONS)
  parser.add_argument('--workdir', default='runs/best_response')
  parser.add_argument('--jobs', type=int, default=1)
  arguments = parser.parse_args()
  results, rounds, groups = study.RESULTS, ROUNDS, 3
  seeds, generations = arguments.seeds, arguments.generations
  if arguments.quick:
    results = pathlib.Path(arguments.workdir) / 'quick'
    rounds, groups, seeds, generations = 10, 1, 0, 1
  results.mkdir(parents=True, exist_ok=True)
  task = Search(results / 'best_response.csv', arguments.jobs, rounds)
  search(task, generations, seeds, groups)
  draw_figure(task.rows, results / 'best_response.png')
  print(table(task.rows))
  study.report(judge(task.rows))


if __name__ == '__main__':
  main()
