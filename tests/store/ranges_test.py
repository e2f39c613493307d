"""Parts of objects, in a folder and in memory."""

from absl.testing import absltest
from absl.testing import parameterized

from covenant.store import bucket as bucket_lib
from covenant.store import interface
from covenant.store import location as location_lib
from covenant.store import ranges


class RangesTest(parameterized.TestCase):
  def bucket(self, kind):
    name = self.create_tempdir().full_path if kind == 'file' else 'ranges'
    return bucket_lib.open_bucket(location_lib.Location(kind, name))

  @parameterized.parameters('file', 'memory')
  def test_reads_spans_in_their_order(self, kind):
    bucket = self.bucket(kind)
    bucket.put('a/b', bytes(range(100)), replace=True)
    found = ranges.read(bucket, 'a/b', [(90, 100), (3, 3), (0, 2), (1, 4)])
    self.assertEqual(found, [bytes(range(90, 100)), b'', b'\0\1', b'\1\2\3'])
    self.assertEqual(ranges.read(bucket, 'a/b', []), [])

  @parameterized.parameters('file', 'memory')
  def test_what_is_not_there_is_an_error(self, kind):
    bucket = self.bucket(kind)
    bucket.put('a', b'short')
    with self.assertRaises(interface.MissingObjectError):
      ranges.read(bucket, 'b', [(0, 1)])
    with self.assertRaises(interface.StoreError):
      ranges.read(bucket, 'a', [(3, 9)])
    with self.assertRaises(interface.StoreError):
      ranges.read(bucket, '../a', [(0, 1)])


if __name__ == '__main__':
  absltest.main()
