"""Tests of seats, with workers that only listen."""

import pathlib
from unittest import mock

from absl.testing import absltest

from covenant.pool import orders
from covenant.pool import seat_events
from covenant.pool import seat_workers
from covenant.pool import seats as seats_lib
from tests.pool import orders_test


class Channel:
  """A worker's channel that keeps what it was sent."""

  def __init__(self, worker):
    self.worker = worker
    self.waiting = 0
    self.closed = False
    self.said = []

  def send(self, text, data=b''):
    self.said.append((text['do'], text['stage']))

  def close(self):
    self.closed = True


class SeatsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.create_tempdir().full_path)
    self.log = orders.OrderLog(folder, 'g')
    self.now = 1000.0
    clock = mock.patch.object(seats_lib.time, 'monotonic', self.clock)
    self.enterContext(clock)
    self.seats = seats_lib.Seats(
      3, self.log, lambda order, stage: order, patience=60.0
    )

  def clock(self):
    self.now += 1e-3
    return self.now

  def join(self, name, most=2, has=()):
    channel = Channel(name)
    self.seats.open(channel)
    hello = {'did': 'hello', 'most': most, 'has': list(has)}
    self.seats.receive(channel, hello, b'')
    return channel

  def at(self, channel, stage, number=0, state='g'):
    text = {'did': 'at', 'stage': stage, 'number': number, 'id': state}
    text |= {'digests': {'x': [f'{stage:02x}']}, 'square': 4.0}
    self.seats.receive(channel, text, b'')

  def full(self):
    """Three workers, each with a stage at the first state."""
    channels = [self.join(name) for name in 'abc']
    for stage, channel in enumerate(channels):
      self.at(channel, stage)
    return channels

  def digests(self):
    return [digests for _, digests in self.seats.states()]

  def holders(self):
    return ''.join(self.seats.worker(s) or '-' for s in range(3))

  def test_at_first_each_worker_gets_one_stage(self):
    self.join('a')
    self.assertEqual(self.holders(), 'a--')
    self.assertFalse(self.seats.is_ready)
    self.join('b')
    self.join('c')
    self.assertEqual(self.holders(), 'abc')

  def test_who_says_hello_again_on_its_channel_is_refused(self):
    channel = self.join('a')
    with self.assertRaisesRegex(ValueError, 'hello already'):
      self.seats.receive(channel, {'did': 'hello', 'most': 1, 'has': []}, b'')
    self.assertEqual(self.seats._workers.get('a').has, frozenset())

  def test_hello_on_a_closed_channel_is_refused(self):
    """The news of its end may come first, from another thread."""
    channel = Channel('a')
    self.seats.open(channel)
    self.seats.close(channel)
    with self.assertRaisesRegex(ValueError, 'is closed'):
      self.seats.receive(channel, {'did': 'hello', 'most': 1, 'has': []}, b'')
    self.assertEqual(self.holders(), '---')

  def test_who_comes_and_goes_leaves_one_event(self):
    self.full()
    for _ in range(100):
      again = self.join('b')  # on another channel
      self.at(again, 1)
    self.assertEqual(self.seats.poll(0).what, seat_events.LOST)
    self.assertIsNone(self.seats.poll(0))

  def test_nothing_is_sent_twice_to_who_repeats_itself(self):
    channels = self.full()
    self.seats.give(orders_test.order(0, 'g'))
    for _ in range(100):
      self.at(channels[0], 0)
      self.at(channels[1], 1, 5, 'elsewhere')
    self.assertEqual(channels[0].said, [('take', 0), ('order', 0)])
    self.assertEqual(channels[1].said, [('take', 1), ('order', 1)])

  def test_a_sum_of_squares_that_is_none_is_malformed(self):
    channels = self.full()
    for square in -1.0, float('inf'), float('nan'):
      text = {'did': 'at', 'stage': 0, 'number': 0, 'id': 'g', 'digests': {}}
      with self.assertRaisesRegex(ValueError, 'sum of squares'):
        self.seats.receive(channels[0], text | {'square': square}, b'')
    self.assertEqual(self.seats.square(), 12.0)

  def test_channels_that_hold_no_stage_make_room(self):
    holders = self.full()
    count = seat_workers.MOST_IDLE + 5
    silent = [Channel(f's{i}') for i in range(count)]
    for channel in silent:
      self.seats.open(channel)
    self.assertEqual([c.closed for c in silent], [True] * 5 + [False] * 32)
    self.assertFalse(any(c.closed for c in holders))
    self.assertEqual(self.holders(), 'abc')

  def test_no_worker_says_that_a_channel_is_open_or_closed_or_a_stage_lost(
    self,
  ):
    channels = self.full()
    for did in 'open', 'close', seat_events.LOST, ['forward'], None:
      with self.assertRaises((ValueError, TypeError)):
        text = {'did': did, 'stage': 1}
        self.seats.receive(channels[1], text, b'')
    self.assertEqual(self.holders(), 'abc')
    self.assertIsNone(self.seats.poll(0))

  def test_a_stage_is_taken_from_the_holder_that_is_meant(self):
    self.full()
    self.seats.drop(1, holder='a')
    self.assertEqual(self.holders(), 'abc')
    self.seats.drop(1, holder='b')
    self.assertEqual(self.holders()[1], 'a')

  def test_long_messages_are_of_use_from_holders_alone(self):
    channels = self.full()
    idle = self.join('d')
    some = [self.seats.longest(c) for c in (channels[0], idle)]
    self.assertEqual(some, [1 << 30, 0])
    self.seats.drop(0)
    self.assertEqual(self.seats.longest(channels[0]), 0)

  def test_a_holder_gets_the_sections_that_it_was_told_to_take(self):
    """Each a few times: a payload may have to be fetched for them."""
    self.full()
    for number in range(2):
      self.seats.give(orders_test.order(number, self.log.id))

    def serve(worker='a', stage=0, number=0, uid=4):
      return self.seats.serve(worker, stage, number, uid)

    self.assertFalse(serve(number=1))  # it was not told yet
    self.assertFalse(serve('b') or serve(stage=1) or serve('stranger'))
    self.assertEqual([serve() for _ in range(5)], [True] * 3 + [False] * 2)
    self.assertTrue(serve(uid=0))
    self.at(self.seats._seats[0].channel, 0, 1, self.log.state(1))
    self.assertFalse(serve())
    self.assertEqual([serve(number=1) for _ in range(4)], [True] * 3 + [False])

  def test_who_holds_a_stage(self):
    self.full()
    self.join('d')
    held = [name for name in 'abcde' if self.seats.holds(name)]
    self.assertEqual(held, ['a', 'b', 'c'])

  def test_who_floods_the_head_loses_its_stage(self):
    self.seats.events = seat_events.Events(10**6)
    channels = self.full()
    for _ in range(9):
      text = {'did': 'forward', 'stage': 1}
      self.seats.receive(channels[1], text, bytes(2 * 10**5))
    self.assertNotEqual(self.seats.worker(1), 'b')
    self.assertIn(('leave', 1), channels[1].said)
    events = list(iter(lambda: self.seats.poll(0), None))
    self.assertLen([e for e in events if e.what == 'forward'], 5)

  def test_who_does_not_read_loses_its_stages_and_its_channel(self):
    """More waits for it than is under way in a step: 2 x 3 + 4 messages."""
    self.seats = seats_lib.Seats(
      3, self.log, lambda order, stage: order, longest=1000
    )
    channels = self.full()
    channels[2].waiting = 10_001
    channels[1].waiting = 10_000
    self.seats.send(1, {'do': 'forward', 'stage': 1})
    self.assertEqual(self.holders(), 'abc')
    channels[1].waiting += 1
    self.seats.send(1, {'do': 'forward', 'stage': 1})
    self.assertEqual(self.holders(), 'aac')
    self.assertEqual(self.seats.lost(), {1})
    self.assertEqual([c.closed for c in channels], [False, True, False])
    self.assertEqual(self.seats.poll(0)[:2], (1, seat_events.LOST))
    self.assertEqual(self.seats._workers.failures('b'), 1)

  def test_what_is_read_may_go_on(self):
    self.seats.events = seat_events.Events(10**6)
    channels = self.full()
    for _ in range(50):
      text = {'did': 'forward', 'stage': 1}
      self.seats.receive(channels[1], text, bytes(2 * 10**5))
      self.assertEqual(self.seats.poll(0).what, 'forward')
    self.assertEqual(self.holders(), 'abc')

  def test_a_spare_takes_what_is_lost_before_a_neighbor(self):
    channels = self.full()
    self.assertTrue(self.seats.is_ready)
    spare = self.join('d')
    self.seats.close(channels[1])
    self.assertEqual(self.holders(), 'adc')
    self.assertEqual(spare.said, [('take', 1)])
    self.assertEqual(self.seats.poll(0)[:2], (1, seat_events.LOST))
    self.assertFalse(self.seats.is_ready)
    self.at(spare, 1)
    self.assertTrue(self.seats.is_ready)
    self.assertEqual(self.seats.replaced, 1)

  def test_a_neighbor_takes_over_if_it_has_room(self):
    channels = self.full()
    self.seats.close(channels[0])
    self.assertEqual(self.holders(), 'bbc')
    self.seats.close(channels[2])
    self.assertEqual(self.holders(), 'bb-')  # which has room for two

  def test_whoever_comes_back_with_its_state_gets_its_stage_again(self):
    channels = self.full()
    self.seats.close(channels[2])
    self.assertEqual(self.holders(), 'aba')
    again = self.join('c', has=[2])
    self.seats.spread()
    self.assertEqual(self.holders(), 'aba')  # until it has caught up
    self.at(again, 2)
    self.seats.spread()
    self.assertEqual(self.holders(), 'abc')

  def test_a_newcomer_prepares_while_the_neighbor_holds_the_stage(self):
    channels = self.full()
    self.seats.close(channels[1])
    self.at(channels[0], 1)
    newcomer = self.join('d')
    self.assertEqual(newcomer.said, [('take', 1)])
    self.assertTrue(self.seats.is_ready)
    self.assertTrue(self.seats.holds('d'))  # it may fetch sections
    self.at(newcomer, 1)
    order = orders_test.order(0, 'g')
    self.seats.give(order)
    for stage, channel in (0, channels[0]), (1, channels[0]), (2, channels[2]):
      self.at(channel, stage, 1, order.after)
    self.assertEqual(newcomer.said[-1], ('order', 1))
    self.seats.spread()
    self.assertEqual(self.holders(), 'aac')
    self.at(newcomer, 1, 1, order.after)
    self.seats.spread()
    self.assertEqual(self.holders(), 'adc')
    self.assertTrue(self.seats.is_ready)
    self.assertEqual(channels[0].said[-1], ('leave', 1))

  def test_who_prepares_takes_a_stage_that_is_lost_meanwhile(self):
    channels = self.full()
    self.seats.close(channels[1])
    newcomer = self.join('d')
    self.at(newcomer, 1)
    self.seats.close(channels[0])
    self.assertEqual(self.holders(), 'cdc')
    self.assertEqual(newcomer.said, [('take', 1)])
    self.assertEqual(self.seats.lost(), {0})

  def test_who_leaves_or_fails_prepares_no_more(self):
    channels = self.full()
    self.seats.close(channels[1])
    failed = {'did': 'failed', 'stage': 1}
    for goes in (
      self.seats.close,
      lambda channel: self.seats.receive(channel, failed, b''),
    ):
      newcomer = self.join('d')
      self.at(newcomer, 1)
      goes(newcomer)
      self.assertFalse(self.seats.holds('d'))
      self.seats.spread()
      self.assertNotIn('d', self.holders())
      self.seats.close(newcomer)

  def test_another_computes_a_stage_that_was_lost(self):
    channels = self.full()
    order = orders_test.order(0, 'g')
    self.seats.give(order)
    self.assertEqual(self.seats.lost(), set())
    self.seats.close(channels[1])
    for stage, channel in (0, channels[0]), (2, channels[2]):
      self.at(channel, stage, 1, order.after)
    self.assertEqual(self.seats.lost(), {1})
    self.seats.stand_in(1, {'x': ['11']}, 4.0)
    self.at(channels[0], 1)  # the neighbor, before the order
    self.assertEqual(self.seats.lost(), {1})
    want = [{'x': ['00']}, {'x': ['11']}, {'x': ['02']}]
    self.assertEqual((self.digests(), self.seats.square()), (want, 12.0))
    self.at(channels[0], 1, 1, order.after)
    self.assertEqual(self.seats.lost(), set())
    self.seats.stand_in(1, {}, 0.0)  # too late
    self.assertEqual(self.digests()[1], {'x': ['01']})

  def test_who_takes_an_order_for_too_long_loses_its_stage(self):
    channels = self.full()
    order = orders_test.order(0, 'g')
    self.seats.give(order)
    for stage, channel in (0, channels[0]), (2, channels[2]):
      self.at(channel, stage, 1, order.after)
    self.now += 59.0
    self.assertEqual((self.seats.missing(), self.seats.lost()), ({1}, set()))
    self.assertEqual(self.holders(), 'abc')
    self.now += 2.0
    self.assertEqual((self.seats.missing(), self.seats.lost()), ({1}, {1}))
    self.assertEqual(self.holders(), 'aac')
    self.assertEqual(channels[1].said[-1], ('leave', 1))

  def test_who_says_nothing_of_a_stage_that_it_took_loses_it(self):
    first, silent, third = map(self.join, 'abc')
    self.at(first, 0)
    self.at(third, 2)
    self.now += 59.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'abc')
    self.now += 2.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'aac')
    self.assertEqual(silent.said, [('take', 1), ('leave', 1)])
    self.assertEqual(self.seats.lost(), {1})

  def test_nobody_is_late_while_all_are(self):
    """All compile at first: who has a stage was not faster than the others."""
    channels = [self.join(name) for name in 'abc']
    self.now += 90.0
    self.seats.missing()
    self.at(channels[0], 0)
    self.now += 80.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'abc')
    self.at(channels[1], 1)
    self.now += 20.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'aba')  # it took twice as long
    self.assertEqual(channels[2].said, [('take', 2), ('leave', 2)])

  def test_who_has_no_stage_need_not_be_faster(self):
    for name in 'abc':
      self.join(name)
    self.join('d')
    self.now += 61.0
    self.seats.missing()
    self.assertEqual(self.seats.worker(0), 'd')

  def test_who_is_told_to_begin_anew_and_does_not_loses_its_stage(self):
    channels = self.full()
    self.now += 50.0
    self.at(channels[1], 1, 5, 'elsewhere')
    self.assertEqual(channels[1].said[-1], ('reset', 1))
    self.now += 50.0
    self.at(channels[1], 1, 5, 'elsewhere')  # which gains it no time
    self.seats.missing()
    self.assertEqual(self.holders(), 'abc')
    self.now += 11.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'aac')

  def test_who_prepares_and_says_nothing_makes_room_for_another(self):
    channels = self.full()
    self.seats.close(channels[1])
    self.at(channels[0], 1)
    silent = self.join('d')
    self.now += 59.0
    another = self.join('e')
    self.assertEqual(another.said, [])
    self.now += 2.0
    self.seats.spread()
    self.assertEqual(silent.said, [('take', 1), ('leave', 1)])
    self.assertEqual(another.said, [('take', 1)])
    self.at(another, 1)
    self.seats.spread()
    self.assertEqual(self.holders(), 'aec')

  def test_who_lost_a_stage_gets_one_after_others_and_twice_the_time(self):
    channels = self.full()
    self.seats.drop(1)
    self.assertEqual(self.holders(), 'aac')
    self.seats.close(channels[0])
    self.assertEqual(self.holders(), 'cbc')  # nobody else has room
    self.at(channels[2], 0)
    self.now += 119.0
    self.seats.missing()
    self.assertEqual(self.seats.worker(1), 'b')
    self.at(channels[1], 1)
    order = orders_test.order(0, 'g')
    self.seats.give(order)
    for stage in 0, 2:
      self.at(channels[2], stage, 1, order.after)
    self.now += 61.0
    self.assertEqual((self.seats.missing(), self.seats.lost()), ({1},) * 2)
    self.now += 60.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'cbc')  # nobody else has room
    self.join('d')
    self.assertEqual(self.holders(), 'cdc')

  def test_who_lost_a_stage_gains_nothing_by_coming_back(self):
    channels = self.full()
    self.seats.drop(1)
    for channel in channels[1], channels[0]:
      self.seats.close(channel)
    self.assertEqual(self.holders(), 'c-c')
    self.join('b')  # again
    self.at(channels[2], 0)
    self.assertEqual(self.holders(), 'cbc')
    self.join('d')
    self.now += 119.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'cbc')
    self.now += 2.0
    self.seats.missing()
    self.assertEqual(self.holders(), 'cdc')

  def test_stages_come_back_to_a_head_that_is_started_again(self):
    """In another order, and a spare before them; nobody loses its moments."""
    self.log.add(orders_test.order(0, 'g'))
    spare = self.join('d')
    for name, stage in ('c', 2), ('b', 1):
      self.at(self.join(name, has=[stage]), stage, 1, self.log.id)
    self.seats.missing()
    self.assertEqual((self.holders(), spare.said), ('-bc', []))
    self.now += 61.0
    self.seats.missing()
    self.assertEqual((self.holders(), spare.said), ('dbc', [('take', 0)]))

  def test_a_stage_that_does_not_come_back_is_waited_for_no_longer(self):
    """A head is started again; the first one catches up slowly."""
    self.log.add(orders_test.order(0, 'g'))
    self.log.add(orders_test.order(1, self.log.id))
    self.seats = seats_lib.Seats(
      3, self.log, lambda order, stage: order, patience=60.0
    )
    slow, ready = (self.join(name, 1, [i]) for i, name in enumerate('ab'))
    self.at(ready, 1, 2, self.log.id)
    self.at(slow, 0)
    self.now += 40.0
    self.at(slow, 0, 1, self.log.state(1))
    self.assertEqual((self.seats.missing(), self.seats.lost()), ({0, 2}, set()))
    self.now += 21.0
    self.assertEqual((self.seats.missing(), self.seats.lost()), ({0, 2},) * 2)
    self.assertEqual(self.holders(), 'ab-')

  def test_before_there_are_orders_all_stages_must_come(self):
    self.at(self.join('a', most=1), 0)
    self.now += 1e6
    self.assertEqual((self.seats.missing(), self.seats.lost()), ({1, 2}, set()))

  def test_who_is_slow_makes_room_for_another_if_there_is_one(self):
    channels = self.full()
    self.seats.close(channels[0])
    self.seats.drop(2, if_another=True)
    self.assertEqual(self.holders(), 'bbc')
    self.join('d')
    self.seats.drop(2, if_another=True)
    self.assertEqual(self.holders(), 'bbd')

  def test_a_banned_worker_holds_nothing(self):
    channels = self.full()
    self.seats.ban('b')
    self.assertTrue(channels[1].closed)
    self.assertEqual(self.holders(), 'aac')
    self.join('b')
    self.seats.spread()
    self.assertEqual(self.holders(), 'aac')

  def test_a_ban_costs_nobody_else_a_stage(self):
    channels = self.full()
    self.seats.close(channels[1])
    self.seats.ban('b')  # who has left
    self.assertEqual(self.holders(), 'aac')
    self.assertFalse(channels[0].closed)

  def test_a_banned_worker_does_not_get_what_it_prepares_for(self):
    channels = self.full()
    self.seats.close(channels[1])
    newcomer = self.join('d')
    self.seats.banned.add('d')
    self.seats.close(channels[0])
    self.assertNotIn('d', self.holders())
    self.assertEqual(newcomer.said[-1], ('leave', 1))

  def test_who_repeats_an_old_state_gains_no_time(self):
    channels = self.full()
    self.seats.give(orders_test.order(0, 'g'))
    self.now += 50.0
    for stage, state in (0, 'g'), (1, 'nonsense'):
      self.at(channels[stage], stage, 0, state)
    self.seats.missing()
    self.assertEqual(self.seats.lost(), set())
    self.now += 11.0
    self.seats.missing()
    self.assertEqual(self.seats.lost(), {0, 1, 2})

  def test_stages_that_must_go_back_get_time_for_it(self):
    channels = self.full()
    order = orders_test.order(0, 'g')
    self.seats.give(order)
    for stage, channel in enumerate(channels):
      self.at(channel, stage, 1, order.after)
    self.now += 100.0
    self.seats.give(orders_test.order(0, 'g', factor=2.0))
    self.assertFalse(self.seats.is_ready)  # they are on another history
    for stage, channel in enumerate(channels):
      self.assertEqual(channel.said[-1], ('reset', stage))
      self.at(channel, stage)
    self.now += 59.0
    self.seats.missing()
    self.assertEqual(self.seats.lost(), set())

  def test_holders_with_the_digests_that_they_say(self):
    channels = self.full()
    self.seats.close(channels[1])
    self.assertEqual(
      self.seats.states(),
      [('a', {'x': ['00']}), ('', {'x': ['01']}), ('c', {'x': ['02']})],
    )

  def test_messages_of_former_holders_are_ignored(self):
    channels = self.full()
    self.seats.drop(1)
    self.assertEqual(self.seats.poll(0).what, seat_events.LOST)
    text = {'did': 'forward', 'stage': 1}
    self.seats.receive(channels[1], text, b'')
    self.assertIsNone(self.seats.poll(0))
    self.seats.receive(channels[0], text, b'x')
    self.assertEqual(self.seats.poll(0), (1, 'forward', text, b'x', 'a'))

  def test_stages_follow_the_orders(self):
    channels = self.full()
    order = orders_test.order(0, 'g')
    self.seats.give(order)
    self.assertFalse(self.seats.is_ready)
    for stage, channel in enumerate(channels):
      self.assertEqual(channel.said[-1], ('order', stage))
      self.at(channel, stage, 1, order.after)
    self.assertTrue(self.seats.is_ready)
    self.assertEqual(self.seats.square(), 12.0)
    self.assertEqual(self.digests(), [{'x': [f'0{s}']} for s in range(3)])

  def test_a_stage_of_another_history_begins_from_the_base(self):
    channels = self.full()
    self.at(channels[1], 1, 5, 'elsewhere')
    self.assertEqual(channels[1].said[-1], ('reset', 1))
    self.assertFalse(self.seats.is_ready)

  def test_waiting_ends_when_asked_to_stop(self):
    self.assertFalse(self.seats.wait(lambda: True))
    self.full()
    self.assertTrue(self.seats.wait(lambda: True))


if __name__ == '__main__':
  absltest.main()
