import random

from absl.testing import absltest

from covenant.telemetry import spikes


class SpikeTest(absltest.TestCase):
  def test_a_loss_far_above_the_last_ones(self):
    detector, draw = spikes.SpikeDetector(6.0, 50), random.Random(0)
    for i in range(200):
      self.assertIsNone(detector.add(4.0 - i / 100 + draw.gauss(0, 0.05)), i)
    self.assertGreater(detector.add(4.0), 6.0)

  def test_a_few_losses_are_no_rule(self):
    detector = spikes.SpikeDetector(6.0, 50)
    for loss in (2.0,) * 7:
      self.assertIsNone(detector.add(loss))
    self.assertIsNone(detector.add(99.0))

  def test_a_fall_is_none(self):
    detector = spikes.SpikeDetector(6.0, 50)
    for _ in range(20):
      detector.add(5.0)
    self.assertIsNone(detector.add(1.0))

  def test_a_loss_that_stays_high_is_reported_once(self):
    detector = spikes.SpikeDetector(6.0, 20)
    for _ in range(20):
      detector.add(2.0)
    found = [detector.add(9.0) is not None for _ in range(40)]
    self.assertTrue(found[0])
    self.assertLess(sum(found), 3)


if __name__ == '__main__':
  absltest.main()
