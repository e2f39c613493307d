"""Gains of units of work where losses are no numbers."""

import numpy as np
from absl.testing import absltest

from covenant.gauntlet import units


class GainsTest(absltest.TestCase):
  def test_an_overflow_after_is_the_worst_loss(self):
    found = units.gains(np.ones(4), np.array([0.5, np.inf, np.nan, 1e30]))
    np.testing.assert_array_equal(found, [0.5, -100.0, -100.0, -100.0])

  def test_an_overflow_before_is_no_gain(self):
    """A uid's own data may overflow where random data do not."""
    before = np.array([np.inf, np.inf, np.nan, 2.0])
    found = units.gains(before, np.array([np.inf, 1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(found, [0.0, 0.0, 0.0, 1.0])


if __name__ == '__main__':
  absltest.main()
