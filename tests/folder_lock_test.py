"""Processes that want one folder, on file systems with and without locks."""

import contextlib
import errno
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant import folder_lock

_HOLD = """
import sys
from covenant import folder_lock
with folder_lock.hold(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""
_ELSEWHERE = 'node-7, pid 1, 2026-01-01 00:00:00 UTC'


class FolderLockTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')
    self.path = self.folder / '.lock'
    self.waits = []

  def hold(self, at_wait=lambda: None):
    """Takes the lock; a wait takes no time, but something may happen in it."""

    def wait(seconds):
      self.waits.append(seconds)
      at_wait()

    return folder_lock.hold(self.folder, wait)

  def left_by(self, holder):
    """The folder as a process that was killed has left it."""
    self.folder.mkdir(exist_ok=True)
    self.path.write_text(holder)

  def touch(self):
    """Touches the lock as its holder does, by a clock that is wrong."""
    before = os.stat(self.path).st_mtime_ns
    os.utime(self.path, ns=(0, before - 10**9))

  def without_locks(self, code=errno.ENOLCK):
    """A file system on which flock fails."""
    patch = mock.patch.object(
      folder_lock.fcntl, 'flock', side_effect=OSError(code, 'no locks')
    )
    return patch

  def test_it_is_exclusive_until_its_process_is_killed(self):
    command = [sys.executable, '-c', _HOLD, str(self.folder)]
    with subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
      self.assertEqual(holder.stdout.readline(), b'held\n')
      said = f'run is in use.*, pid {holder.pid}, 20.* UTC'
      with self.assertRaisesRegex(folder_lock.FolderInUseError, said):
        with self.hold():
          pass
      holder.kill()
    for _ in range(2):
      with self.hold():
        self.assertIn(f'pid {os.getpid()}', self.path.read_text())
      self.assertEqual(self.path.read_text(), '')
    self.assertEqual(self.waits, [])

  def test_a_holder_on_another_host_whose_lock_is_not_seen_here(self):
    self.left_by(_ELSEWHERE)
    with self.assertRaisesRegex(
      folder_lock.FolderInUseError, 'node-7, pid 1, 2026-01-01'
    ):
      with self.hold(self.touch):
        pass
    self.assertEqual(self.path.read_text(), _ELSEWHERE)

  def test_a_dead_holder_on_another_host(self):
    self.left_by(_ELSEWHERE)
    with self.hold():
      self.assertIn(f'pid {os.getpid()}', self.path.read_text())
    self.assertLen(self.waits, folder_lock._WATCHED + 1)

  def test_two_wait_for_the_same_dead_holder(self):
    self.left_by(_ELSEWHERE)

    def other_writes():
      if len(self.waits) > folder_lock._WATCHED:
        self.path.write_text('node-8, pid 2, now')

    with self.assertRaisesRegex(folder_lock.FolderInUseError, 'node-8'):
      with self.hold(other_writes):
        pass

  @parameterized.parameters(errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
  def test_a_file_system_without_locks(self, code):
    with self.without_locks(code):
      with self.hold():
        mine = self.path.read_text()
        with self.assertRaisesRegex(
          folder_lock.FolderInUseError, f'pid {os.getpid()}'
        ):
          with self.hold(self.touch):
            pass
        self.assertEqual(self.path.read_text(), mine)
      with self.hold():
        pass

  def test_a_dead_holder_on_this_host_without_locks(self):
    with subprocess.Popen([sys.executable, '-c', '']) as ended:
      pass
    host = folder_lock._own().partition(',')[0]
    self.left_by(f'{host}, pid {ended.pid}, once')
    with self.without_locks(), self.hold():
      pass
    self.assertLen(self.waits, 1)  # nobody is watched who is dead

  def test_the_holder_touches_the_lock(self):
    touched = mock.Mock(side_effect=[False, False, True])
    ended = mock.Mock(wait=touched)
    self.left_by('')
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(open(self.path, 'ab+'))
      utime = stack.enter_context(mock.patch.object(os, 'utime'))
      utime.side_effect = [None, OSError(errno.EIO, 'gone')]
      folder_lock._touch(file, ended)
      self.assertEqual(utime.call_count, 2)

  def test_a_full_disk(self):
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, 'No space left'))
    file = mock.Mock(write=full)
    folder_lock._write(file, 'who')
    full.assert_called_once()

  def test_other_errors_are_raised(self):
    with self.without_locks(errno.EIO), self.assertRaises(OSError):
      with self.hold():
        pass


if __name__ == '__main__':
  absltest.main()
