"""Questions to stages and their answers."""

import queue
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant.pool import seat_events
from covenant.pool import stage_talk

Event = seat_events.Event


class Seats:
  """Stages that answer what the test says."""

  def __init__(self):
    self.events = queue.SimpleQueue()
    self.dropped = []

  def poll(self, seconds):
    return None if self.events.empty() else self.events.get()

  def send(self, stage, text, data=b''):
    pass

  def drop(self, stage):
    self.dropped.append(stage)
    self.events.put(Event(stage, seat_events.LOST, {}, b''))


class StageTalkTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.seats = Seats()
    self.talk = self.make()

  def make(self, late=lambda: False, patience=60.0):
    return stage_talk.StageTalk(self.seats, 2, late, patience)

  def ask(self, stage=0, what='forward', number=3, attempt=1):
    text = {'do': what, 'microbatch': number, 'attempt': attempt}
    self.talk.ask(stage, text)

  def say(self, stage=0, what='forward', number=3, attempt=1, **text):
    text |= {'microbatch': number, 'attempt': attempt}
    self.seats.events.put(Event(stage, what, text, b''))

  def test_returns_answers_of_open_questions_once(self):
    self.ask()
    self.say(attempt=0)  # of an attempt before
    self.say(seconds=1.5)
    self.assertEqual(self.talk.next().text['seconds'], 1.5)
    self.assertEqual(self.talk.busy, [1.5, 0.0])
    self.ask(number=4)
    self.say()
    with self.assertRaisesRegex(stage_talk.NonsenseError, 'nobody asked'):
      self.talk.next()

  @parameterized.parameters(-1.0, float('nan'), float('inf'), 'x', None, 3)
  def test_times_that_are_none_count_as_nothing(self, seconds):
    self.ask()
    self.say(seconds=seconds)
    self.talk.next()
    self.assertEqual(self.talk.busy, [0.0, 0.0])

  @parameterized.parameters(('x', 1), (3, [1]), (1.0, 1), (3, True))
  def test_malformed_answers_are_nonsense(self, number, attempt):
    self.ask()
    self.say(number=number, attempt=attempt)
    with self.assertRaises(stage_talk.NonsenseError):
      self.talk.next()

  def test_a_loss_is_raised_and_remembered(self):
    self.ask(1)
    self.seats.drop(1)
    with self.assertRaises(stage_talk.LostError):
      self.talk.next()
    self.seats.drop(0)
    self.say(1)
    self.assertEqual(self.talk.forget_losses(), {0, 1})
    self.assertEqual(self.talk.forget_losses(), set())

  def test_who_is_silent_for_too_long_is_dropped(self):
    self.talk = self.make(patience=-1.0)
    self.ask(1)
    with self.assertRaises(stage_talk.LostError):
      self.talk.next()
    self.assertEqual(self.seats.dropped, [1])

  def test_the_slowest_is_whom_the_head_waited_for_not_who_says_so(self):
    now = [0.0]
    with mock.patch.object(stage_talk.time, 'monotonic', lambda: now[0]):
      for stage, seconds in (0, 2.0), (1, 5.0), (0, 1.0):
        self.ask(stage)
        now[0] += seconds
        self.say(stage, seconds=1e9 * (1 - stage))
        self.talk.next()
      self.assertIsNone(self.talk.slowest())  # 5 s, and 3 s
      self.ask(1, number=4)
      now[0] += 2.0  # and 2 s without an answer so far
      self.assertEqual(self.talk.slowest(), 1)

  def test_the_time_may_be_over(self):
    self.talk = self.make(late=lambda: True)
    self.ask()
    self.say()
    self.talk.next()
    self.ask()
    with self.assertRaises(stage_talk.LateError):
      self.talk.next()

  @parameterized.parameters(True, False)
  def test_who_says_much_that_nobody_asked_holds_up_nobody(self, is_late):
    """There is always an event, and never an answer."""
    now, late = [0.0], []

    def poll(seconds):
      del seconds
      now[0] += 0.01
      if now[0] > 100.0:
        self.fail('it is listened to for ever')
      if not self.seats.events.empty():
        return self.seats.events.get()
      return Event(0, 'begun', {}, b'')  # of no attempt

    def look():
      late.append(now[0])
      return is_late and now[0] > 30.0

    self.seats.poll = poll
    with mock.patch.object(stage_talk.time, 'monotonic', lambda: now[0]):
      self.talk = self.make(late=look)
      self.ask(0)
      error = stage_talk.LateError if is_late else stage_talk.LostError
      with self.assertRaises(error):
        self.talk.next()
    self.assertEqual(self.seats.dropped, [] if is_late else [0])
    self.assertAlmostEqual(now[0], 30.0 if is_late else 60.0, delta=1.0)
    self.assertLess(len(late), 400)  # the chain is not asked at each event

  def test_forgotten_questions_have_no_answers(self):
    self.ask()
    self.talk.forget()
    self.say()
    self.ask(number=5, attempt=2)
    self.say(number=5, attempt=2)
    self.assertEqual(self.talk.next().text['microbatch'], 5)


if __name__ == '__main__':
  absltest.main()
