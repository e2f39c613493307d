"""The worth of a token is as measured."""

import math

import hypothesis
from absl.testing import absltest
from hypothesis import strategies as st

from covenant import config as config_lib
from covenant.plan import island_costs
from covenant.plan import worth
from experiments import study
from tests import helpers

LARGE = str(helpers.CONFIGS / '72b.py')


def study_config(minutes=60):
  """The setting of experiments/worth.py, as a plan of four islands."""
  return study.make_config(
    study.Cell('', 0),
    [
      'miners=4',
      'rounds=48',
      'plan.peers=4',
      f'plan.compute_minutes={minutes}',
      'phases.round_blocks=400',
    ],
  )


class CompressionTest(absltest.TestCase):
  @hypothesis.given(st.floats(1.0, 1e4), st.floats(1.0, 1e4))
  def test_more_is_never_worth_more(self, one, other):
    config = config_lib.Config()
    low, high = sorted((one, other))
    less, more = (worth.of_compression(config, f) for f in (high, low))
    self.assertLessEqual(less, more)
    self.assertBetween(less, 0.0, 1.0)

  def test_measured_points_are_met(self):
    config = study_config()
    for fold, value in worth.COMPRESSION[115_008]:
      self.assertAlmostEqual(worth.of_compression(config, fold), value)
    self.assertEqual(worth.of_compression(config, 1.0), 1.0)


class BatchTest(absltest.TestCase):
  def test_a_run_of_the_measured_size(self):
    config = study_config()
    critical = worth.CRITICAL_BATCH / config.data.context
    self.assertAlmostEqual(worth.critical_batch(config), critical)
    self.assertEqual(worth.of_batch(config, 3), 1.0)
    # A batch as much larger than the critical one as the run's own is smaller
    # counts each sequence by so much less.
    wide = worth.of_batch(config, 3 + 2 * critical)
    self.assertAlmostEqual(wide, (3 + critical) / (3 + 3 * critical))

  def test_a_longer_run_has_use_for_larger_batches(self):
    large = config_lib.load(LARGE)
    own = large.optim.inner.batch_size
    small = study_config()
    self.assertGreater(
      worth.critical_batch(large), 10 * worth.critical_batch(small)
    )
    self.assertLess(worth.of_batch(large, 2 * own), 1.0)

  def test_the_study_plans_more_steps_before_larger_batches(self):
    """Four times the work of the run: twice the steps first."""
    config = study_config()
    terms = island_costs.terms(config)
    pace = island_costs.StepTime(1.0, 0.0, 0.0, 1)
    window = 45.0  # seconds of the run's own 15 steps of 3 sequences
    self.assertEqual(island_costs.choose([(1, pace)], terms, window), (15, [3]))
    self.assertEqual(
      island_costs.choose([(1, pace)], terms, 2 * window), (30, [3])
    )
    steps, (batch,) = island_costs.choose([(1, pace)], terms, 4 * window)
    self.assertEqual((steps, batch), (30, 6))

  def test_a_fixed_cost_of_a_step_is_worth_a_batch(self):
    """A pipeline that is slow to fill takes fewer steps of more sequences."""
    terms = island_costs.terms(config_lib.load(LARGE, [
      'plan.inventory=8xB200'
    ]))  # fmt: skip
    own = terms.config.optim.inner_steps
    pace = island_costs.StepTime(0.3, 0.3, 30.0, 1)
    steps, (batch,) = island_costs.choose([(1, pace)], terms, terms.window)
    self.assertLess(steps, own)
    self.assertLess(batch, math.inf)


if __name__ == '__main__':
  absltest.main()
