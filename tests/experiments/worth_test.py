"""The planner counts with what was measured."""

from absl.testing import absltest

from covenant.plan import worth as plan_worth
from experiments import study
from experiments import worth


class WorthTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.runs = study.read_csv(study.RESULTS / 'worth.csv', study.Run)

  def test_the_plan_has_the_measured_tables(self):
    self.assertEqual(worth.compression(self.runs), plan_worth.COMPRESSION)
    self.assertAlmostEqual(
      worth.critical_batch(self.runs), plan_worth.CRITICAL_BATCH, delta=1
    )
    (whole,) = {r.tokens for r in self.runs if r.cell == 'width 64, alike'}
    self.assertEqual(whole, plan_worth.MEASURED_TOKENS)

  def test_the_runs_are_those_of_the_study(self):
    seeds = 1 + max(run.seed for run in self.runs)
    planned = {
      (cell.name, cell.seed, study.digest(study.make_config(cell)))
      for cell in worth.plan((), seeds)
    }
    self.assertEqual(planned, {(r.cell, r.seed, r.config) for r in self.runs})

  def test_a_loss_of_fewer_tokens_is_worth_these(self):
    alike = study.losses(self.runs, 'width 64, alike')[0]
    runs = [r for r in self.runs if r.seed == 0]
    self.assertAlmostEqual(worth.plain_share(runs, 64, alike), 1.0)
    fewer = study.losses(runs, 'width 64, fewer rounds')[0]
    self.assertAlmostEqual(worth.plain_share(runs, 64, fewer), 0.75)

  def test_in_short_no_run_is_that_of_another_cell(self):
    names = [
      study.digest(study.make_config(cell))
      for cell in worth.quick().plan((), 1)
    ]
    self.assertLen(set(names), len(names))


if __name__ == '__main__':
  absltest.main()
