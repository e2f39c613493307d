"""Synchronous Muon beside the recipe.

  python -m experiments.recipe_muon             about 6 core minutes
  python -m experiments.recipe_muon --quick     1 minute

Muon with the batch of all peers has the inner rates of experiments/recipe.py,
tuned in the same way, and its bytes are those of synchronous AdamW. The recipe
has the runs of that study.

Criterion, written before the runs; n = 3 seeds, compared seed by seed:
  R2  That of R1, against synchronous Muon.
"""

import pathlib
import statistics
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import equivalence
from experiments import grids
from experiments import methods
from experiments import recipe
from experiments import runner
from experiments import study

MUON = 'Muon, synchronous'
GRID = grids.Grid(
  MUON, (*methods.ALONE, 'optim.inner.kind=muon'), {grids.INNER: recipe.RATES}
)


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  yield from grids.plan(GRID, runs, seeds)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  others = _recipe()
  if not others:
    return
  runs = [*runs, *others]
  gap = study.gap(runs, recipe.RECIPE, MUON)
  reference = statistics.mean(study.losses(runs, MUON).values())
  yield study.Verdict(
    'R2',
    'a thousandth of the bytes, and not worse than synchronous Muon',
    'ours',
    '90 % interval of the loss at most 0.5 % above',
    equivalence.describe(gap, reference),
    equivalence.not_worse(gap, equivalence.MARGIN * reference),
  )


def _recipe() -> list[study.Run]:
  """Returns the committed runs of the recipe and of AdamW."""
  path = study.RESULTS / 'recipe.csv'
  runs = study.read_csv(path, study.Run) if path.exists() else []
  return [r for r in runs if r.cell in (recipe.ADAMW, recipe.RECIPE)]


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  found = [*runs, *(_recipe() if path.parent == study.RESULTS else ())]
  charts.curves(
    found,
    [recipe.ADAMW, MUON, recipe.RECIPE],
    path,
    factors={recipe.ADAMW: recipe.GRADIENTS, MUON: recipe.GRADIENTS},
  )


STUDY = study.Study('recipe_muon', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
