import random

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
from openskill.models import PlackettLuce

from covenant.gauntlet import deployed


class TemplarTest(parameterized.TestCase):
  @given(
    st.lists(
      st.tuples(st.floats(0, 50), st.floats(1, 9), st.integers(0, 3)),
      min_size=2,
      max_size=8,
    )
  )
  def test_plackett_luce_is_openskills(self, players):
    model = PlackettLuce(mu=25, sigma=25 / 3, beta=7, tau=0.1)
    teams = [[model.rating(mu=mu, sigma=sigma)] for mu, sigma, _ in players]
    scores = [float(score) for *_, score in players]
    got = deployed.plackett_luce([p[:2] for p in players], scores)
    for (mu, sigma), (want,) in zip(
      got, model.rate(teams, scores=scores), strict=True
    ):
      self.assertAlmostEqual(mu, want.mu, places=11)
      self.assertAlmostEqual(sigma, want.sigma, places=11)

  def test_ties_inflate_only_as_deployed(self):
    tied = [(25.0, 25 / 3)] * 3
    for ties, moves in (('average', False), ('inflate', True)):
      new = deployed.plackett_luce(tied, [-99.0] * 3, ties)
      self.assertEqual(new[0][0] > 25.1, moves)

  def test_average_crosses_the_threshold_on_the_third(self):
    peer, finals = deployed.Peer(mu=40, sigma=5, sync=1.0), []
    average = 0.0
    for _ in range(3):
      average = deployed.moving_average(average, own=1.0, other=0.0)
      now = deployed.Peer(peer.mu, average, peer.mu, peer.sigma, peer.sync)
      finals.append(deployed.final_score(now, rounds=10))
      self.assertGreater(deployed.final_score(now, rounds=9), 0)
    self.assertEqual(finals[:2], [0.0, 0.0])
    self.assertAlmostEqual(finals[2], 25 * 0.142625, places=5)

  def test_average_below_zero_is_zero(self):
    peer = deployed.Peer(average=-0.3, mu=40, sigma=5, sync=1.0)
    self.assertEqual(deployed.final_score(peer, rounds=0), 0.0)

  def test_steps_behind(self):
    ours = [np.zeros(2), np.zeros(2)]
    theirs = [np.array([0.2, 0.2]), np.array([-0.2, 50.0])]
    sizes = [np.full(2, 0.1), np.full(2, 0.1)]
    # The outlier lies above the upper quartile.
    self.assertAlmostEqual(
      deployed.steps_behind(theirs, ours, sizes, outer_lr=0.4), 2.0
    )
    self.assertAlmostEqual(
      deployed.steps_behind(theirs[:1], ours[:1], [None], outer_lr=0.4),
      0.5,
    )
    self.assertEqual(deployed.steps_behind([], [], [], 0.4), np.inf)

  def test_weights_of_a_full_house(self):
    weights = deployed.weights({uid: 100.0 - uid for uid in range(2, 40)})
    self.assertEqual(weights[1], 0.5)
    self.assertLen(weights, 31)
    self.assertAlmostEqual(sum(weights.values()), 1.0)
    self.assertAlmostEqual(weights[2] / weights[21], 2.0)
    # The first reserve may not earn more than half of the last contributor.
    self.assertAlmostEqual(weights[22] / weights[21], 0.5)
    self.assertAlmostEqual(weights[23] / weights[22], 0.5)

  def test_weights_without_reserves(self):
    weights = deployed.weights({5: 2.0, 7: 1.0, 9: 0.0, 11: -1.0})
    self.assertAlmostEqual(weights[5], 1 / 3)
    self.assertAlmostEqual(weights[7], 1 / 6)
    self.assertEqual(set(weights), {1, 5, 7})
    self.assertEqual(deployed.weights({}), {1: 1.0})

  def test_slash(self):
    peer = deployed.Peer(final=4.0, average=0.5)
    half = deployed.slash(peer, 0.5)
    self.assertEqual((half.final, half.average), (2.0, 0.25))
    below = deployed.Peer(final=-4.0, average=0.5)
    self.assertEqual(deployed.slash(below, 0.5), below)
    self.assertEqual(deployed.slash(deployed.Peer(final=1.9e-4), 0.5).final, 0)

  @parameterized.parameters(
    ([True] * 7, False),
    ([True] * 4 + [False] * 4, True),
    ([True] * 3 + [False] * 5, False),
    ([True] * 4 + [False] * 5, False),
  )
  def test_mostly_missing(self, missed, banned):
    self.assertEqual(deployed.mostly_missing(missed), banned)

  @parameterized.parameters(
    ([True] * 4 + [False] * 4, 1.0),
    ([True] * 5 + [False] * 3, 0.25),
    ([True] * 7, 1.0),
  )
  def test_negative_factor(self, negative, factor):
    self.assertEqual(deployed.negative_factor(negative), factor)

  def test_spared_by_the_fifth_best(self):
    self.assertTrue(deployed.spared([1, 1, 1, 1, -1, -2]))
    self.assertFalse(deployed.spared([1, 1, 1, 1, 0, -2]))
    self.assertTrue(deployed.spared([1, -1]))
    self.assertFalse(deployed.spared([]))

  def test_excluded_until_one_positive(self):
    self.assertFalse(deployed.excluded([True, True]))
    self.assertTrue(deployed.excluded([True, True, True, True]))
    self.assertFalse(deployed.excluded([True] * 4 + [False]))
    self.assertFalse(deployed.excluded([True] * 4 + [False, True]))

  def test_inactive(self):
    peer = deployed.Peer(final=4.0, average=0.5)
    self.assertEqual(deployed.inactive(peer, 1).final, 3.0)
    self.assertEqual(deployed.inactive(peer, 1).average, 0.5)
    self.assertEqual(deployed.inactive(peer, 3).final, 3.0)
    self.assertEqual(deployed.inactive(peer, 4), deployed.Peer())

  def test_bins(self):
    few = deployed.bins({uid: float(uid) for uid in range(99)})
    self.assertLen(few, 1)
    many = deployed.bins({uid: float(uid) for uid in range(102)})
    self.assertEqual([len(b) for b in many], [21, 21, 20, 20, 20])
    self.assertEqual(many[0][0], 101)

  def test_weighted_sample(self):
    draw = random.Random(0)
    counts = {uid: 0 for uid in range(3)}
    for _ in range(300):
      chosen = deployed.weighted_sample({0: 1, 1: 1, 2: 20}, 2, draw)
      self.assertLen(set(chosen), 2)
      counts[chosen[0]] += 1
    self.assertGreater(counts[2], 250)
    self.assertLen(deployed.weighted_sample({0: 1}, 5, draw), 1)

  def test_overlap_counts_vectors_as_deployed(self):
    matrix = np.arange(64).reshape(2, 32)
    vector = np.arange(64)[None]
    far = matrix + 1000
    self.assertEqual(deployed.overlap([matrix], [far]), 0.0)
    self.assertEqual(deployed.overlap([matrix, vector], [far, vector]), 0.5)

  def test_offender(self):
    self.assertEqual(deployed.offender(3, 7, {3: 5.0, 7: 4.0}), 3)
    self.assertEqual(deployed.offender(3, 7, {3: 4.0, 7: 5.0}), 7)
    self.assertEqual(deployed.offender(3, 7, {3: 4.0, 7: 4.0}), 3)
    self.assertEqual(deployed.offender(3, 7, {3: 4.0}), 3)


if __name__ == '__main__':
  absltest.main()
