"""Grids that extend themselves, and runs on fewer tokens."""

import pytest
from absl.testing import absltest

from experiments import grids
from experiments import study

GRID = grids.Grid('m', (), {grids.INNER: (1e-3, 2e-3), grids.OUTER: (0.5, 1.0)})


def _runs(grid, loss):
  """Runs all that the grid asks for, one stage after the other."""
  runs = []
  while True:
    done = {r.cell for r in runs}
    new = [p for p in grids.candidates(grid, runs)
           if grid.trial(p).name not in done]  # fmt: skip
    if not new:
      return runs
    runs += [
      study.Run(grid.trial(p).name, 0, '', 1, 1, 1, 1, loss(*p), 1.0, '', '')
      for p in new
    ]


class GridsTest(absltest.TestCase):
  @pytest.mark.slow
  def test_it_goes_on_until_the_best_lies_inside(self):
    runs = _runs(GRID, lambda a, b: abs(a - 4e-3) + abs(b - 0.25))
    self.assertEqual(grids.best(GRID, runs), (4e-3, 0.25))
    self.assertFalse(grids.at_an_end(GRID, runs))

  @pytest.mark.slow
  def test_it_ends_at_the_most_candidates(self):
    runs = _runs(GRID, lambda a, b: -a - b)
    self.assertBetween(len(runs), grids.MOST - 2, grids.MOST)
    self.assertTrue(grids.at_an_end(GRID, runs))

  @pytest.mark.slow
  def test_final_runs_come_after_tuning_and_have_all_tokens(self):
    before = list(grids.plan(GRID, [], 3))
    self.assertLen(before, 4)
    runs = _runs(GRID, lambda a, b: abs(a - 4e-3) + abs(b - 0.25))
    after = [c for c in grids.plan(GRID, runs, 3) if c.name == 'm']
    self.assertEqual([c.seed for c in after], [0, 1, 2])
    tuning, final = (study.make_config(c) for c in (before[0], after[0]))
    self.assertEqual(final.rounds, 4 * tuning.rounds)
    self.assertEqual(final.optim.inner.learning_rate, 4e-3)
    self.assertEqual(final.optim.outer.learning_rate, 0.25)

  def test_an_axis_with_one_value_stays(self):
    grid = grids.Grid('m', (), {grids.INNER: (1e-3,)})
    self.assertEqual(grids.best(grid, _runs(grid, lambda a: a)), (1e-3,))


if __name__ == '__main__':
  absltest.main()
