from unittest import mock

import numpy as np
from absl.testing import absltest

from covenant.node import step_meter
from covenant.plan import hardware
from covenant.plan import timing
from covenant.telemetry import telemetry as telemetry_lib
from covenant.train import shared_state
from tests import helpers

STEP = telemetry_lib.Measured(3, 7, 64, 2.5, 1.5, 2.0, 0.5)


class StepMeterTest(absltest.TestCase):
  def measured(self, joined=0, flops=None):
    """(step, learning rate, bytes of a device, speed) of one step."""
    config, telemetry = helpers.tiny(), mock.Mock()
    model = shared_state.SharedModel(config)
    meter = step_meter.StepMeter(config, model.method, telemetry, flops)
    meter.add(STEP, joined)
    return config, model, telemetry.step.call_args.args

  def test_the_rate_is_that_of_the_schedule(self):
    _, model, (step, rate, _, speed) = self.measured()
    self.assertEqual(step, STEP)
    self.assertAlmostEqual(rate, float(model.method.schedule(7)), places=7)
    self.assertIsNone(speed)  # nobody publishes the peak of a CPU

  def test_a_joiner_warms_up(self):
    *_, (_, full, *_) = self.measured()
    *_, (_, rate, *_) = self.measured(joined=5)
    self.assertAlmostEqual(rate, full * 3 / 30, places=7)

  def test_speed(self):
    with mock.patch.object(hardware, 'peak_of', return_value=1e12):
      config, _, (*_, speed) = self.measured()
    want = timing.flops(config).total / timing.tokens(config)
    np.testing.assert_allclose(speed.flops_per_token, want)
    self.assertEqual(speed.peak % 1e12, 0)

  def test_a_part_of_the_model_is_on_one_device(self):
    with mock.patch.object(hardware, 'peak_of', return_value=1e12):
      *_, speed = self.measured(flops=5.0)[2]
      *_, away = self.measured(flops=0.0)[2]
    self.assertEqual(speed, telemetry_lib.Speed(5.0, 1e12))
    self.assertIsNone(away)


if __name__ == '__main__':
  absltest.main()
