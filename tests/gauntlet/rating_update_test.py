import dataclasses
import json

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from covenant import config as config_lib
from covenant.gauntlet import checks
from covenant.gauntlet import incentives
from covenant.gauntlet import rating_update
from covenant.gauntlet import ratings
from covenant.gauntlet import scores as scores_lib
from covenant.gauntlet import selection
from covenant.gauntlet import units as units_lib
from covenant.gauntlet import work as work_lib

Finding = checks.CheckFinding
CONFIG = config_lib.Gauntlet(penalty_rounds=5, memory=10)


def score(gain=0.003, proof=0.003, error=0.001):
  return scores_lib.Score(
    loss_random=2.0,
    loss_own=2.0,
    gain=gain,
    gain_error=error,
    own_gain=gain + proof,
    own_gain_error=error,
    proof=proof,
    proof_error=error,
  )


def units(found, gain):
  """The score, if all units gain alike, in noises of one."""
  noise = 0.001
  return dataclasses.replace(
    found,
    parts=(gain * noise,) * units_lib.PARTS,
    noise=noise,
    level=gain * noise,
    square=gain**2 * noise,
  )


def identities(count):
  return {uid: ratings.Identity(f'hotkey{uid}', 7) for uid in range(count)}


def play(state, round_index, scores, verdicts=None, who=None, config=CONFIG):
  """A round in which `verdicts` name who is not valid; all scores count."""
  verdicts = dict.fromkeys(scores, Finding.VALID) | (verdicts or {})
  report = checks.CheckReport(
    {uid: checks.CheckResult(v, 'a detail') for uid, v in verdicts.items()},
    False,
  )
  scores = {u: s for u, s in scores.items() if verdicts[u] is Finding.VALID}
  who = who or identities(max(verdicts) + 1)
  return rating_update.update(state, round_index, who, report, scores, config)


