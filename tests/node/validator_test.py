"""A validator's handlers: it keeps the history that others need."""

import types
from unittest import mock

from absl.testing import absltest

from covenant.chain import interface as chain_lib
from covenant.gauntlet import checks as checks_lib
from covenant.node import follow
from covenant.node import validator as validator_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib
from tests.node import network as network_lib

Phase = round_lib.Phase
command = network_lib.command


class ValidatorTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.validator(3)
    self.schedule = self.node.schedule

  def call(self, phase, round_index=0):
    return self.node.handlers[phase](
      self.node, command(phase, round_index), self.network.block
    )

  def key(self, kind, round_index=0, digest=None):
    return self.node.objects.key(kind, round_index, digest)

  def test_its_phases_are_those_of_a_validator(self):
    self.assertEqual(self.node.phases, round_lib.VALIDATOR)

  def test_a_policy_is_called_in_its_phases(self):
    score = mock.Mock()
    policy = validator_lib.HONEST._replace(score=score)
    handlers = validator_lib.handlers(policy)
    self.assertIs(handlers[Phase.SCORE], score)
    self.assertIs(handlers[Phase.DECIDE], follow.decide)

  def test_a_round_of_nobody_is_in_the_history_too(self):
    self.node.state = self.node.state._replace(
      decision=round_lib.Decision(None)
    )
    self.node.role.collected = collected = object()
    self.call(Phase.APPLY)
    self.assertEqual(self.node.role.to_keep, [(self.key('history'), b'')])
    self.assertIs(self.node.role.to_score, collected)
    self.assertIsNone(self.node.role.collected)

  def test_applying_notes_the_payloads_and_the_manifest(self):
    self.network.block = self.schedule.put_opens(0)
    payload = self.network.payload(self.network.miner(1))
    digest = self.network.publish(1, 0, payload)
    self.network.block = self.schedule.start(1)
    data = self.network.manifest(4, [(1, digest)])
    voted = self.network.propose(4, data)
    self.network.block = self.schedule.decision_block(0) + 1
    self.node.state = self.node.state._replace(
      decision=round_lib.Decision(voted)
    )
    self.call(Phase.APPLY)
    self.assertEqual(
      self.node.role.to_keep,
      [
        (self.key('payloads', 0, digest), payload),
        (self.key('history'), data),
      ],
    )

  def test_what_the_store_does_not_take_now_is_stored_later(self):
    objects, role = self.node.objects, self.node.role
    role.to_keep = [(self.key('history', r), b'') for r in range(2)]
    self.node.state = round_lib.RoundState(2, kept=False)
    full = store_lib.StoreUnavailableError('no route')
    with mock.patch.object(objects, 'put_once', side_effect=[None, full]):
      with self.assertRaises(store_lib.StoreUnavailableError):
        self.call(Phase.KEEP, 2)
    self.assertEqual(role.to_keep, [(self.key('history', 1), b'')])
    self.call(Phase.KEEP, 2)
    self.assertEmpty(role.to_keep)
    self.assertEqual(objects.rounds('history', objects.bucket), [1])

  def test_checkpoints_are_published_when_due(self):
    every = network_lib.CONFIG.checkpoint.publish
    for completed in (every - 1, every, network_lib.CONFIG.rounds):
      self.node.state = round_lib.RoundState(completed, kept=False)
      with mock.patch.object(published_checkpoint, 'publish') as publish:
        with mock.patch.object(published_checkpoint, 'prune', return_value=0):
          self.call(Phase.KEEP, completed)
      self.assertEqual(publish.called, completed != every - 1, completed)

  def test_replayed_rounds_join_its_history(self):
    self.node.role.collected = self.node.role.to_score = object()
    self.node.state = round_lib.RoundState(3)
    replayed = {1: b'one', 2: b''}
    with mock.patch.object(follow, 'catch_up', return_value=replayed):
      self.call(Phase.CATCH_UP)
    self.assertEqual(
      self.node.role.to_keep,
      [(self.key('history', 1), b'one'), (self.key('history', 2), b'')],
    )
    self.assertFalse(self.node.state.kept)
    self.assertIsNone(self.node.role.collected)
    self.assertIsNone(self.node.role.to_score)


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
      validator_lib.score(self.node, COMMAND, 0)
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

  def test_weights_that_are_in_force_are_reported_once(self):
    role, chain = self.node.role, self.node.chain
    self.score()
    self.assertEqual(role.sent, [(0, {0: 0.5, 1: 0.5})])
    for found, events in ((None, []), ('', [('weights in force', '')])):
      with mock.patch.object(chain, 'check_weights', return_value=found) as ask:
        self.score()
      ask.assert_called_once_with({0: 0.5, 1: 0.5}, 0)
      self.assertEqual([(e.what, e.error) for e in self.network.events], events)
    with mock.patch.object(chain, 'check_weights') as ask:
      self.score()
    ask.assert_not_called()

  def test_weights_that_are_not_in_force_are_an_error_with_its_reason(self):
    role, chain = self.node.role, self.node.chain
    role.sent = [(1, {0: 1.0}), (9, {1: 1.0})]
    reason = 'weights of block 1 are not in force: no validator permit'
    answers = {1: reason, 9: None}
    with mock.patch.object(
      chain, 'check_weights', side_effect=lambda weights, sent: answers[sent]
    ):
      self.score()
    (event,) = self.network.events
    self.assertEqual((event.what, event.error), ('weights in force', reason))
    self.assertLen(role.sent, 1)  # those that it has just set

  def test_later_weights_replace_earlier_ones(self):
    role, chain = self.node.role, self.node.chain
    role.sent = [(1, {0: 1.0}), (9, {1: 1.0})]
    answers = {1: 'not in force', 9: ''}
    with mock.patch.object(
      chain, 'check_weights', side_effect=lambda weights, sent: answers[sent]
    ):
      self.score()
    self.assertEqual([e.error for e in self.network.events], [''])

  def test_a_chain_that_does_not_answer_is_asked_again(self):
    self.node.role.sent = [(1, {0: 1.0})]
    error = chain_lib.ChainUnreachableError('no route')
    with mock.patch.object(self.node.chain, 'check_weights', side_effect=error):
      self.score()
    self.assertEmpty(self.network.events)
    self.assertLen(self.node.role.sent, 2)

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
    found = validator_lib._with_late(
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
