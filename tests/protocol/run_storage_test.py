import itertools
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface
from covenant.store import location as location_lib

_NUMBERS = itertools.count()
LIMIT = 1000  # bytes
RUN = b'r' * 16


class ObjectsTest(parameterized.TestCase):
  def location(self, kind, name):
    if kind == 'memory':
      return location_lib.Location.parse(f'memory://{name}-{next(_NUMBERS)}')
    folder = tempfile.mkdtemp()  # short: a path must fit the chain
    self.addCleanup(shutil.rmtree, folder)
    return location_lib.Location.parse(f'file://{folder}/{name}')

  def make(self, kind, name):
    """The objects of a node, in a bucket of its own."""
    location = self.location(kind, name)
    return run_storage_lib.RunStorage(
      RUN,
      bucket_lib.open_bucket(location),
      location.to_bytes(),
      lambda data: bucket_lib.open_for_reading(
        location_lib.Location.from_bytes(data), allow_local=True
      ),
    )

  def keep(self, objects, data, round_index=3):
    """Puts a payload; returns its digest."""
    digest = run_storage_lib.digest(data)
    objects.put_once(objects.key('payloads', round_index, digest), data)
    return digest

  def fetch(self, objects, wanted, mirrors=(), limit=LIMIT):
    wanted = [run_storage_lib.ObjectRef(*w) for w in wanted]
    return objects.fetch('payloads', 3, wanted, mirrors, limit)

  def test_the_time_of_a_fetch_follows_from_the_rate_of_the_last(self):
    objects, size = self.make('memory', 'me'), 2**30
    self.assertEqual(objects.longest(size), 60 + 16)
    objects._measure(2**24, 0.5)
    self.assertEqual(objects.longest(size), 60 + 64)
    objects._measure(1000, 100.0)  # too few to tell
    self.assertEqual(objects.longest(size), 60 + 64)
    objects._measure(2**24, 1e6)  # a slow stranger
    self.assertEqual(objects.longest(size), 60 + 128)

  def test_a_rate_is_that_of_the_link(self):
    """Neither a slow caller nor a source that hangs makes it smaller."""
    objects, clock = self.make('memory', 'me'), mock.Mock()
    now, datas = [0.0], {bytes([i]) * 32: bytes(2**23) for i in range(2)}
    clock.monotonic = lambda: now[0]

    def fetch(requests, seconds, workers, note, take):
      del requests, seconds, workers, note
      for name, data in datas.items():
        now[0] += 0.25  # reads
        take(name, data)
      now[0] += 60.0  # waits for one that hangs
      return datas

    def take(digest, data):
      del digest, data
      now[0] += 100.0

    refs = [run_storage_lib.ObjectRef(name, objects.location) for name in datas]
    with (
      mock.patch.object(run_storage_lib, 'time', clock),
      mock.patch.object(run_storage_lib.reader, 'fetch', fetch),
    ):
      objects.fetch('payloads', 3, refs, [], 2**23, 300, take)
    self.assertEqual(objects.longest(2**30), 60 + 64)  # 2**24 bytes in 0.5 s

  @parameterized.parameters('memory', 'file')
  def test_finds_by_digest_what_others_keep(self, kind):
    one, other, reader = (self.make(kind, n) for n in ('one', 'other', 'me'))
    a, b = self.keep(one, b'a'), self.keep(other, b'b')
    got = self.fetch(reader, [(a, one.location), (b, other.location)])
    self.assertEqual(got, {a: b'a', b: b'b'})

  @parameterized.parameters('memory', 'file')
  def test_falls_back_on_mirrors(self, kind):
    gone, mirror, reader = (self.make(kind, n) for n in ('a', 'b', 'me'))
    a = self.keep(mirror, b'a')
    mirrors = reader.buckets_at([gone.location, mirror.location])
    for location in (gone.location, b'', b'\xff nonsense'):
      got = self.fetch(reader, [(a, location)], mirrors)
      self.assertEqual(got, {a: b'a'})

  def test_who_has_nothing_is_told_apart_from_who_lies(self):
    owner, reader = self.make('memory', 'a'), self.make('memory', 'me')
    a = self.keep(owner, b'a')
    liar = self.make('memory', 'liar')
    liar.put_once(liar.key('payloads', 3, a), b'not a')
    long = self.keep(owner, bytes(LIMIT + 1))
    for digest, location, kind in (
      (bytes(32), owner.location, interface.MissingObjectError),
      (bytes(32), b'', interface.MissingObjectError),
      (a, liar.location, interface.StoreError),
      (long, owner.location, interface.ObjectTooLargeError),
    ):
      got = self.fetch(reader, [(digest, location)])
      self.assertIs(type(got[digest]), kind)
    mirrors = reader.buckets_at([owner.location])
    self.assertEqual(self.fetch(reader, [(a, liar.location)], mirrors)[a], b'a')

  def test_who_commits_to_anothers_digest_hides_nothing(self):
    """Digests are public on the chain, before their bytes are."""
    owner, copier = self.make('memory', 'a'), self.make('memory', 'b')
    reader, a = self.make('memory', 'me'), self.keep(owner, b'a')
    for location in (copier.location, b'', b'\xff nonsense'):
      both = [(a, owner.location), (a, location)]
      for wanted in (both, both[::-1]):
        self.assertEqual(self.fetch(reader, wanted), {a: b'a'})

  def test_keeping_twice_keeps_the_first(self):
    """The store may have taken what it did not acknowledge."""
    objects = self.make('memory', 'a')
    objects.put_once('x', b'1')
    objects.put_once('x', b'1')
    self.assertEqual(objects.bucket.get('x', 9), b'1')

  @parameterized.parameters('memory', 'file')
  def test_forgets_rounds_of_a_kind(self, kind):
    objects = self.make(kind, 'a')
    for r in (0, 1, 2, 9, 10, 11):
      self.keep(objects, b'p', r)
      objects.put_once(objects.key('history', r), b'h')
    self.assertEqual(
      objects.rounds('payloads', objects.bucket), [0, 1, 2, 9, 10, 11]
    )
    objects.delete_before('payloads', 0)
    objects.delete_before('payloads', -5)
    self.assertLen(objects.rounds('payloads', objects.bucket), 6)
    objects.delete_before('payloads', 10)
    self.assertEqual(objects.rounds('payloads', objects.bucket), [10, 11])
    self.assertLen(objects.rounds('history', objects.bucket), 6)

  def test_forgets_chunks_that_nobody_names(self):
    owner, reader = self.make('memory', 'a'), self.make('memory', 'me')
    digests = [run_storage_lib.digest(bytes([i])) for i in range(3)]
    for i, digest in enumerate(digests):
      owner.put_once(owner.chunk_key(digest), bytes([i]))
    owner.delete_chunks_except({digests[1].hex()})
    sources = reader.buckets_at([owner.location])
    got = reader.fetch_chunks([digests[1]], sources, LIMIT)
    self.assertEqual(got, {digests[1]: b'\1'})
    with self.assertRaises(interface.MissingObjectError):
      reader.fetch_chunks(digests[:2], sources, LIMIT)

  def test_each_bucket_answers_for_itself(self):
    one, two = self.make('memory', 'a'), self.make('memory', 'b')
    one.put_once(one.key('history', 3), b'one')
    two.put_once(two.key('history', 3), b'two')
    two.put_once(two.key('history', 4), b'long enough')
    buckets = [one.bucket, two.bucket]
    reader = self.make('memory', 'me')
    got = reader.fetch_each(reader.key('history', 3), buckets, 3)
    self.assertEqual(got, [b'one', b'two'])
    got = reader.fetch_each(reader.key('history', 4), buckets, 3)
    self.assertEqual(
      list(map(type, got)),
      [interface.MissingObjectError, interface.ObjectTooLargeError],
    )
    self.assertEqual(reader.rounds_of_each('history', buckets), [[3], [3, 4]])
    self.assertEqual(reader.fetch_each('x', [], 3), [])
    self.assertEqual(reader.rounds_of_each('x', []), [])

  def test_a_bucket_that_cannot_be_listed_hides_no_other(self):
    class Down:
      location = 'memory://down'

      def list(self, prefix):
        raise interface.StoreUnavailableError('down')

    one = self.make('memory', 'a')
    one.put_once(one.key('history', 3), b'one')
    down, up = one.rounds_of_each('history', [Down(), one.bucket])
    self.assertIsInstance(down, interface.StoreUnavailableError)
    self.assertEqual(up, [3])

  def test_runs_do_not_see_each_other(self):
    one = self.make('memory', 'a')
    other = run_storage_lib.RunStorage(
      b's' * 16, one.bucket, b'', lambda data: None
    )
    self.keep(one, b'a')
    self.assertEmpty(other.rounds('payloads', one.bucket))
    other.delete_before('payloads', 99)
    self.assertEqual(one.rounds('payloads', one.bucket), [3])


if __name__ == '__main__':
  absltest.main()
