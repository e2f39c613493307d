"""Objects from many buckets at once."""

import collections
import hashlib
import queue
import threading
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import interface
from covenant.store import reader
from covenant.store import transfer as transfer_lib


class Clock:
  """The time, threads and queue of `fetch`: it is later when all wait."""

  Empty = queue.Empty

  def __init__(self):
    self._now = 0.0
    self._changed = threading.Condition()
    self._busy = 0  # tries that do not wait
    self._waiting = collections.Counter()  # event -> tries that wait for it
    self._answers = []

  def wait(self, event):
    """Waits in a try until `set` is called with the event."""
    with self._changed:
      if not event.is_set():
        self._busy -= 1
        self._waiting[event] += 1
        self._changed.notify()
    event.wait()

  def set(self, event):
    with self._changed:
      self._busy += self._waiting.pop(event, 0)
      event.set()

  def wait_for_reads(self, count):
    """Waits until so many tries wait, and no other is under way."""
    with self._changed:
      self._changed.wait_for(
        lambda: sum(self._waiting.values()) == count and not self._busy
      )

  def monotonic(self):
    return self._now

  def Thread(self, **kwargs):  # noqa: N802
    with self._changed:
      self._busy += 1
    return threading.Thread(**kwargs)

  def SimpleQueue(self):  # noqa: N802
    return self

  def put(self, answer):
    with self._changed:
      self._busy -= 1
      self._answers.append(answer)
      self._changed.notify()

  def get(self, timeout):
    with self._changed:
      self._changed.wait_for(lambda: self._answers or not self._busy)
      if self._answers:
        return self._answers.pop(0)
      self._now += timeout
      raise queue.Empty


class Fake:
  """A bucket that answers with bytes or an exception, after `wait()`."""

  location = ''

  def __init__(self, answer, wait=lambda: None):
    self.answer = answer
    self.wait = wait
    self.asked = 0

  def get(self, key, limit):
    self.asked += 1
    self.wait()
    if isinstance(self.answer, Exception):
      raise self.answer
    return self.answer


def digest(data):
  return hashlib.blake2b(data, digest_size=32).digest()


def request(*buckets, data=b'good'):
  return reader.ObjectRequest(buckets, 'key', 10, digest(data))


class GatherTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.clock, self.over = Clock(), threading.Event()
    self.enterContext(
      mock.patch.multiple(
        reader, time=self.clock, threading=self.clock, queue=self.clock
      )
    )
    self.addCleanup(self.clock.set, self.over)
    self.slow = Fake(b'good', lambda: self.clock.wait(self.over))
    self.missing = Fake(interface.MissingObjectError('no object'))
    self.lying = Fake(b'evil')

  def test_the_owner_is_asked_first_and_alone(self):
    owner, mirror = Fake(b'good'), Fake(b'good')
    self.assertEqual(
      reader.fetch({7: request(owner, mirror)}, 30), {7: b'good'}
    )
    self.assertEqual((owner.asked, mirror.asked), (1, 0))

  def test_nothing_asked_is_nothing_got(self):
    self.assertEqual(reader.fetch({}, 30), {})
    with self.assertRaisesRegex(ValueError, 'one bucket or more'):
      reader.fetch({1: request()}, 30)

  @parameterized.parameters('missing', 'lying')
  def test_a_bad_bucket_is_passed_over(self, name):
    bad = getattr(self, name)
    found = reader.fetch({1: request(bad, self.lying, Fake(b'good'))}, 30)
    self.assertEqual(found, {1: b'good'})

  def test_without_a_digest_what_comes_is_taken(self):
    asked = reader.ObjectRequest((self.lying,), 'key', 10)
    self.assertEqual(reader.fetch({1: asked}, 30), {1: b'evil'})

  def test_a_wrapper_that_changes_bytes_is_found_out(self):
    """The bytes below it were digested while they were read."""

    class Digesting(Fake):
      def get(self, key, limit):
        data = super().get(key, limit)
        transfer_lib.current().read_as(data, digest(data))
        return data

    class Changing(Digesting):
      def get(self, key, limit):
        return super().get(key, limit)[::-1]

    bad = Changing(b'good')
    found = reader.fetch({1: request(bad, Digesting(b'good'))}, 30)
    self.assertEqual(found, {1: b'good'})
    found = reader.fetch({1: request(bad)}, 30)
    self.assertIn('expected bytes of digest', str(found[1]))

  def test_an_empty_object_has_a_digest_too(self):
    found = reader.fetch({1: request(self.lying, Fake(b''), data=b'')}, 30)
    self.assertEqual(found, {1: b''})

  def test_one_request_says_why_it_failed_and_disturbs_no_other(self):
    found = reader.fetch(
      {
        'a': request(self.missing, self.missing),
        'b': request(Fake(b'good')),
        'c': request(self.missing, self.lying),
      },
      30,
    )
    self.assertEqual(found['b'], b'good')
    self.assertIsInstance(found['a'], interface.MissingObjectError)
    self.assertEqual(str(found['a']), 'no object; no object')
    self.assertIsInstance(found['c'], interface.StoreUnavailableError)
    self.assertRegex(str(found['c']), 'no object; key in .* expected bytes of')
    self.assertEqual(list(found), ['a', 'b', 'c'])

  @parameterized.parameters(1, 2, 64)
  def test_a_slow_bucket_has_a_share_of_the_time(self, workers):
    asked = {i: request(self.slow, Fake(b'good')) for i in range(5)}
    asked[5] = request(Fake(b'good'))
    found = reader.fetch(asked, 1.5, workers)
    self.assertEqual(found, {i: b'good' for i in range(6)})
    self.assertEqual(self.slow.asked, 5)

  def test_one_bucket_at_a_time_reads_an_object(self):
    """Mirrors that need a third of the time get it, and are asked alone."""
    reading, most = collections.Counter(), collections.Counter()

    def read(name):
      reading[name] += 1
      most[name] = max(most[name], reading[name])
      transfer = transfer_lib.current()
      for _ in range(4):
        transfer.size, transfer.received = 10, transfer.received + 1
      reading[name] -= 1

    asked, buckets = {}, []
    for name in range(4):
      mine = [Fake(b'good', lambda n=name: read(n)) for _ in range(8)]
      asked[name] = request(*mine)
      buckets += mine
    found = reader.fetch(asked, 8)
    self.assertEqual(found, {name: b'good' for name in range(4)})
    self.assertEqual(sum(bucket.asked for bucket in buckets), 4)
    self.assertEqual(set(most.values()), {1})

  def test_the_next_bucket_takes_over_from_a_silent_one(self):
    """The read that was given up is canceled before the next begins."""
    canceled, ended = [], threading.Event()

    def cancel():
      canceled.append(True)
      self.clock.set(self.over)

    def stall():
      transfer = transfer_lib.current()
      transfer.size, transfer.received = 1000, 10
      transfer.on_cancel(cancel)
      self.clock.wait(self.over)
      ended.set()
      raise interface.StoreUnavailableError('given up for another bucket')

    mirror = Fake(b'good', lambda: canceled.append('mirror'))
    found = reader.fetch({1: request(Fake(b'good', stall), mirror)}, 60)
    self.assertEqual(found, {1: b'good'})
    self.assertTrue(ended.wait(60))
    self.assertCountEqual(canceled, [True, 'mirror'])

  def test_a_slow_bucket_that_ends_in_time_is_left_alone(self):
    """It gives a tenth of the object between two looks, of twelve."""
    bucket = Fake(b'good', lambda: self.clock.wait(self.over))
    reads, looks = [], iter(range(1, 11))
    clock_get, watch = self.clock.get, transfer_lib.watch

    def get(timeout):
      if reads and (come := next(looks, None)):
        reads[0].received = come
        if come == 10:
          self.clock.set(self.over)
      return clock_get(timeout)

    def noted(transfer):
      transfer.size = 10
      reads.append(transfer)
      return watch(transfer)

    mirror = Fake(b'good')
    with (
      mock.patch.object(self.clock, 'get', get),
      mock.patch.object(transfer_lib, 'watch', noted),
    ):
      found = reader.fetch({1: request(bucket, mirror)}, 120)
    self.assertEqual((found, mirror.asked), ({1: b'good'}, 0))

  def stalling(self, received):
    """Returns a bucket that has given so many bytes, by look, and waits."""
    transfers = []

    def stall():
      transfers.append(transfer_lib.current())
      transfers[0].size = 1000
      transfers[0].received = next(received, 0)
      transfers[0].on_cancel(lambda: self.clock.set(self.over))
      self.clock.wait(self.over)
      raise interface.StoreUnavailableError('canceled')

    bucket, clock_get = Fake(b'good', stall), self.clock.get

    def get(timeout):
      try:
        return clock_get(timeout)
      except queue.Empty:
        for transfer in transfers:
          transfer.received = next(received, 0)
        raise

    self.enterContext(mock.patch.object(self.clock, 'get', get))
    return bucket

  def test_a_read_that_began_again_and_has_nothing_is_stalled(self):
    """Its owner replaced the object while it was read."""
    bucket = self.stalling(iter([5, 10, 0]))
    found = reader.fetch({1: request(bucket, Fake(b'good'))}, 60)
    self.assertEqual(found, {1: b'good'})

  def test_a_long_take_cancels_no_healthy_read(self):
    """A read is looked at as often as there was time for it to give."""
    reads = []

    def read():
      reads.append(transfer_lib.current())
      reads[0].size, reads[0].received = 10, 9
      self.clock.wait(self.over)

    def take(name, data):
      del data
      if name == 1:
        self.clock.wait_for_reads(1)
        self.clock._now += 45.0  # several looks are overdue

    bucket, mirror = Fake(b'good', read), Fake(b'good')
    clock_get = self.clock.get

    def get(timeout):
      if timeout > 0 and self.clock.monotonic() >= 45:
        self.clock.set(self.over)  # the rest comes when there is time for it
      return clock_get(timeout)

    with mock.patch.object(self.clock, 'get', get):
      asked = {1: request(Fake(b'good')), 2: request(bucket, mirror)}
      found = reader.fetch(asked, 120, take=take)
    self.assertEqual(found, {1: b'good', 2: b'good'})
    self.assertEqual(mirror.asked, 0)

  def test_reads_that_were_canceled_say_nothing_of_their_buckets(self):
    """The one that was replaced is noted then; its heir is not to blame."""
    mirror_asked, canceled = threading.Event(), threading.Event()
    noted = []

    def give():
      self.clock.wait(mirror_asked)

    def heir():
      transfer_lib.current().on_cancel(lambda: self.clock.set(canceled))
      self.clock.set(mirror_asked)
      self.clock.wait(canceled)
      raise interface.StoreUnavailableError('canceled')

    owner, mirror = Fake(b'good', give), Fake(b'good', heir)
    late = Fake(b'good', lambda: self.clock.wait(canceled))
    found = reader.fetch(
      {1: request(owner, mirror), 2: request(late)},
      60,
      note=lambda bucket, error: noted.append((bucket, type(error))),
    )
    self.assertEqual(found, {1: b'good', 2: b'good'})
    self.assertEqual(
      [kind for bucket, kind in noted if bucket is owner],
      [interface.StoreUnavailableError, type(None)],
    )
    self.assertNotIn(mirror, [bucket for bucket, _ in noted])

  def test_objects_are_taken_as_they_come(self):
    taken = []
    found = reader.fetch(
      {1: request(Fake(b'good')), 2: request(self.missing)},
      30,
      take=lambda name, data: taken.append((name, data)),
    )
    self.assertEqual(taken, [(1, b'good')])
    self.assertIsInstance(found[2], interface.MissingObjectError)

  def test_a_slow_answer_that_comes_first_counts(self):
    mirror_asked = threading.Event()

    def ask_mirror():
      self.clock.set(mirror_asked)
      self.clock.wait(self.over)

    owner = Fake(b'good', lambda: self.clock.wait(mirror_asked))
    mirror = Fake(b'good', ask_mirror)
    found = reader.fetch({1: request(owner, mirror)}, 0.6)
    self.assertEqual(found, {1: b'good'})
    self.assertEqual(mirror.asked, 1)

  def test_at_the_deadline_there_is_what_came(self):
    found = reader.fetch(
      {
        1: request(Fake(b'good')),
        2: request(self.slow),
        3: request(self.missing, self.slow),
      },
      0.3,
    )
    self.assertEqual(found[1], b'good')
    for name, reason in ((2, '^not there'), (3, '^no object; not there')):
      self.assertIsInstance(found[name], interface.StoreUnavailableError)
      self.assertRegex(str(found[name]), f'{reason} within 0.3 s')

  def test_all_answers_are_noted(self):
    good, noted = Fake(b'good'), {}

    def note(bucket, error):
      noted[bucket] = type(error).__name__ if error else ''

    reader.fetch(
      {
        1: request(self.missing, self.lying, good),
        2: request(self.slow),
      },
      0.3,
      note=note,
    )
    self.assertEqual(
      noted,
      {
        self.missing: 'MissingObjectError',
        self.lying: 'StoreError',
        good: '',
        self.slow: 'StoreUnavailableError',
      },
    )

  def test_a_bucket_that_owes_answers_is_not_asked_on_and_on(self):
    for _ in range(10):
      found = reader.fetch({1: request(self.slow, Fake(b'good'))}, 0.3)
      self.assertEqual(found, {1: b'good'})
    self.assertLess(self.slow.asked, 6)

  def test_bytes_that_are_not_accepted_are_passed_over(self):
    asked = reader.ObjectRequest(
      (self.lying, Fake(b'good')), 'key', 10, accepts=lambda d: d == b'good'
    )
    self.assertEqual(reader.fetch({1: asked}, 30), {1: b'good'})

  def test_a_bug_is_not_taken_for_a_bad_bucket(self):
    with self.assertRaisesRegex(ZeroDivisionError, 'bug'):
      reader.fetch({1: request(Fake(ZeroDivisionError('bug')))}, 30)


if __name__ == '__main__':
  absltest.main()
