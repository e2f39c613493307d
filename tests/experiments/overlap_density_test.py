"""The table of late exchanges and shares of values."""

from absl.testing import absltest

from experiments import overlap_density
from experiments import study


class OverlapDensityTest(absltest.TestCase):
  def test_late_runs_stand_beside_those_at_once(self):
    runs = [
      study.Run(
        cell.name, cell.seed, '', 1, 1, 1, 1,
        (2.0 + 0.1 * cell.seed) * (1.05 if '14 steps' in cell.name else 1.0),
        1.0, 'cpu', '',
      )
      for cell in overlap_density.plan([], 3)
    ]  # fmt: skip
    self.assertLen(runs, 18)
    lines = overlap_density.table(runs).splitlines()
    self.assertLen(lines, 2 + 3)
    self.assertEqual(
      lines[3],
      '| 64 of 4096 | 2.0500 | 2.0500 (+0.0% ± 0.0%) | 2.1525 (+5.0% ± 0.0%) |',
    )

  def test_half_of_the_tokens(self):
    for cell in overlap_density.plan([], 1):
      config = study.make_config(cell)
      self.assertEqual(config.rounds * config.optim.inner_steps, 750)


if __name__ == '__main__':
  absltest.main()
