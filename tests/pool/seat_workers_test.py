"""The workers that may hold stages, without seats."""

from unittest import mock

from absl.testing import absltest

from covenant.pool import seat_workers
from tests.pool import seats_test


class FailuresTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.now = 5
    self.workers = seat_workers.Workers(
      3, lambda channel: 0, lambda: self.now, memory=10
    )

  def join(self, name):
    channel = seats_test.Channel(name)
    self.workers.open(channel)
    self.workers.greet(channel, {'most': 1, 'has': []})
    return channel

  def test_a_worker_that_comes_back_has_failed_as_often(self):
    for count in range(3):
      channel = self.join('a')
      self.assertEqual(self.workers.failures('a'), count)
      self.workers.fail('a')
      self.workers.leave(channel)
      self.workers.close(channel)
    self.join('a')
    self.join('b')
    self.assertEqual(self.workers.fittest(1, ()).name, 'b')
    self.assertEqual([w.name for w in self.workers.idle(())], ['b', 'a'])

  def test_failures_are_forgotten_after_some_outer_steps(self):
    self.workers.fail('a')
    self.now += 9
    self.workers.fail('a')
    self.now += 9
    self.assertEqual(self.workers.failures('a'), 2)
    self.now += 1
    self.assertEqual(self.workers.failures('a'), 0)
    self.workers.fail('a')
    self.assertEqual(self.workers.failures('a'), 1)

  def test_those_of_the_last_keys_are_remembered(self):
    with mock.patch.object(seat_workers, '_KEYS', 2):
      for name in 'abac':
        self.workers.fail(name)
    found = [self.workers.failures(name) for name in 'abc']
    self.assertEqual(found, [2, 0, 1])


if __name__ == '__main__':
  absltest.main()
