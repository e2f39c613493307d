"""Tests of adversaries that take pay without work."""

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant.adversaries import base
from covenant.adversaries import free_riding
from covenant.adversaries import messages
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.wire import manifest as manifest_lib
from tests import helpers
from tests.node import network as network_lib

HONEST = miner_lib.HONEST
Phase = round_lib.Phase


class FreeRidingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.network.block = 1
    self.notes = {}
    self.miner = self.gang(0)

  def gang(self, uid, names=None):
    return self.network.miner(uid, names=names or {0: 'x'}, notes=self.notes)

  def task(self, round_index=0, miner=None):
    return miner_lib.task(miner or self.miner, round_index)

  def train(self, policy, round_index=0, miner=None, params=None):
    miner = miner or self.miner
    schedule = miner.schedule
    self.network.block = max(
      self.network.block, schedule.start(round_index) + 1
    )
    task = self.task(round_index, miner)
    batches = policy.batches(miner, task)
    params = miner.shared.params if params is None else params
    return policy.train(miner, task, params, batches).result()

  def commit(self, policy, after=3):
    """Commits when another miner may have published; what was sent."""
    self.network.block = self.miner.schedule.put_opens(0) + after
    command = network_lib.command(Phase.COMMIT)
    policy.commit(self.miner, command, self.network.block)
    return self.miner.role.contribution.result()

  def publish(self, uid):
    self.network.block = self.miner.schedule.put_opens(0)
    data = self.network.payload(self.network.miner(uid))
    self.network.publish(uid, 0, data)
    return data

  def message(self, made):
    """The message that a validator would read in a contribution."""
    key = network_lib.KEYS[0]
    entry = manifest_lib.Entry(0, key.address, b'')
    return base.read(self.miner, entry, made.payload)

  def assertSame(self, a, b):
    self.assertEqual(helpers.bits(a), helpers.bits(b))

  @pytest.mark.slow
  def test_a_copier_sends_anothers_message_under_its_own_name(self):
    data = self.publish(1)
    made = self.commit(free_riding.copier(HONEST))
    self.assertNotEqual(made.payload, data)
    self.assertSame(self.message(made), network_lib.message(1))
    self.assertEqual(made.tokens, 0)

  def test_a_copier_waits_for_somebody_to_copy(self):
    with self.assertRaises(node_lib.RetryLaterError):
      self.commit(free_riding.copier(HONEST))
    self.assertIsNone(self.miner.role.contribution.result())

  def test_an_exact_copier_sends_the_bytes(self):
    data = self.publish(1)
    made = self.commit(free_riding.exact_copier(HONEST))
    self.assertEqual(made.payload, data)
    self.assertIsNone(self.message(made))  # another's name is in it

  @pytest.mark.slow
  def test_a_perturbed_copier_drops_a_share_and_fills_it_with_noise(self):
    self.publish(1)
    made = self.commit(free_riding.perturbed_copier(HONEST, dropped=0.5))
    copied, sent = (
      np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(messages.dense(self.miner, m))]
      )
      for m in (network_lib.message(1), self.message(made))
    )
    kept = np.count_nonzero((copied != 0) & (sent != 0))
    share = kept / np.count_nonzero(copied)
    self.assertBetween(share, 0.3, 0.8)

  def test_a_fast_copier_needs_no_commitment_of_this_round(self):
    miner = self.network.miner(1)
    data = self.network.payload(miner)
    digest = run_storage_lib.digest(data)
    objects = self.network.objects(1)
    objects.put_once(objects.key('payloads', 0, digest), data)
    self.network.commit(1, None)  # only the place of its bucket
    with self.assertRaises(node_lib.RetryLaterError):
      self.commit(free_riding.copier(HONEST))
    made = self.commit(free_riding.fast_copier(HONEST), after=4)
    self.assertSame(self.message(made), network_lib.message(1))

  def test_a_previous_copier_sends_the_message_of_the_last_round(self):
    policy = free_riding.previous_copier(HONEST)
    self.assertIsNone(self.train(policy))
    self.miner.messages = {2: network_lib.message(2)}
    self.assertSame(self.train(policy).message, network_lib.message(2))

  def test_a_replayer_uploads_the_same_bytes_ever_after(self):
    policy = free_riding.replayer(HONEST)
    made = []
    for r in range(3):
      work = self.train(policy, r)
      made.append(policy.seal(self.miner, self.task(r), work))
    self.assertLen(self.miner.role.slot.trained, 1)
    self.assertLen({m.payload for m in made}, 1)
    self.assertEqual([m.round for m in made], [0, 1, 2])
    self.assertEqual([m.tokens for m in made[1:]], [0, 0])

  def test_a_repeater_signs_the_same_message_anew(self):
    policy = free_riding.repeater(HONEST)
    works = [self.train(policy, r) for r in range(3)]
    made = [
      policy.seal(self.miner, self.task(r), w) for r, w in enumerate(works)
    ]
    self.assertLen(self.miner.role.slot.trained, 1)
    self.assertSame(works[2].message, works[0].message)
    self.assertLen({w.receipt for w in works}, 3)
    self.assertLen({m.payload for m in made}, 3)

  def test_unassigned_trains_on_the_same_data_and_claims_its_task(self):
    policy = free_riding.unassigned(miner_lib.in_virtual_time(HONEST))
    works = [self.train(policy, r) for r in range(2)]
    first, second = (t[3] for t in self.miner.role.slot.trained)
    np.testing.assert_array_equal(first, second)
    honest = list(HONEST.batches(self.miner, self.task(0)))
    self.assertFalse(np.array_equal(first, honest))
    for r, work in enumerate(works):
      want = base.pretended(self.miner, self.task(r), work)
      self.assertEqual(work.receipt, want.receipt)

  def test_the_unassigned_train_until_the_put_window_of_their_round(self):
    """Also where time passes while they train, unlike in virtual time."""
    opens = self.miner.schedule.put_opens(2)
    for block, steps in ((opens - 1, 3), (opens, 1)):
      self.network.block = block
      for kind in (free_riding.unassigned, free_riding.easy):
        batches = kind(HONEST).batches(self.miner, self.task(2))
        self.assertLen(list(batches), steps)

  def test_easy_trains_on_one_sequence(self):
    self.train(free_riding.easy(HONEST))
    batches = np.array(self.miner.role.slot.trained[0][3])
    rows = {row.tobytes() for row in batches.reshape(-1, batches.shape[-1])}
    self.assertLen(rows, 1)

  def test_the_desynchronized_train_from_older_parameters(self):
    for admits in (False, True):
      miner = self.network.miner(0, names={0: 'x'})
      roots = []

      def seal(miner, task, work, roots=roots):
        roots.append(task.root)

      policy = free_riding.desynchronized(
        HONEST._replace(seal=seal), behind=1, admits=admits
      )
      for r, root in enumerate((b'a', b'b', b'c')):
        miner.root = root
        work = self.train(policy, r, miner, params=root.decode())
        policy.seal(miner, self.task(r, miner), work)
      began = [params for params, *_ in miner.role.slot.trained]
      self.assertEqual(began, ['a', 'a', 'b'])
      want = [b'a', b'a', b'b'] if admits else [b'a', b'b', b'c']
      self.assertEqual(roots, want)

  def test_a_sybil_trains_once_on_a_part_of_the_data_of_each_uid(self):
    names = {0: 'sybil', 1: 'sybil'}
    miners = [self.gang(uid, names) for uid in names]
    policy = free_riding.sybil(HONEST)
    works = [self.train(policy, 0, miner) for miner in miners]
    self.assertSame(works[0].message, works[1].message)
    self.assertNotEqual(works[0].receipt, works[1].receipt)
    trained = [t for miner in miners for t in miner.role.slot.trained]
    self.assertLen(trained, 1)
    each = [list(HONEST.batches(m, self.task(0, m))) for m in miners]
    for step, tokens_BxL1 in enumerate(trained[0][3]):
      for row, sequence in enumerate(tokens_BxL1):
        np.testing.assert_array_equal(sequence, each[row % 2][step][row])


if __name__ == '__main__':
  absltest.main()
