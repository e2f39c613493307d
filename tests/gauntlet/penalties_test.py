from absl.testing import absltest

from covenant import config as config_lib
from covenant.gauntlet import checks
from covenant.gauntlet import penalties

CONFIG = config_lib.Gauntlet(penalty_rounds=5)


class PenaltiesTest(absltest.TestCase):
  def test_penalties_multiply_until_they_end(self):
    some = penalties.add((), 'COPY', 0.25, 10, CONFIG)
    some = penalties.add(some, 'TINY', 0.5, 12, CONFIG)
    self.assertEqual([p.until for p in some], [15, 17])
    factors = [penalties.factor(some, r) for r in (12, 15, 16, 18)]
    self.assertEqual(factors, [0.125, 0.125, 0.5, 1.0])
    self.assertEqual(penalties.active(some, 16), some[1:])

  def test_the_same_offense_multiplies_and_starts_anew(self):
    some = penalties.add((), 'COPY', 0.25, 10, CONFIG)
    (again,) = penalties.add(some, 'COPY', 0.25, 12, CONFIG)
    self.assertEqual(again, penalties.Penalty('COPY', 0.0625, 17))
    (later,) = penalties.add(some, 'COPY', 0.25, 16, CONFIG)
    self.assertEqual(later.factor, 0.25)

  def test_the_factor_of_one_reason_has_a_floor(self):
    some = ()
    for _ in range(20):
      some = penalties.add(some, 'COPY', 0.25, 10, CONFIG)
    self.assertEqual(penalties.factor(some, 10), 2.0**-10)

  def test_text_names_factor_end_and_reason(self):
    for reason in [*checks.CheckFinding.__members__, 'NEGATIVE', 'SIMILAR']:
      text = penalties.Penalty(reason, 0.25, 7).text
      self.assertStartsWith(text, 'x 0.25 until round 7: ')


if __name__ == '__main__':
  absltest.main()
