"""The simulation of rounds, shorter; and that it can miss its bars."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from experiments import round_times
from tests import helpers


def load(*overrides):
  return config_lib.load(str(helpers.CONFIGS / '72b.py'), overrides)


class RoundTimesTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.1, 0.3)
  def test_no_round_is_empty(self, jitter):
    """One of them has a silent leader."""
    found = round_times.simulate(load(), rounds=12, jitter=jitter)
    self.assertEqual(
      round_times.judge(found),
      {'empty': True, 'whole': True, 'trained': True},
    )
    self.assertAlmostEqual(found.steps, 30, delta=0.2)
    self.assertIn('12, of them empty: 0', round_times.table(found))

  @parameterized.parameters(
    ('phases.select_blocks=10',),
    ('plan.download=100',),
    ('plan.finality_blocks=9',),
  )
  def test_phases_that_are_too_short_leave_rounds_empty(self, edit):
    found = round_times.simulate(load(edit), rounds=5)
    bars = round_times.judge(found)
    self.assertFalse(bars['empty'] and bars['whole'])

  def test_a_slow_upload_misses_the_manifest(self):
    found = round_times.simulate(load('plan.upload=4'), rounds=5)
    self.assertLess(found.listed, 0.5)

  def test_without_overlap_devices_wait(self):
    config = load('optim.overlap=0', 'phases.round_blocks=140')
    found = round_times.simulate(config, rounds=5)
    self.assertEqual(found.empty, 0)
    self.assertLess(found.trained, 0.8)


if __name__ == '__main__':
  absltest.main()
