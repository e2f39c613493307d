"""Tests for covenant.pool.seat."""

from unittest import mock

from absl.testing import absltest

from covenant.pool import channel as channel_lib
from covenant.pool import seat as seat_lib

DIGESTS = {'embedding': ['AB' * 32]}


def state(number, square=2.5):
  """Returns the message of a stage that has applied so many orders."""
  return {
    'number': number, 'id': f'state-{number}', 'square': square,
    'digests': DIGESTS,
  }  # fmt: skip


def holder(worker='a'):
  channel = mock.create_autospec(channel_lib.Channel, instance=True)
  channel.worker = worker
  return channel


class SeatTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.seat = seat_lib.Seat(1, holder())

  def test_an_empty_one_has_no_worker_and_sends_nothing(self):
    empty = seat_lib.Seat(0)
    empty.send({'do': 'nothing'})
    self.assertEqual((empty.worker, empty.holder_at(-1)), ('', ''))

  def test_what_its_holder_says_of_its_state(self):
    self.seat.note(state(3), end=4)
    self.assertEqual((self.seat.number, self.seat.id), (3, 'state-3'))
    self.assertEqual((self.seat.digests, self.seat.square), ({}, 0.0))
    self.assertEqual(self.seat.holder_at(4), '')
    self.seat.is_lost = True
    self.seat.note(state(4), end=4)
    self.assertEqual(self.seat.digests, {'embedding': ['ab' * 32]})
    self.assertEqual((self.seat.square, self.seat.is_lost), (2.5, False))
    self.assertEqual(self.seat.holder_at(4), 'a')

  def test_a_malformed_state_changes_nothing(self):
    self.seat.note(state(3), end=3)
    bad = [
      state(4, square=float('nan')),
      state(4, square=-1.0),
      state(4) | {'digests': {'embedding': ['no digits']}},
    ]
    for text in bad:
      with self.assertRaises(ValueError):
        self.seat.note(text, end=4)
      self.assertEqual((self.seat.number, self.seat.square), (3, 2.5))

  def test_nothing_is_told_twice(self):
    told = [0, 0, 1, 0, 1, 2]
    self.assertEqual(
      [self.seat.tell(what) for what in told],
      [True, False, True, False, False, True],
    )

  def test_sections_of_the_newest_order_three_times_each(self):
    self.seat.tell(5)
    self.assertFalse(self.seat.serve(4, uid=0))
    served = [self.seat.serve(5, uid=0) for _ in range(4)]
    self.assertEqual(served, [True, True, True, False])
    self.assertTrue(self.seat.serve(5, uid=1))
    self.seat.tell(6)
    self.assertTrue(self.seat.serve(6, uid=0))

  def test_its_holder_is_late_only_with_what_it_was_told(self):
    with mock.patch.object(seat_lib.time, 'monotonic') as now:
      now.return_value = 100.0
      self.seat.tell(0)
      self.seat.seconds, self.seat.number = 10.0, 0
      now.return_value = 110.0
      self.assertFalse(self.seat.is_late(end=1))
      now.return_value = 110.5
      self.assertTrue(self.seat.is_late(end=1))
      self.assertFalse(self.seat.is_late(end=0))  # it has applied all
      self.seat.channel = None
      self.assertFalse(self.seat.is_late(end=1))

  def test_taking_over_the_holder_of_another_seat(self):
    spare = seat_lib.Seat(1, holder('b'))
    spare.tell(3)
    spare.serve(3, uid=7)
    spare.note(state(3), end=3)
    self.seat.is_lost = True
    self.seat.take(spare, end=3)
    self.assertEqual((self.seat.worker, self.seat.number), ('b', 3))
    self.assertEqual(self.seat.digests, spare.digests)
    self.assertEqual(self.seat.served[7], 1)  # requests count on
    self.assertFalse(self.seat.is_lost)


if __name__ == '__main__':
  absltest.main()
