"""SparseLoCo against DiLoCo at 5, 15, 30 and 60 inner steps, tuned at each.

  python -m experiments.horizons             about 4 core hours
  python -m experiments.horizons --quick     1 minute

In experiments/methods.py all numbers of inner steps (H) have the rates found at
15 and the same tokens, so that 60 steps have 25 rounds. Here a run has 150
rounds at each H, 750 to 9000 steps, and each method is tuned at each H: four
pairs of inner and outer rates on a quarter of the tokens, extended until the
best lies inside (experiments/grids.py). Eight peers have 3 sequences each;
SparseLoCo sends one bit and an index for 64 of 4096 values in every round, or
as many per step, 21 at 5 steps and 256 at 60. Its error decay is 0.8, the best
of experiments/compression.py. DiLoCo sends all in float32, with Nesterov
momentum 0.9.

Criteria, written before the final runs; n = 3 seeds at 5 and 15 steps and 2 at
30 and 60, where a run takes up to eight minutes, compared seed by seed, and up
to 7 while undecided:
  C1, tuned  SparseLoCo's final held-out loss minus DiLoCo's is at most 0, for
      each H and number of values; two standard errors decide.
  C9, tuned  From 5 to 60 steps, and so with twelve times the tokens, SparseLoCo
      gains no less than DiLoCo; once with values fixed, once in proportion.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import grids
from experiments import methods
from experiments import runner
from experiments import study

STEPS = (5, 15, 30, 60)
ROUNDS = 150
# Inner steps -> seeds before any is added.
SEEDS = {5: 3, 15: 3, 30: 2, 60: 2}
FIXED, PROPORTIONAL, DILOCO = (
  'SparseLoCo',
  'SparseLoCo, values by steps',
  'DiLoCo',
)
AXES = {grids.INNER: (6e-3, 1.2e-2), grids.OUTER: (0.7, 1.4)}


def name(method: str, steps: int) -> str:
  """Returns the cell of a method; at 15 steps both SparseLoCo forms are one."""
  if method == PROPORTIONAL and steps == 15:
    method = FIXED
  return f'{method}, {steps} steps'


def grid(method: str, steps: int) -> grids.Grid:
  """Returns the candidates of a method at a number of inner steps."""
  sets = (
    f'optim.inner_steps={steps}',
    f'rounds={ROUNDS}',
    f'eval.every={ROUNDS // 10}',
    f'optim.inner.warmup_steps={ROUNDS * steps // 20}',
  )
  if method == DILOCO:
    sets = (*methods.DILOCO, *sets)
  else:
    values = 64 * steps // 15 if method == PROPORTIONAL else 64
    sets = (
      *methods.SPARSELOCO,
      'optim.compression.error_decay=0.8',
      f'optim.compression.k={values}',
      *sets,
    )
  return grids.Grid(name(method, steps), sets, AXES)


def sparse(steps: int) -> tuple[str, ...]:
  """Returns the forms of SparseLoCo that differ at a number of inner steps."""
  return (FIXED,) if steps == 15 else (FIXED, PROPORTIONAL)


def plan(
  runs: Sequence[study.Run], seeds: int, horizons: Sequence[int] = STEPS
) -> Iterator[study.Cell]:
  for steps in horizons:
    for method in (*sparse(steps), DILOCO):
      yield from grids.plan(grid(method, steps), runs, min(seeds, SEEDS[steps]))


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  done = {run.cell for run in runs}
  for steps in STEPS:
    for method in sparse(steps):
      cells = name(method, steps), name(DILOCO, steps)
      if not done.issuperset(cells):
        continue
      found = study.gap(runs, *cells)
      values = ', values by steps' if method == PROPORTIONAL else ''
      yield study.Verdict(
        f'C1, tuned, H = {steps}{values}',
        f'SparseLoCo is at least as good as DiLoCo, both tuned at {steps} '
        'steps, over 150 rounds',
        'SparseLoCo, abstract',
        'loss minus DiLoCo’s at most 0',
        str(found),
        study.at_most(found),
        cells,
      )
  for method in (FIXED, PROPORTIONAL):
    cells = tuple(
      name(m, h) for m in (method, DILOCO) for h in (STEPS[-1], STEPS[0])
    )
    if not done.issuperset(cells):
      continue
    long, short, dense_long, dense_short = (
      study.losses(runs, c) for c in cells
    )
    seeds = set.intersection(
      *(set(x) for x in (long, short, dense_long, dense_short))
    )
    found = study.spread(
      [
        long[s] - short[s] - (dense_long[s] - dense_short[s])
        for s in sorted(seeds)
      ]
    )
    yield study.Verdict(
      'C9, tuned' + (', values by steps' if method == PROPORTIONAL else ''),
      'more inner steps cost SparseLoCo no more than DiLoCo, both tuned',
      'SparseLoCo, abstract',
      'loss at 60 steps minus at 5, minus the same of DiLoCo, at most 0',
      str(found),
      study.at_most(found),
      cells,
    )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  lines = {
    method: {float(h): name(method, h) for h in STEPS}
    for method in (FIXED, PROPORTIONAL, DILOCO)
  }
  charts.ends(runs, lines, path, 'inner steps per round; 150 rounds')


STUDY = study.Study(
  'horizons', plan, judge, draw, brief=functools.partial(plan, horizons=(5, 15))
)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