class RatingsTest(parameterized.TestCase):
  def has_proof(self, count=4, rounds=8):
    state = ratings.Ratings()
    for r in range(rounds):
      state = play(state, r, dict.fromkeys(range(count), score())).ratings
    return state

  def test_equals_are_rated_and_paid_alike(self):
    state = self.has_proof()
    standings = state.standings.values()
    self.assertLen({s.mu for s in standings}, 1)
    self.assertAlmostEqual(state.standings[0].mu, 25.0, places=6)
    self.assertEqual({s.score for s in standings}, {1.0})

  def test_one_work_under_many_uids_that_say_a_part_each_pays_like_one(self):
    """All four gain like a whole one, and say that they are a quarter."""
    state = ratings.Ratings()
    quarter = dataclasses.replace(score(), work=0.25)
    for r in range(8):
      scores = {uid: score() if uid < 3 else quarter for uid in range(7)}
      state = play(state, r, scores).ratings
    weights = incentives.weights(state, CONFIG)
    self.assertAlmostEqual(sum(weights[uid] for uid in range(3, 7)), weights[0])

  def test_a_miss_costs_a_share_of_the_average_and_no_penalty(self):
    state = self.has_proof()
    good = dict.fromkeys(range(4), score())
    for finding in (
      Finding.MISSING,
      Finding.LATE,
      Finding.EARLY,
      Finding.ABSENT,
      Finding.UNREACHABLE,
      Finding.UNSYNCHRONIZED,
    ):
      after = play(state, 8, good, {1: finding}).ratings.standings[1]
      self.assertEqual(after.penalties, ())
      self.assertAlmostEqual(after.score, 8 / 9)
      self.assertLess(after.mu, state.standings[1].mu)

  def test_it_does_not_pay_to_stay_away(self):
    state = self.has_proof()
    scores = {0: score(), 1: score(gain=-0.01)}
    verdicts = {2: Finding.MISSING, 3: Finding.REFUSED}
    after = play(state, 8, scores, verdicts).ratings.standings
    self.assertGreater(after[1].mu, after[2].mu)
    self.assertEqual(after[2].mu, after[3].mu)

  def test_silence_ends_the_pay(self):
    state = self.has_proof()
    good = dict.fromkeys(range(3), score())
    for r in range(8, 11):
      self.assertGreater(state.standings[3].score, 0)
      state = play(state, r, good, {3: Finding.MISSING}).ratings
    self.assertEqual(state.standings[3].score, 0)
    state = play(state, 11, dict.fromkeys(range(4), score())).ratings
    self.assertGreater(state.standings[3].score, 0.5)

  def test_a_fault_of_the_network_costs_nothing_for_a_while(self):
    state = self.has_proof()
    verdicts = dict.fromkeys(range(1, 4), Finding.EXCUSED)
    for r in range(8, 10):
      state = play(state, r, {0: score()}, verdicts).ratings
      for uid in range(1, 4):
        self.assertEqual(state.standings[uid].score, 1.0)
        self.assertEqual(state.standings[uid].presence, 1.0)
        self.assertIn(uid, ratings.answering(state))
    state = play(state, 10, {0: score()}, verdicts).ratings
    self.assertEqual(state.standings[1].score, 0.0)
    self.assertEqual(ratings.answering(state), {0: 1.0})
    good = dict.fromkeys(range(4), score())
    self.assertEqual(play(state, 11, good).ratings.standings[1].score, 1.0)

  def test_the_author_of_similar_messages_is_who_proves_the_work(self):
    """A shadow repeats the training of uid 0, and both are TWINs for ever."""
    state = ratings.Ratings()
    twin = checks.CheckResult(
      Finding.TWIN, similarity=1.0, twin=1, origin=0, twins=2
    )
    found = {u: checks.CheckResult(Finding.VALID) for u in range(6)}
    found |= {0: twin, 1: twin._replace(twin=0)}
    for r in range(30):
      scores = dict.fromkeys(range(6), score(proof=0.001))
      scores[1] = score(proof=0.0)
      report = checks.CheckReport(found, False)
      state, decisions = rating_update.update(
        state, r, identities(6), report, scores, CONFIG
      )
      if r == 1:  # nobody has proven anything
        self.assertFalse(state.has_proof)
        early = incentives.weights(state, CONFIG)
        self.assertAlmostEqual(early[0], early[1])
        self.assertLess(early[0], early[2])
    self.assertEqual(state.standings[0].penalties, ())
    weights = incentives.weights(state, CONFIG)
    self.assertEqual(weights[0], weights[2])
    self.assertNotIn(1, weights)
    self.assertTrue(state.standings[1].penalties)
    self.assertIn('one of them counts', ' '.join(decisions[0]['reasons']))

  def test_who_is_too_much_like_others_for_long_is_punished(self):
    state, good = self.has_proof(), dict.fromkeys(range(4), score())
    good[2] = score(proof=0.0)
    likeness = {0: 0.0, 1: 0.1, 2: 0.26, 3: 0.0}
    for r in range(8, 24):
      likeness[3] = 0.4 if r == 9 else 0.0  # once is chance
      found = {
        uid: checks.CheckResult(Finding.VALID, similarity=x, twin=0)
        for uid, x in likeness.items()
      }
      report = checks.CheckReport(found, False)
      update = rating_update.update(
        state, r, identities(4), report, good, CONFIG
      )
      state = update.ratings
    penalties = {u: s.penalties for u, s in state.standings.items()}
    self.assertEqual([penalties[u] for u in (0, 1, 3)], [()] * 3)
    (penalty,) = penalties[2]
    self.assertEqual(penalty.reason, ratings.SIMILAR)
    text = '; '.join(update.decisions[2]['reasons'])
    self.assertIn('its messages resemble those of others', text)

  def test_where_all_are_alike_nobody_is_punished(self):
    state = self.has_proof()
    found = {
      uid: checks.CheckResult(Finding.VALID, similarity=0.3 + 0.1 * uid, twin=0)
      for uid in range(4)
    }
    good = dict.fromkeys(range(4), score())
    for r in range(8, 40):
      report = checks.CheckReport(found, False)
      state = rating_update.update(
        state, r, identities(4), report, good, CONFIG
      ).ratings
    self.assertEqual([s.penalties for s in state.standings.values()], [()] * 4)

  @parameterized.parameters(*ratings.FACTORS.items())
  def test_a_penalty_outlives_recomputation(self, finding, factor):
    state = self.has_proof()
    good = dict.fromkeys(range(4), score())
    state = play(state, 8, good, {1: finding}).ratings
    for r in range(9, 14):
      standing = state.standings[1]
      self.assertAlmostEqual(standing.raw_score, factor * standing.presence)
      state = play(state, r, good).ratings
    self.assertEqual(state.standings[1].factor(13), factor)
    state = play(state, 14, good).ratings
    self.assertEqual(state.standings[1].penalties, ())
    standing = state.standings[1]
    self.assertLess(standing.presence, 1.0)
    self.assertAlmostEqual(standing.score, standing.presence)

  def test_the_same_offence_again_is_worse(self):
    state = self.has_proof()
    good = dict.fromkeys(range(4), score())
    for r in (8, 10):
      state = play(state, r, good, {1: Finding.REFUSED}).ratings
    self.assertEqual(
      state.standings[1].penalties, (ratings.Penalty('REFUSED', 0.25, 15),)
    )

  def test_negative_twice_is_punished_once_is_not(self):
    state = self.has_proof()
    good = dict.fromkeys(range(3), score())
    state = play(state, 8, good | {3: score(gain=-0.01)}).ratings
    self.assertEqual(state.standings[3].penalties, ())
    state = play(state, 9, good | {3: score(gain=-0.0001)}).ratings
    self.assertEqual(state.standings[3].penalties, ())  # not clearly
    state = play(state, 10, good | {3: score(gain=-0.01)}).ratings
    self.assertEqual(state.standings[3].factor(10), 0.5)

  def test_a_round_in_which_nobody_gains_is_held_against_nobody(self):
    state = self.has_proof()
    bad = dict.fromkeys(range(4), score(gain=-0.01))
    for r in range(8, 12):
      state = play(state, r, bad).ratings
    for standing in state.standings.values():
      self.assertEqual(standing.penalties, ())
      self.assertAlmostEqual(standing.gain, 1.0)

  def test_registered_again_inherits_nothing(self):
    state = self.has_proof()
    good = dict.fromkeys(range(4), score())
    state = play(state, 8, good, {1: Finding.REPLAY}).ratings
    for identity in (
      ratings.Identity('new', 7),
      ratings.Identity('hotkey1', 8),
    ):
      who = identities(4) | {1: identity}
      after = play(state, 9, {0: score(), 1: score()}, who=who).ratings
      self.assertEqual(after.standings[1].evaluations, 1)
      self.assertEqual(after.standings[1].penalties, ())
      self.assertEqual(after.standings[1].admitted, 9)
      self.assertEqual(ratings.admit(state, 9, who).standings[1].gain, 0.0)
    self.assertNotIn(3, ratings.admit(state, 9, identities(3)).standings)

  def test_one_wild_number_moves_nobody_far(self):
    state = self.has_proof(5)
    scores = dict.fromkeys(range(4), score()) | {4: score(gain=1e6, proof=1e6)}
    after = play(state, 8, scores).ratings.standings[4]
    self.assertLess(after.gain, 1.0 + rating_update.LARGEST_GAIN / 9)
    self.assertLess(after.mu - state.standings[4].mu, 5)

  @parameterized.parameters((0.5, 0.0), (0.65, 0.5), (0.85, 1.0))
  def test_part_of_the_usual_proof_is_paid_less(self, part, paid):
    """One message under two uids proves half with each, and is not paid."""
    state = ratings.Ratings()
    shared = score(proof=0.003 * part)
    for r in range(60):
      scores = dict.fromkeys(range(5), score())
      scores |= dict.fromkeys((5, 6), shared)
      state = play(state, r, scores).ratings
    weights = incentives.weights(state, CONFIG)
    self.assertAlmostEqual(weights.get(5, 0.0) / weights[0], paid)

  @given(
    st.lists(st.floats(0.01, 3.0), min_size=1, max_size=8), st.floats(0, 9)
  )
  def test_splitting_work_over_uids_never_pays(self, efforts, returns):
    """Whatever a part of the work gains: effort ** returns."""

    def paid(work):
      standing = ratings.Standing(
        'a', 0, 0, gain=work**returns / work, work=work, presence=1.0
      )
      return work_lib.paid_work(standing)

    split = sum(map(paid, efforts))
    self.assertLessEqual(split, sum(efforts) * (1 + 1e-9))
    if returns >= 1:  # two halves gain at most as much as the whole
      usual = sum(efforts)
      whole = work_lib.paid_work(
        ratings.Standing('a', 0, 0, gain=1.0, work=usual, presence=1.0)
      )
      self.assertLessEqual(split, whole * (1 + 1e-9))

  def test_a_message_that_gains_more_is_not_paid_more(self):
    state = ratings.Ratings()
    for r in range(20):
      scores = dict.fromkeys(range(5), score()) | {5: score(gain=0.02)}
      state = play(state, r, scores).ratings
    weights = incentives.weights(state, CONFIG)
    self.assertAlmostEqual(weights[5], weights[0])

  def test_little_work_proves_nothing_of_the_rest(self):
    """In turn it learns a few sequences by heart, and claims all untrained."""
    state = ratings.Ratings()
    little = dataclasses.replace(score(gain=0.001, proof=0.009), work=1 / 15)
    for r in range(60):
      odd = score(gain=0.001, proof=0.0) if r % 2 else little
      scores = dict.fromkeys(range(5), score()) | {5: odd}
      state = play(state, r, scores).ratings
    weights = incentives.weights(state, CONFIG)
    self.assertLess(weights.get(5, 0.0), 0.07 * weights[0])

  def test_uids_that_do_next_to_nothing_do_not_put_proof_off(self):
    state = ratings.Ratings()
    idle = dataclasses.replace(score(gain=1e-4, proof=0.0), work=1 / 240)
    for r in range(20):
      scores = dict.fromkeys(range(5), score())
      scores |= dict.fromkeys(range(5, 24), idle) | {24: score(proof=0.0)}
      state = play(state, r, scores).ratings
    self.assertTrue(state.has_proof)
    self.assertNotIn(24, incentives.weights(state, CONFIG))

  def test_a_strong_message_pays_for_no_round_without_work(self):
    """It trains every other round, and sends noise in between."""
    state = ratings.Ratings()
    for r in range(60):
      strong = units(score(gain=0.02, proof=0.004), 2.0)
      odd = strong if r % 2 else units(score(gain=0.0, proof=0.0), 0.0)
      scores = dict.fromkeys(range(5), units(score(), 1.0)) | {5: odd}
      state = play(state, r, scores).ratings
    weights = incentives.weights(state, CONFIG)
    self.assertLess(weights[5], 0.5 * weights[0])

  def test_the_first_to_be_certain_does_not_take_all(self):
    state = ratings.Ratings()
    lucky = dict.fromkeys(range(6), score(proof=0.0)) | {6: score()}
    for r in range(10):
      state = play(state, r, lucky).ratings
    self.assertGreater(state.standings[6].score, 0)
    self.assertLen(incentives.weights(state, CONFIG), 7)
    for r in range(10, 20):
      state = play(state, r, dict.fromkeys(range(7), score())).ratings
    self.assertTrue(state.has_proof)
    state = play(state, 20, {}, {6: Finding.LATE}).ratings
    self.assertTrue(ratings.admit(state, 21, identities(20)).has_proof)
    self.assertTrue(ratings.from_json(ratings.to_json(state)).has_proof)

  def test_json_is_exact(self):
    draw = np.random.default_rng(0)
    state = ratings.Ratings()
    for r in range(12):
      scores = {u: score(*draw.normal(size=2), 0.3) for u in range(6)}
      state = play(state, r, scores, {6: Finding.REPLAY}).ratings
    self.assertTrue(any(s.penalties for s in state.standings.values()))
    again = ratings.from_json(ratings.to_json(state))
    self.assertEqual(again, state)
    self.assertEqual(
      play(again, 12, scores, {6: Finding.REFUSED}),
      play(state, 12, scores, {6: Finding.REFUSED}),
    )

  def test_a_round_counts_once(self):
    state = self.has_proof()
    with self.assertRaisesRegex(ValueError, 'expected a round after 7'):
      play(state, 7, {0: score()})

  def test_nobody(self):
    report = checks.CheckReport({}, False)
    update = rating_update.update(ratings.Ratings(), 0, {}, report, {}, CONFIG)
    self.assertEqual(
      update, rating_update.RatingsUpdate(ratings.Ratings(0, {}, False), [])
    )

  def test_without_evaluations_who_is_valid_is_paid_alike(self):
    config = dataclasses.replace(CONFIG, evaluate=0)
    who, report = (
      identities(3),
      {
        uid: checks.CheckResult(finding)
        for uid, finding in enumerate(
          (Finding.VALID, Finding.VALID, Finding.LATE)
        )
      },
    )
    state = rating_update.update(
      ratings.Ratings(), 0, who, checks.CheckReport(report, False), {}, config
    ).ratings
    self.assertEqual(incentives.weights(state, config), {0: 0.5, 1: 0.5})


