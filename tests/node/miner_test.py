"""A miner's phases, on devices that return a known message."""

import base64
import json
from unittest import mock

import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.node import follow
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.wire import payload as payload_lib
from tests.node import network as network_lib

Future = node_lib.Future
Phase = round_lib.Phase
command = network_lib.command


class MinerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    self.node = self.network.miner(1)
    self.role = self.node.role
    self.schedule = self.node.schedule

  def poll(self, block, node=None):
    """Sets the clock and polls until there is nothing more to do."""
    node, self.network.block = node or self.node, block
    while (wake := node.poll(block)) == block:
      pass
    return wake

  def uploaded(self, round_index=0, node=None):
    """The payload of the newest contribution as its bucket has it, or None."""
    node = node or self.node
    made = node.role.contribution.result()
    digest = run_storage_lib.digest(made.payload)
    key = node.objects.key('payloads', round_index, digest)
    try:
      return node.objects.bucket.get(key, len(made.payload))
    except store_lib.MissingObjectError:
      return None

  def test_a_task_is_the_same_for_all_who_ask_the_chain(self):
    self.network.block = self.schedule.start(1)
    task = miner_lib.task(self.node, 1)
    self.assertEqual((task.uid, task.round), (1, 1))
    self.assertEqual(task.root, self.node.root)
    self.assertEqual(task.seed, self.network.chain.block_hash(task_block(1)))
    self.assertNotEqual(task.seed, miner_lib.task(self.node, 0).seed)

  def test_a_round_trains_commits_and_uploads(self):
    self.poll(1)
    (training,) = self.role.slot.trained
    self.assertIs(training[0], self.node.shared.params)
    self.assertLen(training[3], network_lib.CONFIG.optim.inner_steps)
    self.assertTrue(self.node.state.trained)
    self.assertEqual(self.role.miner_state.result().joined, 100)  # advanced
    made = self.role.contribution.result()
    self.assertEqual((made.round, made.loss), (0, 2.5))
    self.assertIsNone(self.uploaded())
    opens = self.schedule.put_opens(0)
    self.poll(opens)
    self.network.block = opens + 1
    membership = self.network.read()
    digest = run_storage_lib.digest(made.payload)
    self.assertEqual(membership.commitments[1].digest, digest)
    # No byte is to be had before the commitment is final.
    self.assertIsNone(self.uploaded())
    self.assertFalse(self.node.state.uploaded)
    self.assertEqual(self.poll(opens + 1), opens + 2)
    self.assertIsNone(self.uploaded())
    self.poll(opens + 2)
    self.assertEqual(self.uploaded(), made.payload)
    self.assertTrue(self.node.state.uploaded)
    self.assertLen(self.role.slot.trained, 1)

  def test_the_payload_is_sealed_for_its_round_and_signed(self):
    self.poll(1)
    made = self.role.contribution.result()
    model = network_lib.shared_model()
    expected = payload_lib.Header(
      model.run, 0, 1, self.node.root[:16], b'r' * 16, 12
    )
    key = network_lib.KEYS[1]
    chain = self.network.chain
    signed = model.decode(
      made.payload,
      expected,
      lambda text, signature: chain.verify(key.address, text, signature),
    )
    self.assertEqual(signed.header.sequences, 12)
    self.assertEqual(signed.header.receipt, b'r' * 16)
    self.assertEqual(made.tokens, 12 * network_lib.CONFIG.data.context)

  def test_a_hotkey_that_is_thrown_out_is_told_and_goes_on_when_it_is_back(
    self,
  ):
    address = network_lib.KEYS[1].address
    self.poll(1)  # trained
    self.network.block = 2
    self.network.chain.deregister(address)
    opens = self.schedule.put_opens(0)
    for block in range(opens, self.schedule.put_closes(0)):
      self.assertEqual(self.poll(block), block + 1)
    errors = {event.error for event in self.network.events if event.error}
    for error in errors:
      self.assertIn(f'{address} is not registered at block', error)
    self.assertLen(errors, self.schedule.put_closes(0) - opens)
    self.assertFalse(self.node.state.committed)
    # It registers again: another peer for validators, the same process here.
    self.network.chain.register(address, 0.0, False)
    self.network.block += 1
    self.network.commit(0, 0)
    head = self.schedule.last_decision_block(0) + 2
    for block in range(self.network.block, self.schedule.start(1) + 2):
      self.poll(block)
    for block in range(self.schedule.start(1) + 2, head + 2):
      self.poll(block)
    self.assertEqual(self.node.state.round, 1)
    self.poll(self.schedule.put_opens(1))
    self.assertTrue(self.node.state.committed)
    membership = self.network.read()
    self.assertGreater(membership.peers[1].registered, 2)

  def test_a_payload_is_saved_as_bytes(self):
    """Text of it would take a third more, and twice the memory."""
    self.poll(1)  # trained
    made = self.node.role.contribution.result()
    tree = self.node.save()
    self.assertLess(len(tree['text']), 1000)
    self.assertEqual(tree['payload'].dtype, np.uint8)
    again = self.network.miner(1)
    self.assertEqual(again.save()['payload'].shape, tree['payload'].shape)
    again.load(tree)
    self.assertEqual(again.role.contribution.result(), made)
    self.assertTrue(again.state.trained)

  def test_a_payload_that_was_saved_as_text_is_read(self):
    self.poll(1)
    made = self.node.role.contribution.result()
    tree = self.node.save()
    del tree['payload']
    text = json.loads(tree['text'])
    payload = base64.b64encode(made.payload).decode()
    text['contribution'][0] = payload
    again = self.network.miner(1)
    again.load({**tree, 'text': json.dumps(text)})
    self.assertEqual(again.role.contribution.result(), made)

  def test_batches_end_when_the_put_window_opens(self):
    self.network.block = 1
    task = miner_lib.task(self.node, 0)
    batches = iter(miner_lib.read_batches(self.node, task))
    next(batches)
    self.network.block = self.schedule.put_opens(0)
    self.assertEmpty(list(batches))

  def test_a_chain_that_does_not_answer_leaves_time_to_train(self):
    self.network.block = 1
    task = miner_lib.task(self.node, 0)

    class Silent:
      def head(self):
        raise chain_lib.ChainUnreachableError('no route')

    self.node.chain = Silent()
    batches = list(miner_lib.read_batches(self.node, task))
    self.assertLen(batches, network_lib.CONFIG.optim.inner_steps)

  def test_it_does_not_train_twice_for_one_round(self):
    self.poll(1)
    made = self.role.contribution.result()
    self.node.state = round_lib.RoundState(0)
    self.poll(2)
    self.assertLen(self.role.slot.trained, 1)
    self.assertIs(self.role.contribution.result(), made)

  def test_a_contribution_of_another_round_is_not_due(self):
    self.poll(1)
    self.assertIsNotNone(miner_lib.due(self.node, 0))
    self.assertIsNone(miner_lib.due(self.node, 1))
    miner_lib.commit(self.node, command(Phase.COMMIT, 1), 2)
    miner_lib.upload(self.node, command(Phase.UPLOAD, 1), 2)
    self.network.block = 3
    self.assertNotIn(1, self.network.read().commitments)

  def test_a_policy_may_send_nothing(self):
    def train(node, task, params, batches):
      return Future.done(None)

    node = self.network.miner(2, miner_lib.HONEST._replace(train=train))
    for block in (1, self.schedule.put_opens(0), self.schedule.put_closes(0)):
      self.poll(block, node)
    self.assertIsNone(node.role.contribution.result())
    self.network.block += 1
    self.assertNotIn(2, self.network.read().commitments)
    self.assertEmpty([e for e in self.network.events if e.error])

  def test_upload_waits_for_the_own_commitment(self):
    self.poll(1)
    opens = self.schedule.put_opens(0)
    self.network.block = opens
    self.network.commit(1, 0, b'e' * 32)  # another process's
    self.network.block = opens + 1
    with self.assertRaises(node_lib.RetryLaterError):
      miner_lib.upload(self.node, command(Phase.UPLOAD), opens + 1)

  def test_a_restart_sends_what_it_had_trained(self):
    self.poll(1)
    self.assertTrue(self.node.savable)
    saved = self.node.save()
    other = self.network.miner(1)
    other.load(saved)
    self.assertEqual(
      other.role.contribution.result(), self.role.contribution.result()
    )
    self.assertEqual(other.role.miner_state.result().joined, 100)
    self.assertTrue(other.state.trained)
    opens = self.schedule.put_opens(0)
    self.poll(opens, other)
    self.poll(opens + 2, other)
    self.assertEmpty(other.role.slot.trained)
    self.assertIsNotNone(self.uploaded(node=other))

  def test_a_checkpoint_is_due_between_training_and_commitment(self):
    for trained, committed in ((0, 0), (1, 0), (1, 1)):
      state = round_lib.RoundState(
        0, trained=bool(trained), committed=bool(committed)
      )
      with self.subTest(f'{state}'):
        want = bool(trained and not committed)
        self.assertEqual(self.role.is_savable(state), want)

  def test_after_an_absence_only_the_contribution_is_dropped(self):
    self.poll(1)
    private = self.role.miner_state.result()
    with mock.patch.object(follow, 'catch_up') as catch_up:
      self.node.handlers[Phase.CATCH_UP](
        self.node, command(Phase.CATCH_UP), 500
      )
    catch_up.assert_called_once_with(self.node, command(Phase.CATCH_UP), 500)
    self.assertIsNone(self.role.contribution.result())
    self.assertIs(self.role.miner_state.result(), private)

  def test_overlap_adds_one_phase(self):
    plain = miner_lib.handlers(miner_lib.HONEST)
    overlapped = miner_lib.handlers(miner_lib.HONEST, overlap=True)
    self.assertEqual(set(plain), round_lib.MINER)
    self.assertEqual(set(overlapped), round_lib.MINER | {Phase.BEGIN})

  def test_a_begun_round_goes_to_its_training(self):
    self.network.block = 1
    self.role.begun = begun = object()
    task = miner_lib.task(self.node, 0)
    params = self.node.shared.params
    work = miner_lib.train(self.node, task, params, [np.zeros((4, 17))])
    self.assertEqual(work.result().sequences, 4)
    self.assertIs(self.role.slot.trained[0][4], begun)
    self.assertIsNone(self.role.begun)

  def test_in_virtual_time_no_batch_is_late(self):
    policy = miner_lib.in_virtual_time(miner_lib.HONEST)
    self.network.block = 1
    task = miner_lib.task(self.node, 0)
    self.network.block = self.schedule.put_closes(0)
    batches = list(policy.batches(self.node, task))
    self.assertLen(batches, network_lib.CONFIG.optim.inner_steps)
    self.assertIs(policy.commit, miner_lib.HONEST.commit)


def task_block(round_index):
  return round_lib.Schedule(network_lib.CONFIG.phases).assignment_block(
    round_index
  )


if __name__ == '__main__':
  absltest.main()
