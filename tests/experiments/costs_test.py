"""Estimates of core seconds."""

from absl.testing import absltest

from experiments import costs
from experiments import study


class CostsTest(absltest.TestCase):
  def test_a_run_that_is_done_is_estimated_well(self):
    for name, sets in (
      ('AdamW inside', ()),
      ('Muon inside', ('optim.inner.kind=muon',)),
    ):
      runs = study.read_csv(study.RESULTS / 'muon.csv', study.Run)
      took = [r.seconds for r in runs if r.cell == name]
      found = costs.seconds([study.Cell(name, 0, sets)])
      self.assertBetween(found, 0.5 * min(took), 3 * max(took))

  def test_twice_the_rounds_cost_twice(self):
    one, two = (
      costs.seconds([study.Cell('', 0, (f'rounds={n}',))]) for n in (100, 200)
    )
    self.assertAlmostEqual(
      two - costs.COMPILATION, 2 * (one - costs.COMPILATION)
    )


if __name__ == '__main__':
  absltest.main()
