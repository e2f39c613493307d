"""Tests of scores and pay by the deployed rules."""

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.gauntlet import checks
from covenant.gauntlet import deployed
from covenant.gauntlet import deployed_update
from covenant.gauntlet import ratings
from covenant.gauntlet import scores as scores_lib
from experiments import gauntlet_pay
from tests import helpers

Finding = checks.CheckFinding
CONFIG = config_lib.Gauntlet(rules='templar')


def score(gain=0.01, own=0.02):
  return scores_lib.Score(2.0, 2.0, gain, 0.001, own, 0.001, own - gain, 0.001)


def play(state, r, scores, missing=()):
  found = {u: checks.CheckResult(Finding.VALID) for u in scores}
  found |= {u: checks.CheckResult(Finding.MISSING) for u in missing}
  who = {u: ratings.Identity(f'key{u}', 0) for u in found}
  report = checks.CheckReport(found, False)
  return deployed_update.update(state, r, who, report, scores, CONFIG).ratings


class DeployedUpdateTest(absltest.TestCase):
  def run_rounds(self, rounds=12, **odd):
    state = ratings.Ratings()
    for r in range(rounds):
      scores = dict.fromkeys(range(4), score()) | {4: score(**odd)}
      state = play(state, r, scores)
    return state

  def test_the_final_score_is_the_deployed_one(self):
    state = self.run_rounds(12)
    standing = state.standings[0]
    average = 0.0
    for _ in range(12):
      average = deployed.moving_average(average, 0.01, 0.005)
    self.assertEqual(standing.proof, average)
    peer = deployed.Peer(
      average=average, mu=standing.mu, sigma=standing.sigma, sync=1.0
    )
    self.assertEqual(standing.score, deployed.final_score(peer, 11))

  def test_who_gains_more_is_paid_more_by_rank(self):
    weights = deployed_update.weights(self.run_rounds(gain=0.03, own=0.05))
    self.assertAlmostEqual(sum(weights.values()), 1.0)
    self.assertEqual(max(weights, key=weights.get), 4)
    self.assertAlmostEqual(weights[4] / min(weights.values()), 2.0)

  def test_own_data_that_gains_less_pays_nothing(self):
    weights = deployed_update.weights(self.run_rounds(own=0.005))
    self.assertNotIn(4, weights)
    self.assertLen(weights, 4)

  def test_a_miss_costs_a_quarter_then_half_then_all(self):
    state, found = self.run_rounds(), []
    good = dict.fromkeys(range(4), score())
    for r in range(12, 15):
      before = state.standings[4].score
      state = play(state, r, good, [4])
      found.append(state.standings[4].score / before if before else 0.0)
    self.assertEqual([round(x, 6) for x in found], [0.75, 0.5, 0.0])

  @pytest.mark.slow
  def test_a_run_by_these_rules(self):
    config = helpers.tiny('gauntlet.rules=templar', 'adversaries=noise')
    host = host_lib.Host(config, dataset.load(config))
    verdicts = []
    host.announce = lambda uid, verdict: verdicts.append(verdict)
    for _ in range(3):
      host.round()
    weights = verdicts[-1].weights
    noise = config.miners - 1
    self.assertGreater(max(weights.values()), weights.get(noise, 0.0))
    again = ratings.from_json(
      ratings.to_json(host.validators[0].role.standings)
    )
    self.assertEqual(again, host.validators[0].role.standings)
    counted = gauntlet_pay.deployed_weights(
      [v.decisions for v in verdicts], config.gauntlet
    )
    self.assertEqual(counted[-1], weights)


if __name__ == '__main__':
  absltest.main()
