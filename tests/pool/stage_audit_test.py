"""The verdicts of an audit of a stage."""

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.pool import stage_audit

WANT = np.random.default_rng(0).normal(size=(2, 64, 8)).astype(np.float32)
OTHER = np.random.default_rng(1).normal(size=WANT.shape).astype(np.float32)


class AlikeTest(parameterized.TestCase):
  @parameterized.parameters((0.0, True), (0.25, True), (0.35, False))
  def test_in_the_first_step_other_hardware_is_a_little_off(self, far, want):
    got = WANT + np.float32(far) * OTHER
    self.assertEqual(stage_audit.is_alike(WANT, got, 0), want)

  @parameterized.parameters(
    (1.0, True), (0.2, True), (0.0, False), (-0.5, False)
  )
  def test_later_only_chance_is_a_lie(self, cosine, want):
    # A stage of a model that diverges has moved five norms away.
    got = 5 * (cosine * WANT + np.sqrt(1 - cosine**2) * OTHER)
    self.assertEqual(stage_audit.is_alike(WANT, got, 3), want)

  @parameterized.product(bad=(np.nan, np.inf, 3e38), step=(0, 3))
  def test_numbers_beyond_measure_are_lies(self, bad, step):
    got = np.full_like(WANT, bad)
    self.assertFalse(stage_audit.is_alike(WANT, got, step))


if __name__ == '__main__':
  absltest.main()
