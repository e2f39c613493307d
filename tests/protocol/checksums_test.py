"""Every change of a file that has a checksum is noticed."""

import pathlib
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest

from covenant.protocol import checksums


class ChecksumsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def make(self, step):
    folder = self.folder / str(step)
    (folder / 'state' / 'd').mkdir(parents=True)
    (folder / 'meta').write_bytes(b'meta')
    (folder / 'state' / 'd' / 'array').write_bytes(bytes(range(256)) * 9)
    (folder / 'empty').write_bytes(b'')
    checksums.write(folder)
    return folder

  def test_what_is_as_it_was(self):
    folder = self.make(1)
    self.assertTrue(checksums.check(folder))
    self.assertEqual(checksums.says_unchecked(folder), '')
    (folder / 'checksums.json').unlink()
    self.assertFalse(checksums.check(folder))
    self.assertRegex(checksums.says_unchecked(folder), '1 has no checksums')

  @pytest.mark.slow
  def test_every_bit(self):
    folder = self.make(1)
    for path in [p for p in folder.rglob('*') if p.is_file()]:
      data = path.read_bytes()
      for at in range(0, 8 * len(data), 61):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        with self.assertRaises(checksums.ChecksumError):
          checksums.check(folder)
      path.write_bytes(data)
    self.assertTrue(checksums.check(folder))

  def test_missing_and_new_files_are_named(self):
    folder = self.make(1)
    (folder / 'new').write_bytes(b'')
    with self.assertRaisesRegex(checksums.ChecksumError, 'new was not there'):
      checksums.check(folder)
    (folder / 'new').unlink()
    (folder / 'state' / 'd' / 'array').unlink()
    with self.assertRaisesRegex(checksums.ChecksumError, 'array is missing'):
      checksums.check(folder)

  def test_a_file_that_cannot_be_read(self):
    folder = self.make(1)
    with mock.patch.object(checksums, '_of_file', side_effect=OSError('bad')):
      with self.assertRaisesRegex(checksums.ChecksumError, 'OSError: bad'):
        checksums.check(folder)

  def test_the_newest_sound_one(self):
    for step in (1, 2, 10):
      self.make(step)
    steps = [1, 2, 10]
    self.assertEqual(checksums.newest_sound(self.folder, steps), (10, {}))
    (self.folder / '10' / 'meta').write_bytes(b'?')
    sound, damaged = checksums.newest_sound(self.folder, steps)
    self.assertEqual((sound, list(damaged)), (2, [10]))
    self.assertIn('10/meta differs', damaged[10])
    for step in (1, 2):
      (self.folder / str(step) / 'meta').unlink()
    sound, damaged = checksums.newest_sound(self.folder, steps)
    self.assertEqual((sound, sorted(damaged)), (None, steps))
    self.assertEqual(checksums.newest_sound(self.folder, []), (None, {}))

  def test_processes_do_what_the_first_found(self):
    """Others have not looked at a byte."""
    told = np.array([2, 1])
    with (
      mock.patch('jax.process_count', return_value=2),
      mock.patch('jax.process_index', return_value=1),
      mock.patch.object(
        checksums.multihost_utils, 'broadcast_one_to_all', return_value=told
      ),
    ):
      sound, damaged = checksums.newest_agreed('folder', [1, 2, 10])
      self.assertEqual((sound, list(damaged)), (2, [10]))
      told[:] = -1, 3
      sound, damaged = checksums.newest_agreed('folder', [1, 2, 10])
      self.assertEqual((sound, list(damaged)), (None, [10, 2, 1]))


if __name__ == '__main__':
  absltest.main()
