"""Runs on file systems that are full or read-only, which take a mount."""

import contextlib
import pathlib
import subprocess

import pytest
from absl.testing import absltest

from covenant import errors
from covenant import startup
from covenant.emulate import emulation
from tests import helpers

SMALL = ('8k', '300k')  # before the first checkpoint, and within it
ENOUGH = '64m'


@pytest.mark.slow
class DisksTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    done = self.mount(f'size={SMALL[0]}')
    if done.returncode:
      self.skipTest('a mount needs root')
    self.addCleanup(
      subprocess.run, ['umount', '-l', str(self.folder)], check=True
    )
    self.config = helpers.tiny('rounds=2', 'checkpoint.every=1')
    self.workdir = self.folder / 'run'

  def mount(self, options):
    command = ['mount', '-t', 'tmpfs', '-o', options, 'x', str(self.folder)]
    return subprocess.run(command, capture_output=True, check=False)

  def remount(self, options):
    self.assertEqual(self.mount(f'remount,{options}').returncode, 0)

  def run_into(self, why):
    """The run ends with an error that says all in a line."""
    with self.assertRaises((OSError, errors.CovenantError)) as caught:
      emulation.run(self.config, self.workdir)
    error = caught.exception
    if isinstance(error, errors.CovenantError):
      self.assertIn(why, str(error))
    else:
      self.assertTrue(startup.is_for_people(error), repr(error))
      self.assertIn(why, startup.os_error(error))
    self.assertNotIn('\n', str(error))

  def test_full_at_any_write_and_then_with_room(self):
    for size in SMALL:
      self.remount(f'size={size}')
      self.run_into('the disk is full')
    self.remount(f'size={ENOUGH}')
    got = emulation.run(self.config, self.workdir)
    whole = self.create_tempdir().full_path
    want = emulation.run(self.config, pathlib.Path(whole, 'run'))
    self.assertEqual(
      helpers.everything(got.state), helpers.everything(want.state)
    )
    self.assertEqual(
      helpers.untimed(self.workdir / 'metrics.jsonl'),
      helpers.untimed(pathlib.Path(whole, 'run', 'metrics.jsonl')),
    )

  def test_read_only_and_then_not(self):
    self.remount(f'size={ENOUGH}')
    asked = iter([True])
    emulation.run(self.config, self.workdir, stop=lambda: next(asked))
    with contextlib.ExitStack() as stack:
      self.remount('ro')
      stack.callback(self.remount, 'rw')
      self.run_into('the file system is read-only')
    self.assertTrue(emulation.run(self.config, self.workdir).finished)


if __name__ == '__main__':
  absltest.main()
