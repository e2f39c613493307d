"""Leases: everything is given once, comes back once, or is given again."""

import hypothesis
import hypothesis.strategies as st
from absl.testing import absltest

from covenant.pool import leases as leases_lib

EVENTS = st.lists(
  st.tuples(
    st.sampled_from('abcd'),
    st.sampled_from(['take', 'give', 'refuse', 'wait', 'begin']),
  ),
  max_size=60,
)


def queue(total, steps=4):
  return leases_lib.LeaseQueue(total, steps, leases_lib.Rates())


class DeskTest(absltest.TestCase):
  @hypothesis.given(EVENTS, st.integers(1, 99), st.integers(1, 60))
  def test_no_sequence_is_lost_or_trained_twice(self, events, total, quota):
    table = queue(total)
    table.begin(quota, until=50.0)
    now, held, numbers, merged, done = 0.0, {}, set(), [], []
    for worker, event in events:
      lease = held.get(worker)
      if lease and table.find(lease.number, worker) is None:
        lease = None  # it was given to another
      if event == 'wait':
        now += 4.0
      elif event == 'begin':
        merged, done = merged + done, []
        table.begin(quota, until=now + 50.0)
      elif event == 'take':
        held[worker] = table.take(worker, now)
        if held[worker]:
          self.assertNotIn(held[worker].number, numbers)
          numbers.add(held[worker].number)
      elif lease and event == 'give':
        table.give_back(lease, now)
        done.append(lease)
      elif lease and event == 'refuse':
        table.refuse(lease)
      spans = [range(x.first, x.first + x.sequences) for x in merged + done]
      ids = [i for span in spans for i in span]
      self.assertLen(set(ids), len(ids))
      self.assertEqual(table.left, total - len(ids))
      self.assertLessEqual(sum(x.sequences for x in done), quota)
      gap = min(set(range(total)) - set(ids), default=total)
      self.assertEqual(table.prefix, gap)

  def test_what_is_overdue_is_given_again_and_first(self):
    table = queue(64)
    table.begin(quota=64, until=100.0)
    for now in 0.0, 1.0:  # in the first it compiled
      table.give_back(table.take('slow', now), now + 0.4)
    table.begin(quota=4, until=100.0)
    lost = table.take('slow', 3.0)
    self.assertEqual((lost.first, lost.sequences), (8, 4))
    self.assertAlmostEqual(lost.until, 3.0 + 3 * 0.4 + 2.0)
    self.assertIsNone(table.take('other', 6.1))
    again = table.take('third', 6.3)
    self.assertEqual(again.first, lost.first)
    self.assertIsNone(table.find(lost.number, 'slow'))
    self.assertFalse(table.complete)

  def test_a_refused_lease_that_was_back_is_given_again_next(self):
    table = queue(8)
    table.begin(quota=4, until=10.0)
    lease = table.take('a', 0.0)
    self.assertIsNone(table.take('b', 0.0))  # no more was opened
    table.give_back(lease, 1.0)
    self.assertTrue(table.complete)
    table.refuse(lease)
    table.begin(quota=8, until=20.0)
    self.assertEqual(table.take('b', 1.0).first, 0)

  def test_leases_take_equal_time_at_speeds_8_to_1(self):
    speeds = {'fast': 80.0, 'slow': 10.0}
    table, now, begun, last = queue(100_000), 0.0, {}, {}
    for _ in range(6):
      table.begin(quota=2000, until=now + 1e6)
      due = dict.fromkeys(speeds, now)
      while not table.complete:
        worker = min(due, key=due.get)
        now = due[worker]
        if begun.get(worker):
          table.give_back(begun[worker], now)
        lease = begun[worker] = table.take(worker, now)
        seconds = lease.sequences / speeds[worker] if lease else 0.1
        due[worker] = now + seconds
        if lease:
          last[worker] = lease.batch
    self.assertGreaterEqual(last['fast'], 4 * last['slow'])

  def test_who_asks_again_has_lost_its_lease(self):
    table = queue(64)
    table.begin(quota=64, until=100.0)
    first = table.take('a', 0.0)
    second = table.take('a', 1.0)
    self.assertEqual(first.first, second.first)
    self.assertIsNone(table.find(first.number, 'a'))

  def test_who_never_brings_a_lease_back_gets_one_all_the_same(self):
    """A machine that fails for a year, alone, and is mended then."""
    table = queue(64)
    table.begin(quota=64, until=1e9)
    for now in 0.0, 1.0:  # the first one compiles
      table.give_back(table.take('a', now), now + 1.0)
    for now in range(2, 1202):
      self.assertIsNotNone(table.take('a', float(now)))

  def test_short_ends_are_leased_too(self):
    table = queue(7)
    table.begin(quota=7, until=9.0)
    sizes = []
    while lease := table.take(f'w{len(sizes)}', 0.0):
      sizes.append((lease.steps, lease.batch))
    self.assertEqual(sizes, [(4, 1), (3, 1)])
    self.assertIsNone(table.take('late', 10.0))


if __name__ == '__main__':
  absltest.main()
