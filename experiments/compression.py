"""Losses by compression: the choice of values, their bits, error feedback.

  python -m experiments.compression             about 45 core minutes
  python -m experiments.compression --quick     2 minutes

All cells send k = 64 of 4,096 values (experiments/study.py), at the learning
rates that experiments/methods.py found for the default: one bit per value and a
scale per block. Cells without error feedback and with random values have outer
rates of their own, because they move less.

Error feedback turned out to matter little in 100 rounds of 64 values. A
follow-up, written after that, sends 16 of 4,096, with and without it. Another,
written after experiments/recipe_parts.py, forgets the error in a few rounds, as
pay needs it (docs/gauntlet.md): decays of 0.8 and 0.5 for the default of 0.95.

Criteria, written before the runs; n = 3 seeds, compared seed by seed; two
standard errors decide:
  C2  Without error feedback the loss is more than 0.05 nats higher; the
      follow-ups have the same criterion.
  C4  Two bits with a codebook cost at most 0.01 nats over 32; two bits on a
      line, and two bits without error feedback, cost more than that.
  C5  One bit costs at most 0.01 nats over two bits with a codebook.
  C7  Random values are more than 0.05 nats worse than the largest.
  Decay  A shorter memory is not worse: the 90 % interval of the loss is at most
      0.5 % above that of the default (experiments/equivalence.py).
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import equivalence
from experiments import runner
from experiments import study

ONE_BIT = 'one bit per value'
FLOAT = '32 bits'
CODEBOOK = 'two bits, codebook'
LINE = 'two bits, on a line'
TENSOR = 'one bit, a scale per tensor'
RANDOM = 'one bit, at random'
FORGETS = 'one bit, no error feedback'
FORGETS_TWO = 'two bits, no error feedback'
SHORT = 'one bit, error decay 0.8'
SHORTER = 'one bit, error decay 0.5'
FEW = 'one bit, a quarter of the values'
FORGETS_FEW = 'one bit, a quarter of the values, no error feedback'
AS_FOUND = {
  ONE_BIT: (),
  FLOAT: ('optim.compression.quantizer=none',),
  CODEBOOK: ('optim.compression.quantizer=statistical',),
  LINE: ('optim.compression.quantizer=linear',),
  TENSOR: ('optim.compression.quantizer=sign-tensor',),
}
SWEPT = {
  FORGETS: ('optim.compression.error_decay=0',),
  FORGETS_TWO: (
    'optim.compression.error_decay=0',
    'optim.compression.quantizer=statistical',
  ),
  SHORT: ('optim.compression.error_decay=0.8',),
  SHORTER: ('optim.compression.error_decay=0.5',),
  RANDOM: ('optim.compression.kind=randomk',),
  FEW: ('optim.compression.k=16',),
  FORGETS_FEW: ('optim.compression.k=16', 'optim.compression.error_decay=0'),
}


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  for seed in range(seeds):
    for name, sets in AS_FOUND.items():
      yield study.Cell(name, seed, sets)
  for name, sets in SWEPT.items():
    yield from study.tuned(runs, name, sets, seeds, (0.7, 1.0, 2.0))


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  for name, without, cell in (
    ('C2', FORGETS, ONE_BIT),
    ('C2, a quarter of the values', FORGETS_FEW, FEW),
    ('C2, error decay 0.8', FORGETS, SHORT),
  ):
    gap = study.gap(runs, without, cell)
    yield study.Verdict(
      name,
      'error feedback is essential',
      'SparseLoCo, abstract',
      'without it more than 0.05 nats higher',
      str(gap),
      study.more_than(gap, 0.05),
      (without, cell),
    )
  margin = equivalence.margin(runs, ONE_BIT)
  for cell in (SHORT, SHORTER):
    gap = study.gap(runs, cell, ONE_BIT)
    yield study.Verdict(
      f'Decay, {cell.removeprefix("one bit, error decay ")}',
      'error feedback that forgets in a few rounds is not worse',
      'ours',
      '90 % interval of the loss at most 0.5 % above that at 0.95',
      equivalence.describe(gap, margin / equivalence.MARGIN),
      equivalence.not_worse(gap, margin),
      (cell, ONE_BIT),
    )
  for cell, free in ((CODEBOOK, True), (LINE, False), (FORGETS_TWO, False)):
    gap = study.gap(runs, cell, FLOAT)
    yield study.Verdict(
      f'C4, {cell}',
      'is free' if free else 'is not free',
      'SparseLoCo, abstract; MuLoCo; Decoupled DiLoCo',
      f'{"at most" if free else "more than"} 0.01 nats over 32 bits',
      str(gap),
      (study.at_most if free else study.more_than)(gap, 0.01),
      (cell, FLOAT),
    )
  for cell in (ONE_BIT, TENSOR):
    gap = study.gap(runs, cell, CODEBOOK)
    yield study.Verdict(
      f'C5, {cell}',
      'is as good as two bits',
      'ours',
      'at most 0.01 nats over two bits with a codebook',
      str(gap),
      study.at_most(gap, 0.01),
      (cell, CODEBOOK),
    )
  gap = study.gap(runs, RANDOM, ONE_BIT)
  yield study.Verdict(
    'C7',
    'the largest values are far better than random ones',
    'SparseLoCo, code',
    'at random more than 0.05 nats higher',
    str(gap),
    study.more_than(gap, 0.05),
  )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  cells = [*AS_FOUND, SHORT, FORGETS, FORGETS_TWO, RANDOM]
  charts.curves(runs, cells, path)


STUDY = study.Study('compression', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
