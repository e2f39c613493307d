"""Failures of stages, and the steps that pipelines train meanwhile."""

from absl.testing import absltest

from experiments import skipping
from experiments import study

NOBODY = frozenset()


class SlotsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    sets = (*skipping.COMMON, *skipping.SIZES['0.2 M'])
    self.config = study.make_config(study.Cell('a', 0, sets))
    self.steps = self.config.optim.inner_steps

  def slots(self, policy, **changes):
    return skipping.Failing(policy, **changes).slots(self.config, 3)

  def test_without_failures_all_steps_have_all_stages(self):
    whole = [[(NOBODY, NOBODY)] * self.steps] * self.config.rounds
    self.assertEqual(self.slots(skipping.NONE), whole)
    for policy in (skipping.BYPASSED, skipping.WAITING):
      self.assertEqual(self.slots(policy, rate=0.0), whole)

  def test_the_share_of_time_is_that_of_the_rate(self):
    trained = [len(of) for of in self.slots(skipping.WAITING)]
    lost = 1 - sum(trained) / (self.config.rounds * self.steps)
    # Two stages of which each is away for 6 of about 106 steps.
    self.assertBetween(lost, 0.05, 0.2)

  def test_others_go_on_only_after_the_first_step(self):
    waiting = self.slots(skipping.WAITING)
    bypassed = self.slots(skipping.BYPASSED)
    away = 0
    for some, more in zip(waiting, bypassed, strict=True):
      self.assertLessEqual(len(some), len(more))
      self.assertEqual([x.away for x in some], [NOBODY] * len(some))
      if more:
        self.assertEqual(more[0].away, NOBODY)
      away += sum(bool(slot.away) for slot in more)
      for before, after in zip(more[:-1], more[1:], strict=True):
        self.assertEqual(after.failed, after.away - before.away)
    self.assertGreater(away, 0)
    self.assertEqual(sum(map(len, bypassed)) - away, sum(map(len, waiting)))

  def test_a_stage_that_failed_lost_its_progress(self):
    lost = [
      s for of in self.slots(skipping.WAITING) for x in of for s in x.failed
    ]
    self.assertNotEmpty(lost)
    self.assertContainsSubset(lost, {1, 2})


if __name__ == '__main__':
  absltest.main()
