import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from covenant import config as config_lib
from covenant.gauntlet import incentives
from covenant.gauntlet import ratings

CONFIG = config_lib.Gauntlet()
positive = st.floats(1e-3, 10)


def pay(scores, config=CONFIG):
  standings = {
    uid: dataclasses.replace(
      ratings.Standing(f'{uid}', 0, 0), score=x, raw_score=max(x, 0.0)
    )
    for uid, x in enumerate(scores)
  }
  return incentives.weights(ratings.Ratings(0, standings, True), config)


class IncentivesTest(parameterized.TestCase):
  @settings(deadline=None)
  @given(
    st.lists(positive, max_size=5),
    st.lists(positive, min_size=1, max_size=6),
  )
  def test_splitting_a_score_never_pays(self, others, parts):
    """`rating_update_test` shows that split work has no larger score."""
    n = len(others)
    whole = pay([*others, sum(parts)])
    split = pay([*others, *parts])
    together = sum(split.get(n + i, 0.0) for i in range(len(parts)))
    self.assertLessEqual(together, whole[n] * (1 + 1e-9))

  def test_splitting_pays_where_rank_is_paid(self):
    """Why 'ramp' is not the default."""
    config = dataclasses.replace(CONFIG, incentive='ramp')
    whole = pay([3.0] + [1.0] * 9, config)
    split = pay([1.5, 1.5] + [1.0] * 9, config)
    self.assertGreater(split[0] + split[1], 1.5 * whole[0])

  @settings(deadline=None)
  @given(
    st.lists(st.floats(-1, 10), max_size=40),
    st.sampled_from(['gain', 'ramp']),
    st.sampled_from([0.0, 0.3, 1.0]),
  )
  def test_weights_sum_to_one_or_there_are_none(self, scores, kind, burn):
    config = dataclasses.replace(
      CONFIG, incentive=kind, burn=burn, burn_uid=100
    )
    weights = pay(scores, config)
    if not weights:
      self.assertEqual(burn, 0)
      self.assertLessEqual(max(scores, default=0), 0)
      return
    self.assertAlmostEqual(sum(weights.values()), 1)
    self.assertGreaterEqual(min(weights.values()), 0)
    for uid in set(weights) - {100}:
      self.assertGreater(scores[uid], 0)

  def test_more_is_paid_more(self):
    for kind in ('gain', 'ramp'):
      config = dataclasses.replace(CONFIG, incentive=kind, contributors=3)
      weights = pay([5.0, 4.0, 3.0, 2.0, 1.0], config)
      self.assertEqual(sorted(weights, key=weights.get), [4, 3, 2, 1, 0])

  def test_ramp_and_reserves(self):
    config = dataclasses.replace(CONFIG, incentive='ramp', contributors=2)
    weights = pay([9.0, 8.0, 7.0, 6.0], config)
    for uid, share in enumerate((2, 1, 0.5, 0.25)):
      self.assertAlmostEqual(weights[uid], share / 3.75)

  def test_merit_is_paid_until_proof_is_common(self):
    standing = ratings.Standing('a', 0, 0, raw_score=1.0)
    both = {0: standing, 1: dataclasses.replace(standing, score=0.5)}
    before = incentives.weights(ratings.Ratings(0, both, False), CONFIG)
    after = incentives.weights(ratings.Ratings(0, both, True), CONFIG)
    self.assertEqual(before, {0: 0.5, 1: 0.5})
    self.assertEqual(after, {1: 1.0})


if __name__ == '__main__':
  absltest.main()