class ExplainTest(absltest.TestCase):
  def test_every_loss_has_its_reason(self):
    state, records = ratings.Ratings(), []
    good = dict.fromkeys(range(3), score())
    for r in range(8):
      state, decisions = play(state, r, good | {3: score(proof=0.0)})
      records += decisions
    for r, finding in ((8, Finding.REPLAY), (9, Finding.LATE)):
      state, decisions = play(state, r, good, {3: finding})
      records += decisions
    records = json.loads(json.dumps(records, allow_nan=False))
    text = ratings.explain(records, 3)
    for words in (
      'uid 3, hotkey hotkey3, after round 10',
      'score 0.000',
      Finding.REPLAY.value,
      Finding.LATE.value,
      'a detail',
      'x 0.25 until round 13',
      'own data gains 0.00 standard errors more',
      '8 of 10 rounds valid, 8 evaluated',
    ):
      self.assertIn(words, text)
    healthy = ratings.explain(records, 0)
    self.assertIn('score 1.000', healthy)
    self.assertNotIn(' x 0', healthy.split('Last rounds')[0])
    self.assertIn('no validator', ratings.explain(records, 9))


class SimulationTest(absltest.TestCase):
  """Draws of what was measured in training, instead of training."""

  HONEST = range(12)
  # gain and proof, in standard errors of one evaluation (docs/gauntlet.md).
  BAD = {
    12: (3.0, 0.0),  # trains on other data
    13: (3.0, 0.0),  # copies within one block
    14: (0.0, 0.0),  # noise
    15: (-3.0, -3.0),  # flips the sign
    16: (3.0, 0.8),  # one message for three uids
    17: (3.0, 0.8),
    18: (3.0, 0.8),
    19: (3.0, 2.6),  # honest for 20 rounds, then flips the sign
  }

  def test_forty_percent_bad(self):
    for seed in range(3):
      self.simulate(seed)

  def simulate(self, seed):
    draw = np.random.default_rng(seed)
    state, who = ratings.Ratings(), identities(20)
    config = config_lib.Gauntlet(evaluate=10)
    paid, total = dict.fromkeys(who, 0.0), 0.0
    for r in range(90):
      state = ratings.admit(state, r, who)
      verdicts = dict.fromkeys(who, Finding.VALID)
      missed = r % 30  # each honest one misses a round now and then
      if missed in self.HONEST:
        verdicts[missed] = Finding.MISSING
      valid = [u for u in who if verdicts[u] is Finding.VALID]
      chosen = selection.contributors(state, valid, config, r, b's')
      turn = selection.to_evaluate(state, valid, config.evaluate, r, b's')
      scores = {}
      for uid in turn:
        gain, proof = self.BAD.get(uid, (3.0, 2.6))
        if uid == 19 and r >= 20:
          gain, proof = -3.0, -3.0
        gain, proof = np.array([gain, proof]) + draw.normal(size=2)
        scores[uid] = score(float(gain), float(proof), 1.0)
      state, _ = play(state, r, scores, verdicts, who, config)
      weights = incentives.weights(state, config)
      if r >= 40:
        self.assertNoCommonElements(chosen.uids, {15, 19})
        total += 1
        for uid, weight in weights.items():
          paid[uid] += weight
    bad = [paid[u] / total for u in self.BAD]
    honest = [paid[u] / total for u in self.HONEST]
    auc = np.mean([h > b for h in honest for b in bad])
    self.assertEqual(auc, 1.0)
    self.assertGreater(min(honest), 0.5 / 12)
    self.assertLess(sum(bad), 0.01)
    for uid in self.HONEST:
      self.assertEqual(state.standings[uid].penalties, ())
      self.assertGreater(weights[uid], 0)


if __name__ == '__main__':
  absltest.main()
