"""Processes that want one folder, on file systems with and without locks."""

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
_ELSEWHERE = 'node-7, pid 1, 2026-01-01 00:00:00 UTC\nother-boot 1 f00'


class FolderLockTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')
    self.path = self.folder / '.holder'
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

  def boot(self, name):
    """The file that tells one start of a machine from all others."""
    path = pathlib.Path(self.create_tempfile().full_path)
    path.write_text(f'{name}\n')
    return path

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
      self.assertFalse(self.path.exists())
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

  def test_two_hosts_that_see_no_lock_of_each_other_begin_at_once(self):
    # On NFS of version 3 with `nolock`, flock succeeds on each of them.
    with mock.patch.object(folder_lock.fcntl, 'flock'):
      with self.hold():
        with mock.patch.object(folder_lock, '_BOOT', self.boot('two')):
          with self.assertRaises(folder_lock.FolderInUseError):
            with self.hold(self.touch):
              pass
      self.assertFalse(self.path.exists())

  def test_a_holder_that_has_not_said_yet_who_it_is(self):
    with self.hold():
      self.path.rename(self.folder / 'said')
      with self.assertRaisesRegex(
        folder_lock.FolderInUseError, f'pid {os.getpid()}'
      ):
        with self.hold(lambda: (self.folder / 'said').rename(self.path)):
          pass
    self.assertEqual(self.waits, [1.0])

  def test_a_pod_of_the_same_name_and_pid_on_another_machine(self):
    mine = folder_lock._own()
    boot = mine.partition('\n')[2].partition(' ')[0]
    self.left_by(mine.replace(boot, 'other-boot'))
    with self.assertRaises(folder_lock.FolderInUseError):
      with self.hold(self.touch):
        pass

  def test_a_holder_that_lets_go_while_it_is_watched(self):
    self.left_by(_ELSEWHERE)
    with self.hold(lambda: self.path.unlink(missing_ok=True)):
      self.assertIn(f'pid {os.getpid()}', self.path.read_text())
    self.assertLen(self.waits, 1)

  def test_a_name_reaches_the_server_at_once(self):
    fsync = self.enter_context(mock.patch.object(os, 'fsync', wraps=os.fsync))
    with self.hold():
      fsync.assert_called_once()

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
    mine = f'pid {os.getpid()},'
    self.left_by(folder_lock._own().replace(mine, f'pid {ended.pid},'))
    with self.without_locks(), self.hold():
      pass
    self.assertLen(self.waits, 1)  # nobody is watched who is dead

  def test_the_holder_touches_the_lock(self):
    ended = mock.Mock(wait=mock.Mock(side_effect=[False, False, True]))
    self.left_by('me')
    with mock.patch.object(os, 'utime') as utime:
      utime.side_effect = [None, OSError(errno.EIO, 'gone')]
      folder_lock._touch(self.path, 'me', ended)
      self.assertEqual(utime.call_count, 2)

  def test_a_process_whose_lock_is_taken_over_is_ended(self):
    ended = mock.Mock(wait=mock.Mock(side_effect=[False, True]))
    self.left_by(_ELSEWHERE)
    with mock.patch.object(os, '_exit') as leave:
      folder_lock._touch(self.path, 'me', ended)
      leave.assert_called_once_with(1)

  @parameterized.parameters(errno.ENOSPC, errno.EDQUOT)
  def test_a_full_disk(self, code):
    full = OSError(code, 'No space left')
    for name in '_create', '_write':
      with mock.patch.object(folder_lock, name, side_effect=full):
        with self.hold():
          self.assertFalse(self.path.exists())
        with self.without_locks(), self.assertRaises(OSError):
          with self.hold():
            pass
    self.left_by(folder_lock._own())
    with mock.patch.object(folder_lock, '_write', side_effect=full):
      with self.hold():
        pass
    self.assertEqual(self.waits, [])

  def test_other_errors_are_raised(self):
    with self.without_locks(errno.EIO), self.assertRaises(OSError):
      with self.hold():
        pass


if __name__ == '__main__':
  absltest.main()
