"""The cells of the tuned numbers of inner steps, and their verdicts."""

from absl.testing import absltest

from experiments import horizons
from experiments import study


def _run(cell, seed, loss):
  return study.Run(cell, seed, '', 1, 1, 1, 1, loss, 1.0, 'cpu', '')


class HorizonsTest(absltest.TestCase):
  def test_values_are_fixed_or_in_proportion_to_steps(self):
    for method, expected in (
      (horizons.FIXED, (64, 64, 64, 64)),
      (horizons.PROPORTIONAL, (21, 64, 128, 256)),
    ):
      configs = [
        study.make_config(horizons.grid(method, h).cell((0.006, 0.7)))
        for h in horizons.STEPS
      ]
      self.assertEqual(tuple(c.optim.compression.k for c in configs), expected)
      self.assertEqual({c.rounds for c in configs}, {150})
      self.assertEqual([c.optim.inner_steps for c in configs], [5, 15, 30, 60])

  def test_every_method_begins_with_as_many_candidates_at_each_number(self):
    cells = [cell.name for cell in horizons.plan([], 3)]
    self.assertLen(cells, 11 * 4)
    self.assertLen(set(cells), 11 * 4)
    self.assertTrue(all(', tuning, ' in name for name in cells))

  def test_verdicts(self):
    # DiLoCo gains 0.1 from 5 to 60 steps, SparseLoCo loses 0.1 with values
    # fixed and gains 0.2 with values in proportion.
    losses = {
      horizons.FIXED: (2.0, 2.0, 2.05, 2.1),
      horizons.PROPORTIONAL: (2.0, 2.0, 1.9, 1.8),
      horizons.DILOCO: (2.02, 2.01, 1.95, 1.92),
    }
    runs = [
      _run(name, seed, loss + 0.001 * seed)
      for method, of in losses.items()
      for steps, loss in zip(horizons.STEPS, of, strict=True)
      for name in [horizons.name(method, steps)]
      for seed in range(3)
      if method != horizons.PROPORTIONAL or steps != 15
    ]
    outcomes = {v.claim: v.outcome for v in horizons.judge(runs, study.RESULTS)}
    self.assertEqual(
      outcomes,
      {
        'C1, tuned, H = 5': 'PASS',
        'C1, tuned, H = 5, values by steps': 'PASS',
        'C1, tuned, H = 15': 'PASS',
        'C1, tuned, H = 30': 'FAIL',
        'C1, tuned, H = 30, values by steps': 'PASS',
        'C1, tuned, H = 60': 'FAIL',
        'C1, tuned, H = 60, values by steps': 'PASS',
        'C9, tuned': 'FAIL',
        'C9, tuned, values by steps': 'PASS',
      },
    )


if __name__ == '__main__':
  absltest.main()
