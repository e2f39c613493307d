"""Work beside the rounds: the newest, again until it is done."""

import threading
from unittest import mock

from absl.testing import absltest

from covenant.node import beside
from covenant.store import interface as store_lib


def no_pause(event, seconds):
  del event, seconds


class BesideTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.go, self.begun = threading.Event(), threading.Event()
    self.done = []
    self.addCleanup(self.go.set)

  def slow(self):
    self.begun.set()
    self.go.wait()
    self.done.append('slow')

  def test_nobody_waits_and_the_newest_work_follows(self):
    worker = beside.Beside('test')
    worker.submit(self.slow)
    self.begun.wait()
    for name in 'replaced', 'newest':
      worker.submit(lambda name=name: self.done.append(name))
    self.assertTrue(worker.is_busy)
    self.assertEmpty(self.done)
    self.go.set()
    self.assertTrue(worker.close(None))
    self.assertEqual(self.done, ['slow', 'newest'])
    self.assertFalse(worker.is_busy)

  def test_work_that_fails_is_tried_again(self):
    worker = beside.Beside('test', pause=no_pause)
    errors = [store_lib.StoreUnavailableError('no route'), OSError('full')]

    def work():
      if errors:
        raise errors.pop()
      self.done.append('done')

    worker.submit(work)
    self.assertTrue(worker.close(None))
    self.assertEqual(self.done, ['done'])
    self.assertEqual(worker.take_error(), 'StoreUnavailableError: no route')
    self.assertEqual(worker.take_error(), '')

  def test_tries_may_be_few(self):
    worker = beside.Beside('test', tries=1, pause=no_pause)

    def work():
      self.done.append('tried')
      raise store_lib.StoreUnavailableError('no route')

    worker.submit(work)
    self.assertTrue(worker.close(None))
    self.assertEqual(self.done, ['tried'])
    self.assertIn('no route', worker.take_error())

  def test_work_ends_early_if_it_is_canceled(self):
    worker = beside.Beside('test')

    def work():
      self.slow()
      worker.check()
      self.done.append('never')

    worker.submit(work)
    self.begun.wait()
    self.assertFalse(worker.close(0, cancel=True))
    self.go.set()
    self.assertTrue(worker.close(None))
    self.assertEqual(self.done, ['slow'])
    self.assertEqual(worker.take_error(), '')

  def test_a_bug_is_told_and_ends_only_its_work(self):
    worker = beside.Beside('test', pause=no_pause)

    def work():
      self.done.append('tried')
      raise RuntimeError('dictionary changed size during iteration')

    worker.submit(work)
    self.assertTrue(worker.close(None))
    self.assertFalse(worker.is_busy)
    self.assertEqual(self.done, ['tried'])
    self.assertIn('RuntimeError: dictionary changed', worker.take_error())
    self.assertEqual(worker.failures, 1)

  def test_a_thread_that_ends_leaves_room_for_the_next(self):
    worker = beside.Beside('test')

    def leave():
      raise SystemExit  # threads end by it, without a word

    with mock.patch.object(threading, 'excepthook', lambda args: None):
      worker.submit(leave)
      self.assertTrue(worker.wait(60))
    worker.submit(lambda: self.done.append('next'))
    self.assertTrue(worker.close(None))
    self.assertEqual(self.done, ['next'])

  def test_work_that_a_store_refuses_for_ever_makes_room_for_newer(self):
    pauses = []

    def pause(event, seconds):
      pauses.append(seconds)
      if len(pauses) == 8:
        self.assertTrue(worker.is_failing)
        worker.submit(lambda: self.done.append('newer'))

    def denied():
      raise store_lib.AccessDeniedError('403')

    worker = beside.Beside('test', pause=pause)
    worker.submit(denied)
    self.assertTrue(worker.close(None))
    self.assertEqual(self.done, ['newer'])
    self.assertEqual(pauses, [5, 10, 20, 40, 80, 160, 300, 300])
    self.assertFalse(worker.is_failing)

  def test_a_work_may_have_fewer_tries(self):
    worker = beside.Beside('test', pause=no_pause)

    def work():
      self.done.append('tried')
      raise OSError('full')

    worker.submit(work, tries=2)
    self.assertTrue(worker.close(None))
    self.assertEqual((self.done, worker.failures), (['tried'] * 2, 2))


if __name__ == '__main__':
  absltest.main()
