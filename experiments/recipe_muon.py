"""Muon beside the recipe, and inside it.

  python -m experiments.recipe_muon             about 16 core minutes
  python -m experiments.recipe_muon --quick     2 minutes

Synchronous Muon has the batch of all peers and the bytes of synchronous AdamW.
The recipe with Muon inside differs from that of experiments/recipe.py by its
inner optimizer only, and sends the same bytes. Both have the inner rates of
that study, tuned in the same way, on a quarter of the tokens. The recipe with
AdamW inside was better on all tokens at twice the rate found so; a second cell
therefore has twice the rate, from the beginning. The recipe with AdamW inside
and synchronous AdamW have the runs of that study.

Criteria, written before the runs; n = 3 seeds, compared seed by seed, and up to
7 while undecided:
  R1, Muon inside  That of R1, for either rate.
  R2  That of R1, against synchronous Muon, for the recipe with AdamW inside and
      with Muon.
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import grids
from experiments import methods
from experiments import recipe
from experiments import runner
from experiments import study

MUON = 'Muon, synchronous'
INSIDE, TWICE = (
  'the recipe, Muon inside',
  'the recipe, Muon inside, twice the rate',
)
KIND = 'optim.inner.kind=muon'
AXES = {grids.INNER: recipe.RATES}
GRID = grids.Grid(MUON, (*methods.ALONE, KIND), AXES)
INSIDE_GRID = grids.Grid(INSIDE, (*recipe.SPARSE, KIND), AXES, recipe.PROGRAM)


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  yield from grids.plan(GRID, runs, seeds)
  yield from grids.plan(INSIDE_GRID, runs, seeds)
  found = grids.best(INSIDE_GRID, runs)
  for seed in range(seeds if found is not None else 0):
    assert found is not None
    yield INSIDE_GRID.cell((2 * found[0],), seed)._replace(name=TWICE)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  others = _recipe()
  if not others:
    return
  ratio = recipe.times_fewer(
    runs, INSIDE_GRID.cell(recipe.RATES[:1]), methods.TOTAL
  )
  own, runs = {run.cell for run in runs}, [*runs, *others]
  for claim, reference, cells in (
    ('R1, Muon inside', 'AdamW', (INSIDE, recipe.ADAMW)),
    ('R1, Muon inside, twice the rate', 'AdamW', (TWICE, recipe.ADAMW)),
    ('R2', 'Muon', (recipe.RECIPE, MUON)),
    ('R2, Muon inside', 'Muon', (INSIDE, MUON)),
    ('R2, Muon inside, twice the rate', 'Muon', (TWICE, MUON)),
  ):
    found = recipe.verdict(runs, claim, reference, cells, ratio)
    yield found._replace(cells=tuple(cell for cell in cells if cell in own))


def _recipe() -> list[study.Run]:
  """Returns the committed runs of the recipe and of AdamW."""
  path = study.RESULTS / 'recipe.csv'
  runs = study.read_csv(path, study.Run) if path.exists() else []
  return [r for r in runs if r.cell in (recipe.ADAMW, recipe.RECIPE)]


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  found = [*runs, *(_recipe() if path.parent == study.RESULTS else ())]
  charts.curves(
    found,
    [recipe.ADAMW, MUON, recipe.RECIPE, INSIDE, TWICE],
    path,
    factors={recipe.ADAMW: recipe.GRADIENTS, MUON: recipe.GRADIENTS},
  )


STUDY = study.Study('recipe_muon', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
