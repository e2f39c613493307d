"""Intervals and verdicts of two one-sided tests."""

import math

from absl.testing import absltest
from absl.testing import parameterized

from experiments import equivalence
from experiments import study


class EquivalenceTest(parameterized.TestCase):
  def test_the_interval_is_student_s(self):
    """The 95th percentile of t with two degrees of freedom is 2.920."""
    found = study.spread([1.0, 2.0, 3.0])
    low, high = equivalence.interval(found)
    self.assertAlmostEqual(low, 2 - 2.91999 / math.sqrt(3), places=4)
    self.assertAlmostEqual(high, 2 + 2.91999 / math.sqrt(3), places=4)

  @parameterized.parameters(
    (0.0, 0.001, 'PASS', 'PASS'),
    (0.0, 0.1, 'UNDECIDED', 'UNDECIDED'),
    (0.05, 0.001, 'FAIL', 'FAIL'),
    (-0.05, 0.001, 'FAIL', 'PASS'),
    (0.0, math.nan, 'UNDECIDED', 'UNDECIDED'),
  )
  def test_verdicts(self, mean, deviation, equal, no_worse):
    found = study.Gap(mean, deviation, 1 if math.isnan(deviation) else 3)
    self.assertEqual(equivalence.equivalent(found, 0.01), equal)
    self.assertEqual(equivalence.not_worse(found, 0.01), no_worse)

  def test_the_margin_is_a_share_of_the_reference(self):
    runs = [
      study.Run('a', seed, '', 1, 1, 1, 1, loss, 1.0, 'cpu', '')
      for seed, loss in enumerate((1.5, 2.5))
    ]
    self.assertAlmostEqual(equivalence.margin(runs, 'a'), 0.01)


if __name__ == '__main__':
  absltest.main()
