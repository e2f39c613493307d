"""Peers that come and go: 12 to 20 of 24, against 16 that stay.

  python -m experiments.churn             about 6 core minutes
  python -m experiments.churn --quick     1 minute

Each of the 24 is away a third of the time, in spells of six rounds, and returns
without moments or error feedback (covenant/adversaries/honest_but_slow.py). At
most 20 count in a round, as in Covenant-72B. A peer has two sequences per step,
so that both cells see about 2.4 million tokens (experiments/study.py).

Criterion, written before the runs; n = 3 seeds, compared seed by seed; two
standard errors decide:
  C11 With churn the loss is at most 0.02 nats per byte higher.
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import runner
from experiments import study

STAY = '16 peers that stay'
CHURN = '24 peers that come and go'
SIZES = ('optim.inner.batch_size=2', 'rounds=75', 'eval.every=5')


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  del runs
  for seed in range(seeds):
    yield study.Cell(STAY, seed, (*SIZES, 'miners=16'))
    names = ','.join(['churner'] * 24)
    sets = (*SIZES, 'miners=24', f'adversaries={names}')
    yield study.Cell(CHURN, seed, sets)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  gap = study.gap(runs, CHURN, STAY)
  yield study.Verdict(
    'C11',
    'peers that come and go cost little',
    'Covenant-72B, figures 4 to 6',
    'at most 0.02 nats over as many that stay',
    str(gap),
    study.at_most(gap, 0.02),
  )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  charts.curves(runs, [STAY, CHURN], path)


STUDY = study.Study('churn', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
