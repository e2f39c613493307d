import dataclasses
import json

from absl.testing import absltest

from covenant import config as config_lib
from covenant.gauntlet import penalties
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
    standing = standing.punish(penalties.SIMILAR, 1 / 3, 2, CONFIG)
    state = ratings.Ratings(5, {3: standing}, has_proof=True)
    text = ratings.to_json(state)
    self.assertEqual(ratings.from_json(text), state)
    self.assertEqual(ratings.to_json(ratings.from_json(text)), text)
    self.assertEqual(json.loads(text)['standings']['3']['hotkey'], 'a')


if __name__ == '__main__':
  absltest.main()
