from absl.testing import absltest

from covenant.node import extension
from tests import helpers


class ExtensionTest(absltest.TestCase):
  def test_without_a_change(self):
    self.assertEqual(extension.describe(helpers.tiny(), helpers.tiny(), 3), '')

  def test_a_schedule_that_depends_on_the_length(self):
    text = extension.describe(
      helpers.tiny('rounds=4'), helpers.tiny('rounds=8'), 4
    )
    self.assertStartsWith(text, 'rounds: 4 before, 8 now; ')
    for part in (
      'over 24 inner steps in place of 12', 'at step 12', 'not 0.002',
      'sets optim.inner.decay_steps',
    ):  # fmt: skip
      self.assertIn(part, text)

  def test_a_schedule_of_its_own_length(self):
    fixed = 'optim.inner.decay_steps=12'
    before, after = (helpers.tiny(f'rounds={n}', fixed) for n in (4, 8))
    text = extension.describe(before, after, 4)
    self.assertIn('as before, set by optim.inner.decay_steps', text)

  def test_what_an_amendment_has_set_holds(self):
    before, after = helpers.tiny('rounds=4'), helpers.tiny('rounds=8')
    text = extension.describe(before, after, 4, 6)
    self.assertIn('an amendment made them 6, which holds for all', text)
    self.assertIn('--config.rounds=8 changes nothing', text)


if __name__ == '__main__':
  absltest.main()
