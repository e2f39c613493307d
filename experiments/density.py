"""The number of values to send, and momentum in the outer step.

  python -m experiments.density             about 50 core minutes
  python -m experiments.density --quick     2 minutes

Cells send k of each 4,096 values, as 32 bits, so that only density differs
(experiments/study.py); all 4,096 with error feedback are plain averaging. The
outer learning rate of every cell is the best of three on seed 0: 0.35, 0.7
and 1, and a third of these with momentum, whose steps add up.

Criteria, written before the runs; n = 3 seeds, compared seed by seed; two
standard errors decide:
  C3  The best density is neither the lowest nor the highest: both ends are
      worse than the best between them.
  C6  Outer Nesterov momentum of 0.5 and 0.9 raises the loss at 1.6 % and
      lowers it at 100 %.
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import runner
from experiments import study

SENT = (16, 64, 256, 1024, 4096)
MOMENTA = (0.5, 0.9)
FLOAT = 'optim.compression.quantizer=none'


def _name(k: int, momentum: float = 0.0) -> str:
  with_it = f', momentum {momentum:g}' if momentum else ''
  return f'{k / 4096:.2%}{with_it}'


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  for k in SENT:
    sets = (FLOAT, f'optim.compression.k={k}')
    yield from study.tuned(runs, _name(k), sets, seeds)
  for k in (64, 4096):
    for momentum in MOMENTA:
      sets = (
        FLOAT,
        f'optim.compression.k={k}',
        f'optim.outer.momentum={momentum}',
      )
      rates = (0.1, 0.25, 0.5)
      yield from study.tuned(runs, _name(k, momentum), sets, seeds, rates)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  between = study.best(runs, [_name(k) for k in SENT[1:-1]])
  for end in (SENT[0], SENT[-1]):
    gap = study.gap(runs, _name(end), between)
    yield study.Verdict(
      f'C3, {_name(end)}',
      f'is worse than the best between, {between}',
      'SparseLoCo, figure 1',
      'loss minus that of the best between above 0',
      str(gap),
      study.more_than(gap),
    )
  for k, hurts in ((64, True), (4096, False)):
    for momentum in MOMENTA:
      gap = study.gap(runs, _name(k, momentum), _name(k))
      yield study.Verdict(
        f'C6, {_name(k, momentum)}',
        f'momentum {"hurts" if hurts else "helps"} at {_name(k)}',
        'SparseLoCo, reviews',
        f'loss minus that without {"above" if hurts else "below"} 0',
        str(gap),
        (study.more_than if hurts else study.at_most)(gap),
      )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  lines = {'no momentum': {100 * k / 4096: _name(k) for k in SENT}} | {
    f'momentum {m:g}': {100 * k / 4096: _name(k, m) for k in (64, 4096)}
    for m in MOMENTA
  }
  charts.ends(runs, lines, path, 'values sent (%)')


STUDY = study.Study('density', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
