"""Many buckets at once, some of them bad."""

import hashlib
import threading

from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import gather
from covenant.store import interface


class Fake:
  """A bucket that answers with bytes, an exception, or when it is told to."""

  location = ''

  def __init__(self, answer, wait=None):
    self.answer = answer
    self.wait = wait
    self.asked = 0

  def get(self, key, limit):
    self.asked += 1
    if self.wait is not None:
      self.wait.wait(30)
    if isinstance(self.answer, Exception):
      raise self.answer
    return self.answer


def digest(data):
  return hashlib.blake2b(data, digest_size=32).digest()


def request(*buckets, data=b'good'):
  return gather.Request(buckets, 'key', 10, digest(data))


class GatherTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.over = threading.Event()
    self.addCleanup(self.over.set)
    self.slow = Fake(b'good', self.over)
    self.missing = Fake(interface.MissingObjectError('no object'))
    self.lying = Fake(b'evil')

  def test_the_owner_is_asked_first_and_alone(self):
    owner, mirror = Fake(b'good'), Fake(b'good')
    self.assertEqual(
      gather.fetch({7: request(owner, mirror)}, 30), {7: b'good'}
    )
    self.assertEqual((owner.asked, mirror.asked), (1, 0))

  def test_nothing_asked_is_nothing_got(self):
    self.assertEqual(gather.fetch({}, 30), {})
    with self.assertRaisesRegex(ValueError, 'one bucket or more'):
      gather.fetch({1: request()}, 30)

  @parameterized.parameters('missing', 'lying')
  def test_a_bad_bucket_is_passed_over(self, name):
    bad = getattr(self, name)
    found = gather.fetch({1: request(bad, self.lying, Fake(b'good'))}, 30)
    self.assertEqual(found, {1: b'good'})

  def test_without_a_digest_what_comes_is_taken(self):
    asked = gather.Request((self.lying,), 'key', 10)
    self.assertEqual(gather.fetch({1: asked}, 30), {1: b'evil'})

  def test_an_empty_object_has_a_digest_too(self):
    found = gather.fetch({1: request(self.lying, Fake(b''), data=b'')}, 30)
    self.assertEqual(found, {1: b''})

  def test_one_request_says_why_it_failed_and_disturbs_no_other(self):
    found = gather.fetch(
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
    found = gather.fetch(asked, 1.5, workers)
    self.assertEqual(found, {i: b'good' for i in range(6)})
    self.assertEqual(self.slow.asked, 5)

  def test_a_slow_answer_that_comes_first_counts(self):
    stuck = Fake(b'', self.over)

    class Owner(Fake):
      def get(self, key, limit):
        mirror_asked.wait(30)
        return b'good'

    class Mirror(Fake):
      def get(self, key, limit):
        mirror_asked.set()
        return stuck.get(key, limit)

    mirror_asked = threading.Event()
    found = gather.fetch({1: request(Owner(b''), Mirror(b''))}, 0.6)
    self.assertEqual(found, {1: b'good'})

  def test_at_the_deadline_there_is_what_came(self):
    found = gather.fetch(
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

  def test_a_bug_is_not_taken_for_a_bad_bucket(self):
    with self.assertRaisesRegex(ZeroDivisionError, 'bug'):
      gather.fetch({1: request(Fake(ZeroDivisionError('bug')))}, 30)


if __name__ == '__main__':
  absltest.main()
