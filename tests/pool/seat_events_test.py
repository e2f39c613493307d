"""Messages of stages that wait to be read."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant.pool import seat_events

Event = seat_events.Event


class EventsTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(text={}, data=bytes(10**5)), dict(text={'much': 'x' * 10**5}, data=b'')
  )  # fmt: skip
  def test_what_waits_is_bounded_by_stage(self, text, data):
    event = Event(1, 'forward', text, data)
    events = seat_events.Events(10**6)
    taken = [events.put(event) for _ in range(100)]
    self.assertEqual(taken, [True] * 10 + [False] * 90)
    self.assertTrue(events.put(event._replace(stage=2)))
    self.assertEqual(events.poll(0), event)
    self.assertTrue(events.put(event))  # as one was read
    while events.poll(0):
      pass
    self.assertEqual([events.put(event) for _ in range(11)], taken[:11])

  def test_a_loss_waits_once(self):
    events = seat_events.Events(10**6)
    for _ in range(3):
      events.lose(2)
    events.lose(1)
    losses = [Event(s, seat_events.LOST, {}, b'') for s in (2, 1)]
    self.assertEqual([events.poll(0), events.poll(0)], losses)
    self.assertIsNone(events.poll(0))
    events.lose(2)
    self.assertEqual(events.poll(0), losses[0])


if __name__ == '__main__':
  absltest.main()
