"""Objects in parts from a breaking store, and from many buckets at once."""

import asyncio
import collections
import datetime
import hashlib
import queue
import threading
import types
from unittest import mock

import obstore
from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import backend
from covenant.store import interface
from covenant.store import reader

_PART = 100  # bytes


class Store:
  """Stands in for `obstore.get_async`. `cuts` break reads off, in order."""

  def __init__(self, data, cuts=()):
    self.data = data
    self.cuts = list(cuts)  # bytes to give before the break; None: all
    self.asked = []  # the range of each read; None is from the beginning on
    self.active = self.most = 0
    self.tag = 'first'

  async def get(self, store, key, *, options):
    del store, key
    self.asked.append(options.get('range'))
    if options.get('if_match', self.tag) != self.tag:
      raise obstore.exceptions.PreconditionError('x')
    at, end = options.get('range', (0, len(self.data)))
    meta = {
      'size': len(self.data),
      'e_tag': self.tag,
      'last_modified': datetime.datetime(2026, 1, 1),
    }
    cut = self.cuts.pop(0) if self.cuts else None
    return types.SimpleNamespace(
      meta=meta, stream=lambda _: self._stream(self.data[at:end], cut)
    )

  async def _stream(self, data, cut):
    self.active += 1
    self.most = max(self.most, self.active)
    await asyncio.sleep(0)
    for i in range(0, len(data[:cut]), 10):
      if i + 10 in (len(data[:cut]), _PART):  # nobody asks for more
        self.active -= 1
      yield data[:cut][i : i + 10]
      await asyncio.sleep(0)
    if cut is not None:
      raise obstore.exceptions.GenericError('HTTP error: IncompleteBody')


class ReaderTest(parameterized.TestCase):
  def read(self, store, tries=1, limit=10**6, slots=8):
    """Returns the object of a reader in the end, after so many tries."""

    async def act():
      parts = reader.ObjectReader(
        None, 'key', limit, asyncio.Semaphore(slots), _PART
      )
      for _ in range(tries - 1):
        with self.assertRaises(interface.StoreUnavailableError):
          await parts.read()
      return await parts.read()

    with mock.patch.object(obstore, 'get_async', store.get):
      return asyncio.run(act())

  @parameterized.parameters(0, 1, 99, 100, 101, 200, 950)
  def test_reads_all_of_it(self, size):
    store = Store(bytes(i % 251 for i in range(size)))
    self.assertEqual(self.read(store), store.data)
    self.assertLen(store.asked, max(1, -(-size // _PART)))

  def test_goes_on_where_it_broke(self):
    store = Store(bytes(range(250)), cuts=[30, None, None, 20])
    self.assertEqual(self.read(store, tries=3), store.data)
    self.assertEqual(store.asked[:2], [None, (30, 100)])
    again = [asked for asked in store.asked[2:] if asked[0] % _PART]
    self.assertIn((220, 250), again)

  def test_another_object_is_read_from_the_beginning(self):
    store = Store(b'a' * 250, cuts=[30])

    async def act():
      parts = reader.ObjectReader(
        None, 'key', 10**6, asyncio.Semaphore(8), _PART
      )
      with self.assertRaises(interface.StoreUnavailableError):
        await parts.read()
      store.data, store.tag = b'b' * 250, 'second'
      with self.assertRaises(backend.ObjectReplacedError):
        await parts.read()
      return await parts.read()

    with mock.patch.object(obstore, 'get_async', store.get):
      self.assertEqual(asyncio.run(act()), b'b' * 250)

  def test_one_that_is_too_large_is_refused(self):
    store = Store(bytes(250))
    with self.assertRaisesRegex(
      interface.ObjectTooLargeError, 'it has 250 bytes, 249 are allowed'
    ):
      self.read(store, limit=249)
    self.assertLen(store.asked, 1)

  @parameterized.parameters(1, 2, 8)
  def test_reads_no_more_at_once_than_it_may(self, slots):
    store = Store(bytes(2000))
    self.assertEqual(self.read(store, slots=slots), store.data)
    self.assertEqual(store.most, min(slots, reader.PARTS_AT_ONCE))


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
