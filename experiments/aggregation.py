"""The divisor of the mean: the peers that sent an element, or all peers.

  python -m experiments.aggregation             about 10 core minutes
  python -m experiments.aggregation --quick     1 minute

The SparseLoCo paper (arXiv 2508.15706) divides the sum of an element by the
number of peers; its code divides by the number of peers that sent the element,
which with nearly disjoint choices is up to that many times larger. Both get the
best of their outer learning rates on seed 0 (experiments/study.py).

The code of the paper also multiplies the outer learning rate into the error
feedback. Because choosing and quantizing keep proportions, that equals a run at
the square of the rate (tests/experiments_test.py), so it has no cell.

Criteria, written before the runs; n = 3 seeds, compared seed by seed; two
standard errors decide:
  C18 At the best rate of each, the mean over all is at most 0.01 nats worse.
  C18 At the rate of the mean over senders it is more than 0.01 nats worse:
      each needs its own rate.
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import runner
from experiments import study

SENDERS = 'mean over senders'
ALL = 'mean over all'
SAME = 'mean over all, the rate of senders'
OVER_ALL = 'optim.aggregation.mean=all'


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  for seed in range(seeds):
    yield study.Cell(SENDERS, seed)
    yield study.Cell(SAME, seed, (OVER_ALL,))
  yield from study.tuned(runs, ALL, (OVER_ALL,), seeds, (1.4, 2.8, 5.6))


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  gap = study.gap(runs, ALL, SENDERS)
  yield study.Verdict(
    'C18, own rate',
    'either mean is as good as the other',
    'SparseLoCo, paper against code',
    'over all at most 0.01 nats per byte worse',
    str(gap),
    study.at_most(gap, 0.01),
    (ALL, SENDERS),
  )
  gap = study.gap(runs, SAME, SENDERS)
  yield study.Verdict(
    'C18, same rate',
    'the two means need their own rates',
    'SparseLoCo, paper against code',
    'over all more than 0.01 nats worse at the rate of the other',
    str(gap),
    study.more_than(gap, 0.01),
  )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  charts.curves(runs, [SENDERS, ALL, SAME], path)


STUDY = study.Study('aggregation', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
