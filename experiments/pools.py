"""Pools of small machines, some of them faulty or cheating.

  python -m experiments.islands             includes these
  python -m experiments.islands --quick     16 workers, 3 rounds, 1 seed

Two miners of one network are pools of 64 workers, whose speeds spread 8:1. In
one of them 30 % of the workers are bad, in all ways of
experiments/pool_workers.py: noise, copies, one step instead of many, zeros, old
parameters, messages scaled by 20, flipped signs, malformed messages; and merely
faulty ones that crash or are late. The other has honest workers only. Both
begin each round at the same parameters; a validator scores both payloads.

Bars, written before the runs:
  payload  Over all rounds of each seed, the bad pool's payload gains as much as
           the honest one's: the mean difference is not below zero by two
           standard errors.
  pay      No cheater is paid a unit. The accounts sum to the earnings, to the
           last unit.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from covenant import files
from covenant.data import dataset
from experiments import emulated_pool
from experiments import pool_workers
from experiments import study

BAD = 0.3


class Row(NamedTuple):
  """A trial. Gains are means over rounds in nats per token; amounts are rao."""

  seed: int
  workers: int
  rounds: int
  gain: float
  honest_gain: float
  error: float  # standard error of the difference
  cheats: int
  paid_cheats: int
  paid_faulty: int
  paid_honest: int
  earned: int
  accounted: int
  seconds: float  # of one core
  code: str


def run(seed: int, workers: int, rounds: int) -> Row:
  began = time.process_time()
  config = study.make_config(study.Cell('pools', seed, ('miners=2',)))
  kit = emulated_pool.Kit(config, dataset.load(config))
  found = emulated_pool.trial(kit, workers, BAD, rounds, seed)

  def paid(*kinds: str) -> int:
    return sum(n for w, n in found.paid.items() if found.kinds[w] in kinds)

  earned = found.totals['earned']
  return Row(
    seed,
    workers,
    rounds,
    round(statistics.mean(found.gains), 6),
    round(statistics.mean(found.honest_gains), 6),
    round(math.hypot(*found.errors) / len(found.errors), 6),
    sum(kind in pool_workers.CHEATS for kind in found.kinds.values()),
    paid(*pool_workers.CHEATS),
    paid(*pool_workers.FAULTY),
    paid('honest'),
    earned,
    sum(found.totals.values()) - earned,
    round(time.process_time() - began, 1),
    study.code(),
  )


def judge(rows: Sequence[Row]) -> Iterator[study.Verdict]:
  if not rows:
    return
  gaps = [(r.gain - r.honest_gain, r.error) for r in rows]
  yield study.Verdict(
    'Pool, payload',
    'a pool of which 30 % are faulty or cheat sends what an honest one sends',
    'ours',
    'on every seed the gain is not lower by two standard errors',
    ', '.join(f'{gap:+.4f} (standard error {error:.4f})' for gap, error in gaps)
    + f' nats per token, of {statistics.mean(r.honest_gain for r in rows):.4f}',
    'PASS' if all(gap > -2 * error for gap, error in gaps) else 'FAIL',
  )
  paid = sum(r.paid_cheats for r in rows)
  exact = all(r.accounted == r.earned for r in rows)
  yield study.Verdict(
    'Pool, pay',
    'cheaters are paid nothing, and the ledger is exact',
    'ours',
    'no unit to a cheater, and sums to the last unit',
    f'{paid} rao to {sum(r.cheats for r in rows)} cheaters, '
    f'{sum(r.paid_honest for r in rows)} to honest workers; the sums are '
    + ('exact' if exact else 'NOT exact'),
    'PASS' if not paid and exact else 'FAIL',
  )


def main(arguments: argparse.Namespace) -> None:
  """Runs the trials that are missing and prints the verdicts."""
  work, results, seeds = pathlib.Path(arguments.workdir), study.RESULTS, 1
  workers, rounds = 16, 3
  if arguments.quick:
    work = results = work / 'quick'
  else:
    workers, rounds, seeds = 64, 12, arguments.seeds
  rows = []
  for seed in range(seeds):
    done = work / f'pools-{workers}-{rounds}-{seed}.json'
    if not done.exists():
      row = run(seed, workers, rounds)
      files.write(done, json.dumps(row._asdict()))
      print(f'pools: seed {seed}, {row}', file=sys.stderr, flush=True)
    rows.append(Row(**json.loads(done.read_text())))
  study.write_csv(results / 'pools.csv', rows)
  study.report(judge(rows))
