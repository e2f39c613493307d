"""A node as a process: it follows the chain, saves, stops and goes on."""

import json
import pathlib
import threading
from unittest import mock

import pytest
from absl.testing import absltest

from covenant import files
from covenant import folder_lock
from covenant import metrics
from covenant.chain import interface as chain_lib
from covenant.data import tokens as tokens_lib
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.node import process as process_lib
from covenant.node import sync
from covenant.protocol import checkpoint
from tests.node import network as network_lib

UID = 0
CONFIG = network_lib.CONFIG


class ProcessTest(absltest.TestCase):
  """A miner of a network in which nobody else is, so that nobody counts.

  Its clock moves only while it sleeps.
  """

  def setUp(self):
    super().setUp()
    network_lib.trainer()  # reads the data, once
    self.network = network_lib.Network(self)
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    self.slept = []

    def sleep(seconds):
      self.slept.append(seconds)
      self.network.block += 1

    chain = self.network.chain.seen_by(network_lib.KEYS[UID])
    for module, name, value in (
      (process_lib.connect, 'chain', lambda config: chain),
      (process_lib.connect, 'objects', lambda *_: self.network.objects(UID)),
      (process_lib.dataset, 'load', lambda config: None),
      (process_lib.pretrained, 'keep', lambda *_: None),
      (process_lib.time, 'sleep', sleep),
    ):
      self.enterContext(mock.patch.object(module, name, value))
    self.chain = chain

  def build(self, context, start, data, mesh):
    del data, mesh
    role = miner_lib.role(network_lib.Slot(UID), start)
    return node_lib.Node(
      context, start, role, miner_lib.handlers(miner_lib.HONEST)
    )

  def process(self):
    return process_lib.Process(CONFIG, 'miner', self.workdir, build=self.build)

  def status(self):
    return json.loads((self.workdir / 'status.json').read_text())

  def test_follows_the_run_to_its_last_round(self):
    process = self.process()
    self.assertEqual(self.status()['phase'], 'ready')
    process.run(lambda: False)
    status = self.status()
    self.assertEqual(
      (status['phase'], status['round'], status['error']),
      ('finished', CONFIG.rounds, ''),
    )
    self.assertEqual(status['root'], process.node.root.hex())
    self.assertEqual(status['fingerprint'], process.node.fingerprint())
    events = files.read_jsonl(self.workdir / 'events.jsonl')
    trained = [e['round'] for e in events if e['what'] == 'train']
    self.assertContainsSubset(range(CONFIG.rounds), trained)
    # It looks at the chain at least twice per block.
    self.assertLessEqual(max(self.slept), 0.5)

  def test_goes_on_where_it_was_stopped(self):
    process = self.process()
    process.run(lambda: process._saved == 2)
    self.assertEqual(
      (self.status()['phase'], self.status()['round']), ('stopped', 2)
    )
    again = self.process()
    self.assertEqual(again.node.state.round, 2)
    self.assertEqual(again.node.root, process.node.root)
    self.assertEqual(again.node.fingerprint(), process.node.fingerprint())
    again.run(lambda: False)
    self.assertEqual(self.status()['round'], CONFIG.rounds)

  def sync(self, place):
    """Leaves a position in the workdir, as `--role=sync` does."""
    folder = self.workdir / sync.FOLDER
    with checkpoint.Checkpoints(folder, CONFIG.checkpoint) as checkpoints:
      checkpoints.save_tree(place.round, sync._to_tree(place))

  @pytest.mark.slow
  def test_a_synced_state_that_is_later_is_entered_and_then_deleted(self):
    process = self.process()
    process.run(lambda: process.node.state.trained)
    place, root = process.node.place, bytes(len(process.node.root))
    self.assertEqual(place.round, 0)
    self.sync(place._replace(round=1, root=root))
    again = self.process()
    self.assertEqual((again.node.state.round, again.node.root), (1, root))
    self.assertFalse(again.node.state.trained)
    self.assertIsNone(again.node.role.contribution.result())
    again.run(lambda: False)
    self.assertEqual(self.status()['round'], CONFIG.rounds)
    self.assertFalse((self.workdir / sync.FOLDER).exists())

  def test_a_synced_state_that_is_not_later_changes_nothing(self):
    process = self.process()
    process.run(lambda: process.node.state.round == 1)
    place = process.node.place
    self.sync(place._replace(root=bytes(len(place.root))))
    again = self.process()
    self.assertEqual((again.node.state.round, again.node.root), (1, place.root))
    again.run(lambda: True)

  def test_what_was_synced_outlives_a_full_disk(self):
    """It is all there is until a checkpoint is written."""
    process = self.process()
    process.run(lambda: True)
    self.sync(process.node.place._replace(round=1))
    process, full = self.process(), checkpoint.CheckpointError('no space')
    self.assertEqual(process.node.state.round, 1)
    with mock.patch.object(process._checkpoints, 'save_tree', side_effect=full):
      process.run(lambda: process.node.state.round == 2)
    self.assertTrue((self.workdir / sync.FOLDER).exists())

  def test_waits_for_a_chain_that_is_not_there(self):
    process, heads = self.process(), iter(range(3))

    def head():
      if next(heads, None) is not None:
        raise chain_lib.ChainUnreachableError('no answer')
      return self.network.block

    with mock.patch.object(process, '_chain', wraps=self.chain) as chain:
      chain.head.side_effect = head
      chain.block_seconds = 1.0
      process.run(lambda: len(self.slept) == 4)
    self.assertEqual(self.slept[:3], [1.0] * 3)
    self.assertEqual(self.status()['error'], 'ChainUnreachableError: no answer')

  def test_a_full_disk_is_in_the_status(self):
    process = self.process()
    full = checkpoint.CheckpointError('no space')
    said = process.workdir.status
    with (
      mock.patch.object(process._checkpoints, 'save_tree', side_effect=full),
      mock.patch.object(process.workdir, 'status', side_effect=said) as status,
    ):
      process.run(lambda: process.node.state.round >= 1)
      process._save()  # the run may have ended before one was due
    self.assertIn(mock.call(error='no space'), status.mock_calls)

  def test_a_store_that_hangs_delays_no_round_and_no_checkpoint(self):
    """A node does not wait until its status is published."""
    go, asked = threading.Event(), []
    self.addCleanup(go.set)

    def publish(objects, data):
      del objects
      asked.append(data)
      go.wait()

    with (
      mock.patch.object(process_lib.published_status, 'publish', publish),
      mock.patch.object(process_lib, '_LEAVE_SECONDS', 0),
    ):
      process = self.process()
      process.run(lambda: False)
      status = self.status()
      self.assertEqual(
        (status['phase'], status['round']), ('finished', CONFIG.rounds)
      )
      self.assertLen(asked, 1)
      self.assertNotEmpty(list((self.workdir / 'checkpoints').iterdir()))
      go.set()
      self.assertTrue(process._status_thread.close(None))
    self.assertLen(asked, 2)  # the first and the newest

  def test_a_stop_while_it_trains_seals_the_inner_step_under_way(self):
    drawn = []

    class Slot(network_lib.Slot):
      def train(self, params, state, task, batches, begun=None):
        def seen():
          for batch in batches:
            drawn.append(task.round)
            yield batch

        return super().train(params, state, task, seen(), begun)

    with mock.patch.object(network_lib, 'Slot', Slot):
      process = self.process()
      process.run(lambda: drawn.count(1) == 2)
    self.assertEqual(drawn.count(0), CONFIG.optim.inner_steps)
    self.assertEqual(drawn.count(1), 2)
    made = process.node.role.contribution.result()
    self.assertEqual(
      made.tokens, 2 * CONFIG.optim.inner.batch_size * CONFIG.data.context
    )
    again = self.process()
    self.assertEqual(again.node.role.contribution.result(), made)
    self.assertEqual((again.node.state.round, again.node.state.trained),
                     (1, True))  # fmt: skip
    private = again.node.role.miner_state.result()
    self.assertEqual(
      private.joined, process.node.role.miner_state.result().joined
    )
    again.run(lambda: False)
    self.assertEqual(self.status()['round'], CONFIG.rounds)
    events = files.read_jsonl(self.workdir / 'events.jsonl')
    committed = [e['round'] for e in events if e['what'] == 'commit']
    self.assertIn(1, committed)

  def test_an_amendment_leaves_devices_of_other_processes(self):
    process = self.process()
    node = process.node
    slot = node.role.slot  # as that of a pipeline's head: not a LocalSlot
    process._data = tokens_lib.TokenData('train', 'heldout', 256, 0)
    with mock.patch.object(slot.trainer, 'split', None):
      process._retool(node)
      self.assertIs(node.role.slot, slot)
      self.assertEqual(slot.trainer.split, 'train')

  def test_a_second_stop_in_one_round_keeps_the_newest_state(self):
    process = self.process()
    process.run(lambda: process.node.state.round == 1)
    self.assertFalse(process.node.state.trained)
    again = self.process()
    self.assertEqual(
      (again.node.state.round, again.node.state.trained), (1, False)
    )
    again.run(lambda: again.node.state.trained)
    third = self.process()
    self.assertEqual(
      (third.node.state.round, third.node.state.trained), (1, True)
    )

  def test_writes_what_each_round_took(self):
    process = self.process()
    process.run(lambda: False)
    rounds = metrics.read(self.workdir / 'metrics.jsonl', [metrics.NodeRound])
    self.assertEqual(
      [r.round for r in rounds], list(range(1, CONFIG.rounds + 1))
    )
    self.assertGreater(rounds[0].train_seconds, 0)
    self.assertGreater(rounds[0].queue_seconds, 0)
    self.assertGreater(rounds[0].bytes_sent, 0)  # its payload

  @pytest.mark.slow
  def test_a_folder_is_of_one_process(self):
    process = self.process()
    with self.assertRaises(folder_lock.FolderInUseError):
      self.process()
    process.run(lambda: True)
    self.process()


if __name__ == '__main__':
  absltest.main()
