import jax
import jax.numpy as jnp
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.optim import inner
from tests import helpers


def rate_of(variant):
  config = config_lib.load(f'{helpers.CONFIGS}/72b.py{variant}')
  steps = config.rounds * config.optim.inner_steps
  schedule = inner.schedule(config.optim.inner, steps)
  return lambda step: float(jax.jit(schedule)(jnp.int32(step)))


class PublishedTest(parameterized.TestCase):
  """The rates of the nodes of Covenant-72B (arXiv 2603.08163)."""

  @parameterized.parameters(
    (1_500, 1.17e-4),
    (50_000, 8.878e-5),
    (82_200, 5.183e-5),
    (90_000, 5.183e-5),
    (95_700, 5.183e-5),
    (120_000, 2.712e-5),
    (141_500, 1.410e-5),
    (150_000, 1.203e-5),
    (155_000, 1.17e-5),  # a tenth of the peak; ours stays there
    (182_999, 1.17e-5),
  )
  def test_of_training(self, step, want):
    for variant in ('', ':published'):
      rate = rate_of(variant)(step)
      self.assertAlmostEqual(rate / want, 1, delta=5e-4)

  @parameterized.parameters(
    (183_000, 0.0),
    (183_050, 2.925e-5 / 2),
    (183_100, 2.925e-5),  # a quarter of the peak
    (185_350, 2.925e-5 / 2),
    (187_600, 0.0),
    (200_000, 0.0),
  )
  def test_of_the_anneal(self, step, want):
    self.assertAlmostEqual(rate_of('')(step), want, delta=1e-9)

  def test_it_stands_still_while_it_pauses(self):
    rate = rate_of('')
    flat = {rate(step) for step in range(82_200, 95_701, 1_350)}
    self.assertLen(flat, 1)
    self.assertGreater(rate(82_199), rate(82_200))
    self.assertLess(rate(95_701), rate(95_700))

  def test_smoke_goes_through_all_of_it(self):
    config = config_lib.load(str(helpers.CONFIGS / '72b.py') + ':smoke')
    last = config.rounds * config.optim.inner_steps
    schedule = inner.schedule(config.optim.inner, last)
    rates = [float(schedule(step)) for step in range(last + 1)]
    self.assertEqual(max(rates), rates[8])
    self.assertEqual(rates[30], rates[40])
    self.assertGreater(rates[67], rates[63])
    self.assertEqual(rates[last], 0.0)


class ScheduleTest(absltest.TestCase):
  def test_without_pause_or_anneal_it_is_warm_up_and_cosine(self):
    schedule = inner.schedule(
      config_lib.Inner(learning_rate=2.0, warmup_steps=4, final_ratio=0.5), 12
    )
    rates = [round(float(schedule(step)), 6) for step in (0, 2, 4, 8, 12, 99)]
    self.assertEqual(rates, [0.0, 1.0, 2.0, 1.5, 1.0, 1.0])


if __name__ == '__main__':
  absltest.main()
