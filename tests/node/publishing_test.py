"""Checkpoints are published in turn, and no round waits for them."""

import dataclasses
import threading
from unittest import mock

import jax
from absl.testing import absltest

from covenant.node import beside
from covenant.node import publishing
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib
from tests.node import network as network_lib

Phase = round_lib.Phase
EVERY = network_lib.CONFIG.checkpoint.publish


class PublishingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.network = network_lib.Network(self)
    config = dataclasses.replace(network_lib.CONFIG, rounds=100)
    self.publishers = {uid: beside.Beside('test') for uid in (3, 4, 5)}
    self.nodes = {
      uid: self.network.validator(uid, publisher=worker, config=config)
      for uid, worker in self.publishers.items()
    }

  def voted(self, round_index):
    """All validators vote in a round; returns the block at which it is over."""
    schedule = self.nodes[3].schedule
    self.network.block = schedule.start(round_index + 1)
    for uid in self.nodes:
      self.network.commit(uid, round_index)
    self.network.block = schedule.put_closes(round_index + 1)

  def test_validators_take_turns(self):
    turns = []
    for number in range(1, 7):
      r = number * EVERY
      for before in range(max(r - 2, 0), r):
        self.voted(before)
      turns.append(
        [u for u, node in self.nodes.items() if publishing.is_turn(node, r)]
      )
    self.assertEqual(turns, [[4], [5], [3], [4], [5], [3]])

  def test_the_last_state_of_a_run_is_published_by_all(self):
    for node in self.nodes.values():
      self.assertTrue(publishing.is_turn(node, 100))

  def test_a_slow_store_delays_no_round(self):
    """A node keeps rounds while its store takes pieces one by one."""
    node, worker = self.nodes[3], self.publishers[3]
    go, begun, put = threading.Event(), threading.Event(), []
    put_once = node.objects.put_once

    def slow(key, data):
      if '/chunks/' in key or '/checkpoints/' in key:
        begun.set()
        go.wait()
        put.append(key)
      put_once(key, data)

    self.addCleanup(go.set)
    node.state = round_lib.RoundState(EVERY, kept=False)
    with mock.patch.object(publishing, 'is_turn', return_value=True):
      with mock.patch.object(node.objects, 'put_once', slow):
        for r in range(EVERY, 3 * EVERY):
          node.state = round_lib.RoundState(r, kept=False)
          node.role.to_keep = [(node.objects.key('history', r), b'')]
          self.assertIsNone(
            node.handlers[Phase.KEEP](
              node, network_lib.command(Phase.KEEP, r), self.network.block
            )
          )
          begun.wait()
          self.assertEmpty(node.role.to_keep)
        self.assertEmpty(put)  # the store has not taken a piece yet
        self.assertTrue(worker.is_busy)
        go.set()
        self.assertTrue(worker.close(None))
    objects = node.objects
    # The turn in the middle was left out: the state of its round is gone.
    rounds = published_checkpoint.published(objects, objects.bucket)
    self.assertEqual(rounds, [EVERY])
    self.assertEqual(worker.take_error(), '')

  def test_a_failing_publication_makes_room_at_the_next_turn(self):
    node, worker = self.nodes[3], self.publishers[3]
    failed, go = threading.Event(), threading.Event()
    self.addCleanup(go.set)

    def pause(event, seconds):
      del event, seconds
      failed.set()
      go.wait()

    worker._pause, put_once = pause, node.objects.put_once

    def refuse(key, data):
      if '/chunks/' in key and not failed.is_set():
        raise store_lib.AccessDeniedError('403')
      put_once(key, data)

    with (
      mock.patch.object(publishing, 'is_turn', return_value=True),
      mock.patch.object(node.objects, 'put_once', refuse),
    ):
      for r in (EVERY, 2 * EVERY):
        node.state = round_lib.RoundState(r, kept=False)
        publishing.start(node, worker)
        failed.wait()
      go.set()
      self.assertTrue(worker.close(None))
    objects = node.objects
    rounds = published_checkpoint.published(objects, objects.bucket)
    self.assertEqual(rounds, [2 * EVERY])

  def test_what_is_published_does_not_change_with_later_rounds(self):
    """A node that owns its arrays changes them in place; it leaves a copy."""
    node = self.network.validator(3, publisher=self.publishers[3], sole=True)
    node.shared = jax.tree.map(lambda x: x.copy(), node.shared)
    before = node.fingerprint()
    go, seen = threading.Event(), []
    self.addCleanup(go.set)

    def publish(objects, place, *args):
      go.wait()
      seen.append(node.shared_model.fingerprint(place.shared))

    node.state = round_lib.RoundState(node.config.rounds, kept=False)
    with (
      mock.patch.object(published_checkpoint, 'publish', publish),
      mock.patch.object(published_checkpoint, 'prune', return_value=0),
    ):
      publishing.start(node, self.publishers[3])
      for x in jax.tree.leaves(node.shared.params):
        x.delete()  # as an update in place does
      go.set()
      self.assertTrue(self.publishers[3].close(None))
    self.assertEqual(seen, [before])

  def test_a_node_cleans_up_at_turns_of_others(self):
    node, worker = self.nodes[3], self.publishers[3]
    objects, r = node.objects, 40 * EVERY
    kept = publishing.keep_rounds(node.config, 3)
    for old in r - kept - 1, r - kept, r - 1:
      objects.put_once(objects.key('history', old), b'')
    node.state = round_lib.RoundState(r, kept=False)
    with (
      mock.patch.object(publishing, 'is_turn', return_value=False),
      mock.patch.object(publishing, '_order', return_value=['a', 'b', 'c']),
    ):
      publishing.start(node, worker)
      self.assertTrue(worker.close(None))
    self.assertEqual(worker.take_error(), '')
    self.assertEqual(
      objects.rounds('history', objects.bucket), [r - kept, r - 1]
    )

  def test_cleaning_reads_the_role_before_it_is_left_alone(self):
    """The rounds change what validators support, in their own thread."""
    node = self.nodes[3]
    clean = publishing.cleaning(node, EVERY)
    with mock.patch.object(
      publishing.amend, 'wanted', side_effect=RuntimeError('changed size')
    ):
      clean()

  def test_a_store_that_denies_all_does_not_keep_a_finished_process(self):
    denied = store_lib.AccessDeniedError('403')
    worker = beside.Beside('test', pause=lambda event, seconds: None)
    self.addCleanup(worker.close, 60, True)

    def work():
      worker.check()
      raise denied

    worker.submit(work)
    publishing.finish(worker, lambda: False, 0.001)
    self.assertGreaterEqual(worker.failures, publishing.LAST_TRIES)
    self.assertTrue(worker.close(60, cancel=True))

  def test_a_stop_ends_the_last_wait(self):
    go, worker = threading.Event(), beside.Beside('test')
    self.addCleanup(go.set)
    worker.submit(go.wait)
    publishing.finish(worker, lambda: True, 0.0)
    self.assertTrue(worker.is_busy)
    go.set()
    self.assertTrue(worker.close(60))


if __name__ == '__main__':
  absltest.main()
