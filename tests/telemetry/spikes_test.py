import random

from absl.testing import absltest

from covenant import metrics
from covenant.telemetry import spikes


class SpikeTest(absltest.TestCase):
  def test_a_loss_far_above_the_last_ones(self):
    detector, draw = spikes.SpikeDetector(6.0, 50), random.Random(0)
    for i in range(200):
      self.assertIsNone(detector.score(4.0 - i / 100 + draw.gauss(0, 0.05)), i)
    self.assertGreater(detector.score(4.0), 6.0)

  def test_a_step(self):
    detector = spikes.SpikeDetector(6.0, 50)

    def step(loss):
      return metrics.Step(3, 17, 8, loss, 1.0, 1e-3)

    for _ in range(9):
      self.assertEqual(detector.add(step(2.0)), '')
    self.assertEqual(detector.add(step(None)), '')
    self.assertRegex(
      detector.add(step(4.0)), '^the loss of inner step 17 is 4, .* deviations'
    )

  def test_a_few_losses_are_no_rule(self):
    detector = spikes.SpikeDetector(6.0, 50)
    for loss in (2.0,) * 7:
      self.assertIsNone(detector.score(loss))
    self.assertIsNone(detector.score(99.0))

  def test_a_fall_is_none(self):
    detector = spikes.SpikeDetector(6.0, 50)
    for _ in range(20):
      detector.score(5.0)
    self.assertIsNone(detector.score(1.0))

  def test_a_loss_that_stays_high_is_reported_once(self):
    detector = spikes.SpikeDetector(6.0, 20)
    for _ in range(20):
      detector.score(2.0)
    found = [detector.score(9.0) is not None for _ in range(40)]
    self.assertTrue(found[0])
    self.assertLess(sum(found), 3)


if __name__ == '__main__':
  absltest.main()
