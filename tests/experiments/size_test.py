"""The fit of the gap over sizes, and the runs that it is of."""

import math
import pathlib

import numpy as np
from absl.testing import absltest
from scipy import stats

from experiments import grids
from experiments import size
from experiments import study


def _runs(gap):
  """Runs of all final cells; `gap` maps parameters and seed to a share."""
  return [
    study.Run(
      size.name(method, width), seed, '', 1, 1, 1, 1,
      2.0 * (1 + gap(size.parameters(width), seed) * (method != size.ADAMW)),
      1.0, 'cpu', '',
    )
    for method in size.SETS
    for width in size.WIDTHS
    for seed in range(2)
  ]  # fmt: skip


class SizeTest(absltest.TestCase):
  def test_runs_have_ten_tokens_a_parameter(self):
    for width in size.WIDTHS:
      tokens = set()
      for method in size.SETS:
        config = study.make_config(size.grid(method, width).cell((0.01,)))
        optim = config.optim
        sequences = config.miners * optim.inner.batch_size * optim.inner_steps
        tokens.add(config.rounds * sequences * config.data.context)
      self.assertLen(tokens, 1)
      self.assertBetween(tokens.pop() / size.parameters(width), 9.5, 10.5)

  def test_the_best_candidate_is_the_final_run_of_its_seed(self):
    grid = size.grid(size.ADAMW, 32)
    trial, final = (
      study.digest(study.make_config(cell))
      for cell in (grid.trial((0.012,)), grid.cell((0.012,)))
    )
    self.assertEqual(trial, final)

  def test_other_widths_have_the_rate_of_the_middle_one(self):
    runs = [
      study.Run(
        grid.trial(point).name, 0, '', 1, 1, 1, 1, abs(point[0] - 6e-3), 1.0,
        'cpu', '',
      )
      for grid in (size.grid(m, size.MIDDLE) for m in size.SETS)
      for point in grids.candidates(grid, [])
    ]  # fmt: skip
    cells = {cell.name: cell for cell in size.plan(runs, 3)}
    for method in size.SETS:
      for width, rate in ((48, 8e-3), (64, 6e-3), (96, 4e-3), (128, 3e-3)):
        config = study.make_config(cells[size.name(method, width)])
        self.assertAlmostEqual(config.optim.inner.learning_rate, rate)
      self.assertNotIn(size.name(method, 32), cells)  # not tuned yet

  def test_the_fit_is_that_of_least_squares(self):
    draw = np.random.default_rng(0)
    points = [
      (count, 0.04 - 0.005 * math.log2(count) + 0.001 * draw.normal())
      for count in (1e4, 3e4, 1e5, 5e5)
      for _ in range(2)
    ]
    line = size.fit(points)
    expected = stats.linregress(
      [math.log2(count) for count, _ in points], [gap for _, gap in points]
    )
    self.assertAlmostEqual(line.slope, expected.slope)
    self.assertAlmostEqual(line.error, expected.stderr)
    self.assertAlmostEqual(line.intercept, expected.intercept)
    low, high = line.interval
    self.assertAlmostEqual(high - low, 2 * 1.943180 * line.error, places=6)
    middle, reach = line.at(2**line.center)
    self.assertAlmostEqual(middle, np.mean([gap for _, gap in points]))
    self.assertAlmostEqual(
      reach, line.quantile * line.residual / math.sqrt(line.n)
    )

  def test_the_slope_decides(self):
    for slope, outcome in ((-0.01, 'PASS'), (0.01, 'FAIL'), (0, 'UNDECIDED')):

      def gap(count, seed, slope=slope):
        return 0.3 + slope * math.log2(count) + 0.001 * (-1) ** seed

      runs = _runs(gap)
      (verdict,) = size.judge(runs, study.RESULTS)
      self.assertEqual(verdict.outcome, outcome)
      self.assertContainsSubset(verdict.cells, {run.cell for run in runs})

  def test_the_table_and_the_figure(self):
    runs = _runs(lambda count, seed: 0.03)
    table = size.table(runs).splitlines()
    self.assertLen(table, 2 + len(size.WIDTHS))
    self.assertIn('| 2 | 2.0000 | 2.0600 | +3.00% ± 0.00% |', table[2])
    path = pathlib.Path(self.create_tempdir()) / 'size.png'
    size.draw(runs, path)
    self.assertTrue(path.read_bytes().startswith(b'\x89PNG'))


if __name__ == '__main__':
  absltest.main()
