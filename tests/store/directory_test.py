"""The buckets of strangers: bounded in number, remembered when they fail."""

from absl.testing import absltest

from covenant.protocol import run_storage as run_storage_lib
from covenant.store import directory as directory_lib
from covenant.store import interface


class Fake:
  """A bucket that answers as told."""

  def __init__(self, location, answer=b'good'):
    self.location = str(location)
    self.answer = answer
    self.asked = 0

  def get(self, key, limit):
    self.asked += 1
    if isinstance(self.answer, Exception):
      raise self.answer
    return self.answer


DEAD = interface.StoreUnavailableError('no route')
GONE = interface.MissingObjectError('there is no such object')


class DirectoryTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.opened = []
    self.directory = directory_lib.Directory(self.open)

  def open(self, location):
    if location == b'bad':
      raise ValueError('malformed')
    self.opened.append(location)
    return Fake(location)

  def test_knows_where_it_opened_a_bucket(self):
    one, two = map(self.directory.bucket_at, (b'one', b'two'))
    found = self.directory.locations([two, Fake('other'), one])
    self.assertEqual(found, [b'two', b'one'])

  def test_a_bucket_is_opened_once(self):
    self.assertIs(
      self.directory.bucket_at(b'a'), self.directory.bucket_at(b'a')
    )
    self.assertEqual(self.opened, [b'a'])
    self.assertIsNone(self.directory.bucket_at(b'bad'))

  def test_any_number_of_locations_keeps_some_open(self):
    for i in range(3 * directory_lib.MOST_OPEN):
      self.directory.bucket_at(b'first')
      self.directory.bucket_at(b'%d' % i)
    self.assertLen(self.directory, directory_lib.MOST_OPEN)
    self.assertEqual(self.opened.count(b'first'), 1)  # it is in use

  def test_only_the_newest_location_of_a_peer_is_kept(self):
    for i in range(100):
      bucket = self.directory.bucket_at(b'%d' % i)
      self.directory.note(bucket, DEAD)
    self.directory.keep_only({b'99'})
    self.assertLen(self.directory, 1)
    self.assertTrue(self.directory.failed(bucket))
    self.assertFalse(self.directory.failed(Fake(b'98')))

  def test_what_failed_comes_last_for_some_rounds(self):
    dead, good, lost = map(self.directory.bucket_at, (b'a', b'b', b'c'))
    self.directory.begin(10)
    self.directory.note(dead, DEAD)
    self.directory.note(lost, GONE)  # not every mirror has every object
    self.assertEqual(
      self.directory.by_trust([dead, good, dead, lost]), [good, lost, dead]
    )
    self.directory.begin(10 + directory_lib.FORGIVEN)
    self.assertFalse(self.directory.failed(dead))

  def test_a_good_answer_ends_it(self):
    bucket = self.directory.bucket_at(b'a')
    self.directory.note(bucket, DEAD)
    self.directory.note(bucket, None)
    self.assertFalse(self.directory.failed(bucket))


class StorageTest(absltest.TestCase):
  """A storage asks those last that failed."""

  def test_a_dead_owner_is_asked_after_the_mirrors(self):
    owner, mirror = Fake('owner', DEAD), Fake('mirror')
    storage = run_storage_lib.RunStorage(
      bytes(16), mirror, b'', lambda data: owner
    )
    wanted = [run_storage_lib.ObjectRef(run_storage_lib.digest(b'good'), b'x')]
    for r, asked in ((1, 1), (2, 1), (1 + directory_lib.FORGIVEN, 2)):
      got = storage.fetch('payloads', r, wanted, [mirror], 10)
      self.assertEqual(list(got.values()), [b'good'])
      self.assertEqual(owner.asked, asked, r)

  def test_a_liar_is_remembered_too(self):
    owner, mirror = Fake('owner', b'evil'), Fake('mirror')
    storage = run_storage_lib.RunStorage(
      bytes(16), mirror, b'', lambda data: owner
    )
    wanted = [run_storage_lib.ObjectRef(run_storage_lib.digest(b'good'), b'x')]
    for _ in range(3):
      storage.fetch('payloads', 1, wanted, [mirror], 10)
    self.assertEqual(owner.asked, 1)

  def test_the_first_right_object_is_found(self):
    liar, good = Fake('liar', b'evil'), Fake('good')
    storage = run_storage_lib.RunStorage(
      bytes(16), good, b'', lambda data: liar
    )
    accepts = lambda data: data == b'good'  # noqa: E731
    got = storage.fetch_first('k', [liar, good], 10, accepts, 30)
    self.assertEqual(got, b'good')
    with self.assertRaises(interface.StoreError):
      storage.fetch_first('k', [liar], 10, accepts, 30)


if __name__ == '__main__':
  absltest.main()
