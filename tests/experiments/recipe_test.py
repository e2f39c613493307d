"""The recipe sends what it claims, in the number of steps that AdamW has."""

from absl.testing import absltest
from absl.testing import parameterized

from experiments import methods
from experiments import recipe
from experiments import recipe_larger
from experiments import recipe_parts
from experiments import study

SMALL = (recipe.GRID.cell(recipe.RATES[:1]), methods.TOTAL)
LARGE = (recipe_larger.cell(recipe_larger.RECIPE, 0), recipe_larger.STEPS)


class RecipeTest(parameterized.TestCase):
  @parameterized.parameters(SMALL, LARGE)
  def test_a_thousandth_of_the_bytes(self, cell, steps):
    config = study.make_config(cell)
    taken = config.rounds * config.optim.inner_steps
    self.assertEqual(taken, steps)
    sent = recipe.PROGRAM.sent(config)(taken)
    run = study.Run(cell.name, 0, '', 1, 1, sent, 1, 2.0, 1.0, 'cpu', '')
    self.assertBetween(recipe.times_fewer([run], cell, steps), 1000, 1300)

  def test_both_sides_have_the_same_tokens(self):
    for cells in (
      [study.Cell('', 0, recipe.SYNCHRONOUS), SMALL[0]],
      [recipe_larger.cell(name, 0) for name in recipe_larger.CELLS],
    ):
      configs = [study.make_config(cell) for cell in cells]
      tokens = {
        c.rounds * c.optim.inner_steps * c.miners * c.optim.inner.batch_size
        for c in configs
      }
      self.assertLen(tokens, 1)

  def test_a_part_undone_sends_about_as_much(self):
    sent = {}
    for cell in recipe_parts.plan([], 1):
      config = study.make_config(cell)
      steps = config.rounds * config.optim.inner_steps
      sent[cell.name] = recipe.PROGRAM.sent(config)(steps) / steps
    whole = sent[recipe_parts.WHOLE]
    for name, rate in sent.items():
      self.assertBetween(rate / whole, 0.9, 1.1, name)


if __name__ == '__main__':
  absltest.main()
