"""Tests for the limits of strangers at a pool, with clocks of the tests."""

import socket
from unittest import mock

import hypothesis
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import strategies as st

from covenant.pool import visitors


class Clock:
  def __init__(self):
    self.now = 0

  def __call__(self):
    return self.now


class SeldomTest(absltest.TestCase):
  def test_one_record_a_minute_is_written(self):
    clock = Clock()
    seldom = visitors.Seldom(clock)
    written = []
    for clock.now in 0, 1, 59, 60, 61, 119, 120:
      if seldom.filter(None):
        written.append(clock.now)
    self.assertEqual(written, [0, 60, 120])


class ConnectionsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.clock = Clock()
    self.connections = visitors.Connections(frozenset({'9.9.9.9'}), self.clock)
    self.sockets = []

  def enter(self, host, port):
    one, other = socket.socketpair()
    for end in one, other:
      self.addCleanup(end.close)
    self.sockets.append(one)
    return self.connections.enter(one, (host, port))

  def test_an_address_has_its_share(self):
    for port in range(visitors.PER_ADDRESS):
      self.assertTrue(self.enter('1.1.1.1', port))
    self.assertFalse(self.enter('1.1.1.1', 999))
    self.assertTrue(self.enter('2.2.2.2', 1))
    self.sockets[3].close()
    self.assertTrue(self.enter('1.1.1.1', 1000))

  def test_an_ipv6_customer_is_one(self):
    for port in range(visitors.PER_ADDRESS):
      self.assertTrue(self.enter(f'2001:db8::{port:x}', port))
    self.assertFalse(self.enter('2001:db8::ffff', 999))
    self.assertTrue(self.enter('2001:db8:0:1::1', 999))

  def test_a_proxy_has_no_share(self):
    for port in range(2 * visitors.PER_ADDRESS):
      self.assertTrue(self.enter('9.9.9.9', port))

  def test_the_longest_silent_one_makes_room(self):
    with mock.patch.object(visitors, '_MOST', 3):
      for i in range(3):
        self.assertTrue(self.enter(f'1.1.1.{i}', i))
      self.connections.heard(('1.1.1.0', 0))
      self.assertTrue(self.enter('1.1.1.9', 9))
      self.assertEqual(self.sockets[1].recv(1), b'')  # shut down
      for i in (2, 9):
        self.connections.heard((f'1.1.1.{i}', i))
      self.assertFalse(self.enter('1.1.1.10', 10))

  def test_who_says_nothing_is_closed(self):
    self.enter('1.1.1.1', 1)
    self.enter('1.1.1.1', 2)
    self.connections.heard(('1.1.1.1', 1))
    self.connections.close_silent()
    self.clock.now = 11.0
    self.enter('1.1.1.1', 3)
    self.connections.close_silent()
    self.assertEqual(
      set(self.connections._open), {('1.1.1.1', 1), ('1.1.1.1', 3)}
    )


class RequestsTest(absltest.TestCase):
  def test_a_burst_and_then_a_rate(self):
    clock = Clock()
    requests = visitors.Requests(clock)
    given = sum(requests.enter('1.1.1.1') for _ in range(1000))
    self.assertEqual(given, int(visitors._BURST))
    self.assertTrue(requests.enter('2.2.2.2'))
    clock.now = 1.0
    given = sum(requests.enter('1.1.1.1') for _ in range(1000))
    self.assertEqual(given, int(visitors._REQUESTS))

  def test_memory_is_bounded(self):
    requests = visitors.Requests(Clock())
    with mock.patch.object(visitors, '_ADDRESSES', 10):
      for i in range(100):
        requests.enter(f'1.1.1.{i}')
    self.assertLen(requests._left, 10)


class TokensTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.clock = Clock()
    self.clock.now = 1
    self.known = set()
    self.tokens = visitors.Tokens(self.known.__contains__, self.clock)

  def issue(self, worker):
    self.clock.now += 1
    return self.tokens.issue(worker)

  def test_each_number_counts_once(self):
    token = self.issue('a')
    for number, want in ((0, 1), (0, 0), (5, 1), (4, 0), (5, 0), (6, 1)):
      self.assertEqual(self.tokens.accept('a', token, number), bool(want))

  def test_a_newer_token_ends_the_older(self):
    old, new = self.issue('a'), self.issue('a')
    self.assertTrue(self.tokens.accept('a', old, 7))
    self.assertTrue(self.tokens.accept('a', new, 0))
    self.assertFalse(self.tokens.accept('a', old, 8))

  @parameterized.parameters('', '.', 'x.y', '1.', f'2.{"0" * 64}', 'é.é')
  def test_made_up_tokens(self, token):
    self.issue('a')
    self.assertFalse(self.tokens.accept('a', token, 0))

  def test_a_token_is_of_one_worker(self):
    self.assertFalse(self.tokens.accept('b', self.issue('a'), 0))

  def test_a_flood_of_keys_replays_nothing_and_locks_nobody_out(self):
    """The known are remembered; others greet once more."""
    self.known.add('known')
    used = {name: self.issue(name) for name in ('known', 'new')}
    unused = self.issue('late')
    for name, token in used.items():
      self.assertTrue(self.tokens.accept(name, token, 3))
    with mock.patch.object(visitors, '_KEYS', 10):
      for i in range(1000):
        self.assertTrue(self.tokens.accept(f'k{i}', self.issue(f'k{i}'), 0))
    self.assertLen(self.tokens._last, 10)
    self.assertFalse(self.tokens.accept('known', used['known'], 3))
    self.assertTrue(self.tokens.accept('known', used['known'], 4))
    self.assertFalse(self.tokens.accept('new', used['new'], 3))
    self.assertFalse(self.tokens.accept('late', unused, 0))
    for name in 'new', 'late', 'never seen':
      self.assertTrue(self.tokens.accept(name, self.issue(name), 0))

  @hypothesis.settings(deadline=None)
  @hypothesis.given(
    st.lists(
      st.tuples(st.sampled_from('abcd'), st.booleans(), st.integers(0, 3)),
      max_size=60,
    )
  )
  def test_nothing_is_ever_accepted_twice(self, events):
    clock = Clock()
    tokens = visitors.Tokens(lambda worker: worker == 'a', clock)
    held, accepted = {}, set()
    with mock.patch.object(visitors, '_KEYS', 2):
      for worker, anew, number in events:
        clock.now += 1
        if anew or worker not in held:
          held.setdefault(worker, []).append(tokens.issue(worker))
        for token in held[worker]:
          if tokens.accept(worker, token, number):
            self.assertNotIn((token, number), accepted)
            accepted.add((token, number))


class SharesTest(absltest.TestCase):
  def test_so_many_at_a_time(self):
    shares = visitors.Shares(2)
    self.assertEqual([shares.enter('a') for _ in range(3)], [True, True, False])
    self.assertTrue(shares.enter('b'))
    shares.leave('a')
    self.assertTrue(shares.enter('a'))
    for name in 'aab':
      shares.leave(name)
    self.assertEmpty(shares._now)


if __name__ == '__main__':
  absltest.main()
