"""Honest miners that send less, later or not always."""

import numpy as np
from absl.testing import absltest

from covenant.adversaries import base
from covenant.adversaries import honest_but_slow
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from tests.node import network as network_lib

HONEST = miner_lib.in_virtual_time(miner_lib.HONEST)
Phase = round_lib.Phase


class HonestButSlowTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.network.block = 1
    self.miner = self.network.miner(0)
    self.clean = self.batches(HONEST)

  def task(self, round_index=0):
    schedule = self.miner.schedule
    block = schedule.start(round_index) + 1
    self.network.block = max(self.network.block, block)
    return miner_lib.task(self.miner, round_index)

  def batches(self, policy, round_index=0):
    found = policy.batches(self.miner, self.task(round_index))
    return [np.array(x) for x in found]

  def train(self, policy, round_index=0):
    task = self.task(round_index)
    batches = policy.batches(self.miner, task)
    return policy.train(self.miner, task, None, batches).result()

  def test_the_slow_commit_in_the_last_block(self):
    heads = []
    policy = honest_but_slow.slow(
      HONEST._replace(commit=lambda miner, command, head: heads.append(head))
    )
    command = network_lib.command(Phase.COMMIT)
    last = self.miner.schedule.put_closes(0) - 1
    with self.assertRaises(node_lib.RetryLaterError):
      policy.commit(self.miner, command, last - 1)
    policy.commit(self.miner, command, last)
    self.assertEqual(heads, [last])

  def test_a_joiner_trains_from_its_first_round_on(self):
    policy = honest_but_slow.joiner(HONEST, first=2)
    works = [self.train(policy, r) for r in range(3)]
    self.assertEqual([w is None for w in works], [True, True, False])

  def test_missed_one_trains_but_sends_nothing(self):
    policy = honest_but_slow.missed_one(HONEST, missed=1)
    made = []
    for r in range(3):
      work = self.train(policy, r)
      self.assertIsNotNone(work)
      made.append(policy.seal(self.miner, self.task(r), work))
    self.assertEqual([m is None for m in made], [False, True, False])

  def test_a_small_batch_has_half_of_the_sequences(self):
    found = np.concatenate(self.batches(honest_but_slow.small_batch(HONEST)))
    whole = np.concatenate(self.clean)
    np.testing.assert_array_equal(found, whole[: len(whole) // 2])

  def test_a_straggler_ends_early_and_honestly(self):
    counts = set()
    for r in range(6):
      found = self.batches(honest_but_slow.straggler(HONEST), r)
      whole = self.batches(HONEST, r)
      np.testing.assert_array_equal(found, whole[: len(found)])
      counts.add(len(found))
    self.assertContainsSubset(counts, range(1, len(self.clean) + 1))
    self.assertGreater(len(counts), 1)

  def test_little_data_trains_twice_and_claims_once(self):
    policy = honest_but_slow.little_data(HONEST)
    found = np.concatenate(self.batches(policy))
    whole = np.concatenate(self.clean)
    half = len(whole) // 2
    np.testing.assert_array_equal(found[:half], whole[:half])
    np.testing.assert_array_equal(found[half:], whole[:half])
    work = self.train(policy)
    self.assertEqual(work.sequences, half)
    want = base.pretended(self.miner, self.task(), work, half)
    self.assertEqual(work.receipt, want.receipt)

  def test_a_churner_returns_with_a_fresh_state(self):
    policy = honest_but_slow.churner(HONEST, spell=1, away=0.5)
    here = []
    for r in range(12):
      trained = len(self.miner.role.slot.trained)
      work = self.train(policy, r)
      here.append(work is not None)
      if work is None:
        self.assertLen(self.miner.role.slot.trained, trained)
      elif r and not here[r - 1]:
        state = self.miner.role.slot.trained[-1][1]
        self.assertEqual(state.joined, r)
    self.assertContainsSubset({True, False}, here)


if __name__ == '__main__':
  absltest.main()
