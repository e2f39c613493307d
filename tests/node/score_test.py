"""A validator's weights, and the findings about late commitments."""

import types
from unittest import mock

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.gauntlet import checks as checks_lib
from covenant.node import score as score_lib
from covenant.protocol import round as round_lib
from tests.node import network as network_lib

COMMAND = network_lib.command(round_lib.Phase.SCORE, 1)
Finding = checks_lib.CheckFinding


class ScoreTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.validator(3)
    self.node.role.weights = {0: 0.5, 1: 0.5}

  def score(self, error=None):
    with mock.patch.object(
      self.node.chain, 'set_weights', side_effect=error
    ) as set_weights:
      score_lib.score(self.node, COMMAND, 0)
    return set_weights

  def test_weights_are_set_once(self):
    self.score().assert_called_once_with({0: 0.5, 1: 0.5})
    self.score().assert_not_called()

  def test_weights_are_kept_while_the_chain_is_unreachable(self):
    with self.assertRaises(chain_lib.ChainUnreachableError):
      self.score(chain_lib.ChainUnreachableError('no route'))
    self.score().assert_called_once_with({0: 0.5, 1: 0.5})

  def test_rejected_weights_are_dropped(self):
    with self.assertRaises(chain_lib.ChainRejectedError):
      self.score(chain_lib.ChainRejectedError('too often'))
    self.score().assert_not_called()

  def test_a_round_that_it_did_not_see_is_not_judged(self):
    verdicts = []
    self.node.role.announce = verdicts.append
    self.score()
    self.assertEmpty(verdicts)
    self.assertEmpty(self.node.role.to_keep)

  def test_a_commitment_after_the_window_is_late(self):
    schedule = self.node.schedule
    self.network.block = schedule.start(1)
    self.network.commit(0, 0, b'd' * 32)
    self.network.commit(1, 1, b'd' * 32)  # of the next round
    self.network.block = schedule.decision_block(0)
    missing = checks_lib.CheckResult(Finding.MISSING)
    report = checks_lib.CheckReport(dict.fromkeys((0, 1, 2), missing), False)
    found = score_lib._with_late(
      self.node, 0, types.SimpleNamespace(report=report)
    )
    self.assertEqual(
      {uid: check.finding for uid, check in found.checks.items()},
      {0: Finding.LATE, 1: Finding.MISSING, 2: Finding.MISSING},
    )
    self.assertGreaterEqual(found.checks[0].block, schedule.start(1))
    self.assertEqual(report.checks[0].finding, Finding.MISSING)


if __name__ == '__main__':
  absltest.main()
