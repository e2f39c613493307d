"""The recipe and synchronous AdamW at 0.8 million parameters.

  python -m experiments.recipe_larger             about 5 core minutes
  python -m experiments.recipe_larger --quick     4 minutes

Four layers of width 128, context 128: 820,352 parameters. Two shared cores
allowed one token a parameter, not 20, and one seed, which decides nothing; the
rule for undecided claims adds seeds where there is time. Both methods have half
of the inner rates of 115 thousand parameters; nothing is tuned here.

Criterion, written before the runs; compared seed by seed:
  R4  That of R1, at this size.
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import grids
from experiments import methods
from experiments import recipe
from experiments import runner
from experiments import study

STEPS = 270
SEEDS = 1  # before any is added
SIZE = (
  'model.width=128',
  'model.layers=4',
  'model.ffn_width=384',
  'data.context=128',
  'optim.inner.warmup_steps=27',
)
ADAMW, RECIPE = 'AdamW, synchronous, 0.8 M', 'the recipe, 0.8 M'
# The sets and the program of a cell, its inner rate, and its steps per round.
CELLS: dict[str, tuple[tuple[str, ...], study.Program | None, float, int]] = {
  ADAMW: (methods.ALONE, None, 3e-3, 15),
  RECIPE: (recipe.SPARSE, recipe.PROGRAM, 6e-3, recipe.H),
}


def cell(name: str, seed: int) -> study.Cell:
  method, program, rate, steps = CELLS[name]
  sets = (
    *method,
    *SIZE,
    f'{grids.INNER}={rate}',
    f'rounds={STEPS // steps}',
    f'eval.every={STEPS // steps // 6}',
  )
  return study.Cell(name, seed, sets, program)


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  del runs
  for seed in range(min(seeds, SEEDS)):
    for name in CELLS:
      yield cell(name, seed)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  ratio = recipe.times_fewer(runs, cell(RECIPE, 0), STEPS)
  cells = RECIPE, ADAMW
  yield recipe.verdict(runs, 'R4', 'AdamW, at 0.8 M', cells, ratio)


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  charts.curves(runs, [ADAMW, RECIPE], path, factors={ADAMW: recipe.GRADIENTS})


STUDY = study.Study('recipe_larger', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
