import dataclasses
import json

from absl.testing import absltest

from covenant import config as config_lib
from covenant.gauntlet import checks
from covenant.gauntlet import ratings

CONFIG = config_lib.Gauntlet(penalty_rounds=5)


class RatingsTest(absltest.TestCase):
  def test_admits_exactly_the_registered(self):
    first = {u: ratings.Identity(f'hotkey{u}', 7) for u in range(3)}
    state = ratings.admit(ratings.Ratings(), 4, first)
    self.assertEqual(list(state.standings), [0, 1, 2])
    self.assertEqual(state.standings[0].admitted, 4)
    self.assertEqual(state.standings[0].evaluated, 3)
    rated = dataclasses.replace(state.standings[1], gain=1.0)
    state = dataclasses.replace(state, standings={**state.standings, 1: rated})
    now = {1: first[1], 2: ratings.Identity('other', 7)}
    after = ratings.admit(state, 9, now)
    self.assertEqual(after.standings[1], rated)
    self.assertEqual(after.standings[2].admitted, 9)
    self.assertEqual(list(after.standings), [1, 2])

  def test_proof_and_its_certainty(self):
    new = ratings.Standing('a', 0, 0)
    self.assertEqual((new.proof, new.certainty), (0.0, 0.0))
    self.assertAlmostEqual(new.ordinal, 0.0)
    four = dataclasses.replace(
      new, proof_sum=6.0, proof_weight=4.0, proof_variance=4.0
    )
    self.assertEqual((four.proof, four.certainty), (1.5, 3.0))

  def test_json_is_exact(self):
    standing = ratings.Standing('a', 1, 2, mu=0.1 + 0.2, gain_signs=(1, -1, 0))
    standing = standing.punish(ratings.SIMILAR, 1 / 3, 2, CONFIG)
    state = ratings.Ratings(5, {3: standing}, has_proof=True)
    text = ratings.to_json(state)
    self.assertEqual(ratings.from_json(text), state)
    self.assertEqual(ratings.to_json(ratings.from_json(text)), text)
    self.assertEqual(json.loads(text)['standings']['3']['hotkey'], 'a')


class PenaltiesTest(absltest.TestCase):
  def test_penalties_multiply_until_they_end(self):
    some = ratings.add_penalty((), 'COPY', 0.25, 10, CONFIG)
    some = ratings.add_penalty(some, 'TINY', 0.5, 12, CONFIG)
    self.assertEqual([p.until for p in some], [15, 17])
    factors = [ratings.penalty_factor(some, r) for r in (12, 15, 16, 18)]
    self.assertEqual(factors, [0.125, 0.125, 0.5, 1.0])
    self.assertEqual(ratings.active_penalties(some, 16), some[1:])

  def test_the_same_offense_multiplies_and_starts_anew(self):
    some = ratings.add_penalty((), 'COPY', 0.25, 10, CONFIG)
    (again,) = ratings.add_penalty(some, 'COPY', 0.25, 12, CONFIG)
    self.assertEqual(again, ratings.Penalty('COPY', 0.0625, 17))
    (later,) = ratings.add_penalty(some, 'COPY', 0.25, 16, CONFIG)
    self.assertEqual(later.factor, 0.25)

  def test_the_factor_of_one_reason_has_a_floor(self):
    some = ()
    for _ in range(20):
      some = ratings.add_penalty(some, 'COPY', 0.25, 10, CONFIG)
    self.assertEqual(ratings.penalty_factor(some, 10), 2.0**-10)

  def test_text_names_factor_end_and_reason(self):
    for reason in [*checks.CheckFinding.__members__, 'NEGATIVE', 'SIMILAR']:
      text = ratings.Penalty(reason, 0.25, 7).text
      self.assertStartsWith(text, 'x 0.25 until round 7: ')


if __name__ == '__main__':
  absltest.main()
