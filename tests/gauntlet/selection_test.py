import dataclasses
import math

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from covenant import config as config_lib
from covenant.gauntlet import ratings
from covenant.gauntlet import selection

CONFIG = config_lib.Gauntlet(contributors=4, probation=0.25)
KNOWN = {'evaluations': 9, 'gain': 1.0, 'sigma': 2.0}


def state(**standings):
  """State of uid -> changes; by default each is known and helps."""
  return ratings.Ratings(
    9,
    {
      int(name[1:]): dataclasses.replace(
        ratings.Standing(name, 0, 0), **(KNOWN | changes)
      )
      for name, changes in standings.items()
    },
  )


def choose(standings, config=CONFIG, seed=b's', **kwargs):
  eligible = kwargs.pop('eligible', standings.standings)
  return selection.contributors(standings, eligible, config, 10, seed, **kwargs)


class ContributorsTest(parameterized.TestCase):
  def test_the_best_rated_then_the_reserves(self):
    standings = state(**{f'u{i}': {'mu': 20.0 + i} for i in range(6)})
    chosen = choose(standings)
    self.assertEqual(chosen.uids, [2, 3, 4, 5])
    self.assertEqual(chosen.reserves, [1, 0])
    self.assertEqual(set(chosen.reasons), set(range(6)))

  def test_newcomers_have_their_share_and_no_more(self):
    new = {'evaluations': 0, 'gain': 0.0, 'sigma': 25 / 3}
    standings = state(
      **{f'u{i}': {} for i in range(5)},
      **{f'u{i}': new for i in range(5, 50)},
    )
    seen = set()
    for seed in range(40):
      chosen = choose(standings, seed=bytes([seed])).uids
      self.assertEqual(sum(uid >= 5 for uid in chosen), 1)
      seen |= set(chosen)
    self.assertGreater(len(seen), 15)

  def test_places_that_nobody_else_wants(self):
    new = {'evaluations': 0, 'gain': 0.0, 'sigma': 25 / 3}
    standings = state(u0={}, **{f'u{i}': new for i in range(1, 5)})
    self.assertLen(choose(standings).uids, 4)
    self.assertIn(0, choose(standings).uids)

  @parameterized.parameters(
    {'gain_signs': (1, 1, -1)},
    {'gain': -0.1},
    {'gain': 0.09},
    {'penalties': (ratings.Penalty('COPY', 0.25, 10),)},
  )
  def test_not_heard(self, **changes):
    chosen = choose(state(u0={}, u1={'mu': 40.0} | changes))
    self.assertEqual(chosen.uids, [0])
    self.assertNotIn('counts', chosen.reasons[1])

  def test_heard_again_when_the_penalty_ends(self):
    past = (ratings.Penalty('COPY', 0.25, 9),)
    self.assertEqual(choose(state(u0={}, u1={'penalties': past})).uids, [0, 1])

  def test_never_empty(self):
    bad = {'gain_signs': (-1,)}
    standings = state(u0=bad, u1=bad | {'mu': 26.0}, u2=bad)
    self.assertEqual(choose(standings).uids, [1])
    self.assertEqual(choose(standings, eligible=[]).uids, [])

  def test_without_evaluations_all_are_equal(self):
    config = dataclasses.replace(CONFIG, evaluate=0)
    standings = state(**{f'u{i}': {'mu': 20.0 + i} for i in range(8)})
    seen = set()
    for seed in range(20):
      chosen = choose(standings, config, seed=bytes([seed])).uids
      self.assertLen(chosen, 4)
      seen |= set(chosen)
    self.assertEqual(seen, set(range(8)))


class ToEvaluateTest(absltest.TestCase):
  @settings(deadline=None)
  @given(
    st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31), st.data()
  )
  def test_everybody_within_the_bound(self, n, count, seed, data):
    """Under absences and registrations chosen to hurt."""
    draw = np.random.default_rng(seed)
    keep_away = data.draw(st.floats(0, 0.6))
    bound = math.ceil(n / math.ceil(count / 2))
    now = ratings.Ratings()
    identity = {u: ratings.Identity(f'{u}', 0) for u in range(n)}
    sent = dict.fromkeys(range(n), 0)
    for r in range(40):
      if r % 3 == 2:
        uid = int(draw.integers(n))
        identity[uid] = ratings.Identity(f'{uid}', r)
        sent[uid] = 0
      now = ratings.admit(now, r, identity)
      valid = [u for u in range(n) if draw.random() >= keep_away]
      chosen = selection.to_evaluate(now, valid, count, r, bytes([r]))
      self.assertLen(chosen, min(count, len(valid)))
      self.assertContainsSubset(chosen, valid)
      standings = dict(now.standings)
      for uid in valid:
        sent[uid] += 1
        self.assertLessEqual(sent[uid], bound)
      for uid in chosen:
        sent[uid] = 0
        standings[uid] = dataclasses.replace(
          standings[uid], evaluated=r, sigma=float(draw.uniform(1, 8))
        )
      now = ratings.Ratings(r, standings)

  def test_more_often_where_uncertain(self):
    uids = range(20)
    standings = state(
      **{f'u{i}': {'sigma': 8.0 if i < 10 else 2.0} for i in uids}
    )
    counts = np.zeros(20)
    for seed in range(100):
      for uid in selection.to_evaluate(
        standings, uids, 6, 10, seed.to_bytes(2, 'little')
      ):
        counts[uid] += 1
    # Nobody waits longer than another here: the queue serves uids 0 to 2.
    self.assertEqual(counts[:3].tolist(), [100] * 3)
    self.assertEqual(counts.sum(), 600)
    self.assertGreater(counts[3:10].mean(), 5 * counts[10:].mean())


if __name__ == '__main__':
  absltest.main()
