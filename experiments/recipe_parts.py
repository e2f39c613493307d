"""The parts of the recipe: one of them undone at a time.

  python -m experiments.recipe_parts             about 3 core minutes
  python -m experiments.recipe_parts --quick     2 minutes

The recipe of experiments/recipe.py at its inner rate of 6e-3, on a quarter of
the tokens. With 15 steps a round there are two fifths of the rounds, and 106 of
4096 values make about as many bytes; their error decay is the recipe's per
inner step.

Criterion, written before the runs; n = 3 seeds, compared seed by seed:
  R3  The recipe with one of its parts undone is worse; two standard errors
      decide.
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import grids
from experiments import recipe
from experiments import runner
from experiments import study

WHOLE = 'all parts'
PARTS = {
  'error decay 0.95': ('optim.compression.error_decay=0.95',),
  'no error feedback': ('optim.compression.error_decay=0',),
  '15 steps, k = 106': (
    'optim.inner_steps=15',
    'rounds=100',
    'optim.compression.k=106',
    'optim.compression.error_decay=0.57',
  ),
}


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  del runs
  whole = recipe.GRID.cell((6e-3,))
  for seed in range(seeds):
    for name, sets in {WHOLE: (), **PARTS}.items():
      cell = whole._replace(name=name, seed=seed, sets=(*whole.sets, *sets))
      yield cell._replace(sets=(*cell.sets, *grids.fewer(cell)))


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  for name in PARTS:
    gap = study.gap(runs, name, WHOLE)
    yield study.Verdict(
      f'R3, {name}',
      'is worse than the recipe at about as many bytes',
      'ours',
      'loss minus the recipe’s above 0, a quarter of the tokens',
      str(gap),
      study.more_than(gap),
      (name, WHOLE),
    )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  rows = {name: (name, WHOLE) for name in PARTS}
  label = 'loss minus the recipe’s (nats per byte)'
  charts.differences(runs, rows, path, label)


STUDY = study.Study('recipe_parts', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
