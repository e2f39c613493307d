"""Tests of adversaries that harm the model: messages and data."""

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.adversaries import base
from covenant.adversaries import messages
from covenant.adversaries import poisoning
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from tests import helpers
from tests.node import network as network_lib

Phase = round_lib.Phase
HONEST = miner_lib.HONEST
command = network_lib.command


def flat(miner, message):
  dense = messages.dense(miner, message)
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(dense)])


class PoisoningTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.network.block = 1
    self.miner = self.network.miner(0, names={0: 'little', 2: 'little'})
    self.honest = flat(self.miner, network_lib.message(0))

  def sent(self, policy, round_index=0):
    """The delta that a policy sends, having trained as the slot does."""
    self.network.block = self.miner.schedule.start(round_index) + 1
    task = miner_lib.task(self.miner, round_index)
    batches = list(policy.batches(self.miner, task))
    params = self.miner.shared.params
    work = policy.train(self.miner, task, params, batches).result()
    return flat(self.miner, work.message)

  def rush(self, policy, policies_before=(1,)):
    """The delta that a rushing miner commits to once others have sent."""
    self.network.block = self.miner.schedule.put_opens(0)
    for uid in policies_before:
      data = self.network.payload(self.network.miner(uid))
      self.network.publish(uid, 0, data)
    self.network.block += 3
    policy.commit(self.miner, command(Phase.COMMIT), self.network.block)
    self.network.block += 2
    made = self.miner.role.contribution.result()
    objects = self.miner.objects
    digest = self.network.read().commitments[0].digest
    objects.put_once(objects.key('payloads', 0, digest), made.payload)
    task = miner_lib.task(self.miner, 0)
    found = base.published(self.miner, task, self.network.read(), [0])
    return flat(self.miner, found[0])

  def test_scaled_multiplies_every_value(self):
    found = self.sent(poisoning.scaled(HONEST, -20.0))
    np.testing.assert_allclose(found, -20 * self.honest, rtol=2e-2)

  def test_intermittent_goes_uphill_every_fourth_round(self):
    policy = poisoning.intermittent(HONEST)
    uphill = [np.dot(self.sent(policy, r), self.honest) < 0 for r in range(8)]
    self.assertEqual(uphill, [r % 4 == 3 for r in range(8)])

  def test_a_sleeper_attacks_while_it_is_well_paid_and_at_last_always(self):
    policy = poisoning.sleeper(HONEST, earliest=2, latest=4)

    def attacks(round_index):
      return np.dot(self.sent(policy, round_index), self.honest) < 0

    self.miner.chain.earned = lambda block: {0: 9.0, 1: 1.0}
    self.assertEqual([attacks(r) for r in (1, 2, 3)], [False, True, True])
    self.miner.chain.earned = lambda block: {0: 1.0, 1: 9.0}
    self.assertEqual([attacks(r) for r in (2, 3, 4)], [False, False, True])

  def test_colluders_push_what_nobody_else_sends_all_alike(self):
    found = self.sent(poisoning.colluder(HONEST))
    pushed = (found != 0) & (self.honest == 0)
    self.assertGreater(np.count_nonzero(pushed), 0)
    self.assertTrue((found[pushed] > 0).all())
    self.assertGreater(np.dot(found, self.honest), 0)
    # The elements are of the round, not of the miner.
    mine, self.miner = self.miner, self.network.miner(2)
    other = self.sent(poisoning.colluder(HONEST))
    honest = flat(mine, network_lib.message(2))
    free = (honest == 0) & (self.honest == 0)
    np.testing.assert_array_equal(pushed[free], other[free] != 0)

  @pytest.mark.slow
  def test_noise_and_zeros_are_sent_untrained(self):
    noise = self.sent(poisoning.noise(HONEST))
    self.assertLess(abs(np.dot(noise, self.honest)), 0.2 * norms(noise, self))
    self.assertEqual(np.abs(self.sent(poisoning.zeros(HONEST))).max(), 0)
    self.assertEmpty(self.miner.role.slot.trained)

  def test_rushing_waits_until_half_of_the_others_are_there(self):
    policy = poisoning.inner_product(HONEST)
    alone = self.network.miner(0, names={0: 'inner-product'})
    self.network.block = self.miner.schedule.put_opens(0)
    self.network.publish(1, 0, self.network.payload(self.network.miner(1)))
    self.network.block += 3
    with self.assertRaises(node_lib.RetryLaterError):
      policy.commit(alone, command(Phase.COMMIT), self.network.block)
    self.assertIsNone(alone.role.contribution.result())

  @parameterized.parameters(
    (poisoning.inner_product, -1), (poisoning.little, None)
  )
  def test_rushing_answers_what_the_others_sent(self, wrap, sign):
    self.miner = self.network.miner(0, names={0: 'rushing'})
    found = self.rush(wrap(HONEST), (1, 2))
    mean = sum(flat(self.miner, network_lib.message(u)) for u in (1, 2)) / 2
    if sign is not None:
      self.assertLess(np.dot(found, mean), 0)
    # At a norm that a median clip lets pass.
    sizes = [
      np.linalg.norm(flat(self.miner, network_lib.message(u))) for u in (1, 2)
    ]
    self.assertLess(np.linalg.norm(found), 1.1 * max(sizes))
    self.assertEqual(self.miner.role.contribution.result().tokens, 0)

  def test_label_flip_changes_every_second_token_under_a_right_receipt(self):
    policy = poisoning.label_flip(HONEST)
    task = miner_lib.task(self.miner, 0)
    clean = [np.array(x) for x in HONEST.batches(self.miner, task)]
    last = network_lib.CONFIG.model.vocab_size - 1
    poisoned = list(policy.batches(self.miner, task))
    for a, b in zip(clean, poisoned, strict=True):
      np.testing.assert_array_equal(a[:, ::2], b[:, ::2])
      np.testing.assert_array_equal(last - a[:, 1::2], b[:, 1::2])
    params = self.miner.shared.params
    work = policy.train(self.miner, task, params, poisoned).result()
    want = base.pretended(self.miner, task, work)
    self.assertEqual(work.receipt, want.receipt)
    self.assertEqual(helpers.bits(work.message), helpers.bits(want.message))

  def test_a_backdoor_is_in_a_quarter_of_the_sequences(self):
    task = miner_lib.task(self.miner, 0)
    clean = [np.array(x) for x in HONEST.batches(self.miner, task)]
    poisoned = poisoning.backdoor(HONEST).batches(self.miner, task)
    last = network_lib.CONFIG.model.vocab_size - 1
    for a, b in zip(clean, poisoned, strict=True):
      np.testing.assert_array_equal(a[1:], b[1:])
      self.assertEqual(b[0, 2:8].tolist(), [last, last - 1, last, 0, 0, 0])


def norms(found, case):
  return np.linalg.norm(found) * np.linalg.norm(case.honest)


if __name__ == '__main__':
  absltest.main()
