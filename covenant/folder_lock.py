"""The lock of a folder, which one process holds, on any file system.

The operating system's lock (flock) ends with its process. On NFS it may be
known to one host only, or there is none; so a second file, which one process
alone can create there, says who holds the lock, and its holder touches it every
few seconds. A process on another host that finds such a file looks whether it
is still touched. It compares no clocks: they differ between hosts, and jump.
"""

import contextlib
import errno
import importlib
import io
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from covenant import errors

try:
  fcntl = importlib.import_module('fcntl')
except ImportError:  # Windows
  fcntl = None
_FILE = '.lock'  # of the operating system's lock
_HOLDER = '.holder'  # there while the lock is held, or after a kill
_MOST_HOLDER = 400  # bytes of the text about the holder
_BEAT_SECONDS = 5.0  # between two touches by the holder
_WATCHED = 4  # beats until a holder on another host is taken for dead
_BOOT = pathlib.Path('/proc/sys/kernel/random/boot_id')
# Errors of file systems without locks.
_WITHOUT = (
  *(errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
  errno.EINVAL,
)
_FULL = (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))
_GONE = (errno.ENOENT, getattr(errno, 'ESTALE', errno.ENOENT))


class FolderInUseError(errors.CovenantError):
  """Another process holds the lock of a folder."""


@contextlib.contextmanager
def hold(
  folder: str | os.PathLike[str],
  wait: Callable[[float], object] = time.sleep,
) -> Iterator[None]:
  """Holds the lock of a folder, which the death of its process releases.

  A full disk does not matter to it where the operating system has locks, but
  then nobody can read who holds it. A process that did not run for a while,
  and whose lock a process on another host has taken over, is ended.

  Args:
    folder: the folder; it is made when missing.
    wait: waits some seconds; tests pass their own.

  Raises:
    FolderInUseError: another process, or another block of this one, holds it.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  path, own = folder / _HOLDER, _own()
  with open(folder / _FILE, 'ab') as file:
    has_lock = _lock(file, path, wait)
    if other := _claim(path, own, has_lock, wait):
      raise _in_use(folder, other)
    ended = threading.Event()
    beat = threading.Thread(target=_touch, args=(path, own, ended), daemon=True)
    beat.start()
    try:
      yield
    finally:
      ended.set()
      beat.join()
      with contextlib.suppress(OSError):
        if _read(path) == own:
          path.unlink()


def _lock(
  file: io.IOBase, holder: pathlib.Path, wait: Callable[[float], object]
) -> bool:
  """Locks a file; returns False where nothing has locks."""
  if fcntl is None:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    if not holder.exists():
      wait(1.0)  # until it is written
    said = ''
    with contextlib.suppress(OSError):  # on a full disk there is none
      said = _read(holder)
    raise _in_use(holder.parent, said) from None
  except OSError as e:
    if e.errno not in _WITHOUT:
      raise
    return False
  return True


def _claim(
  path: pathlib.Path,
  own: str,
  has_lock: bool,
  wait: Callable[[float], object],
) -> str:
  """Makes the file of the holder ours; returns '', or who else has it."""
  try:
    while not _create(path):
      found = _take_over(path, own, has_lock, wait)
      if found is not None:
        return '' if found == own else found or 'unknown'
    _write(path, own)
  except OSError as e:
    if not has_lock or e.errno not in _FULL:
      raise
    with contextlib.suppress(OSError):
      path.unlink()  # or it would be read as that of another host
  return ''


def _create(path: pathlib.Path) -> bool:
  """Creates a file; of several processes one gets True, on NFS as well."""
  try:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
  except FileExistsError:
    return False
  return True


def _take_over(
  path: pathlib.Path,
  own: str,
  has_lock: bool,
  wait: Callable[[float], object],
) -> str | None:
  """Writes our name over that of a dead holder.

  Returns whose the file is then; None if it was released meanwhile.
  """
  try:
    holder = _read(path)
    is_dead = _is_dead(holder, own, has_lock)
    if not is_dead:
      seconds = _WATCHED * _BEAT_SECONDS
      print(
        f'{path}: {_said(holder)} held this folder, or holds it; watching '
        f'for {seconds:g} s whether it is alive',
        file=sys.stderr,
        flush=True,
      )
      if _is_touched(path, wait):
        return _read(path)
    _write(path, own)
    if is_dead and has_lock:
      return own
    wait(_BEAT_SECONDS)  # two that waited for the same holder write both
    return _read(path)
  except OSError as e:
    if e.errno not in _GONE:
      raise
    return None


def _in_use(folder: pathlib.Path, holder: str) -> FolderInUseError:
  return FolderInUseError(
    f'{folder} is in use by another process ({_said(holder)}): wait for its '
    'end, or choose another --workdir'
  )


def _said(holder: str) -> str:
  """Returns the line about a holder that is for people."""
  said = holder.partition('\n')[0]
  return ''.join(c for c in said if c.isprintable()) or 'unknown'


def _own() -> str:
  """Returns a line for people, and one that tells holders apart.

  Containers on several machines may have one name, and those on one machine
  the process ids of each other.
  """
  since = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())
  host = socket.gethostname()
  boot, space = host, ''
  with contextlib.suppress(OSError):
    boot = _BOOT.read_text().strip()
    space = str(os.stat('/proc/self/ns/pid').st_ino)
  token = secrets.token_hex(4)
  return f'{host}, pid {os.getpid()}, {since}\n{boot} {space} {token}'


def _is_dead(holder: str, own: str, has_lock: bool) -> bool:
  """Returns True if the holder, a process of this machine, is dead."""
  said, _, where = holder.partition('\n')
  boot, space = _place(where)
  own_boot, own_space = _place(own.partition('\n')[2])
  if boot != own_boot or has_lock:
    return boot == own_boot  # a living one would have the lock
  pid = said.partition(', pid ')[2].partition(',')[0]
  is_visible = space == own_space != '' and pid.isdecimal()
  return is_visible and not pathlib.Path('/proc', pid).exists()


def _place(where: str) -> tuple[str, str]:
  """Returns the boot of a machine, and the space of process ids, or ''."""
  boot, space, _ = f'{where}  '.split(' ', 2)
  return boot, space


def _read(path: pathlib.Path) -> str:
  # A file that is opened anew is read from the server of NFS, not a cache.
  with open(path, 'rb') as file:
    return file.read(_MOST_HOLDER).decode(errors='replace')


def _write(path: pathlib.Path, text: str) -> None:
  with open(path, 'wb', buffering=0) as file:
    file.write(text.encode())
    try:
      os.fsync(file.fileno())  # or other hosts would not see it yet
    except OSError as e:
      if e.errno not in _WITHOUT:
        raise


def _is_touched(path: pathlib.Path, wait: Callable[[float], object]) -> bool:
  """Watches a file for some beats; returns whether somebody touched it."""
  before = _touched(path)
  for _ in range(_WATCHED):
    wait(_BEAT_SECONDS)
    if _touched(path) != before:
      return True
  return False


def _touched(path: pathlib.Path) -> int:
  with open(path, 'rb') as file:
    return os.fstat(file.fileno()).st_mtime_ns


def _touch(path: pathlib.Path, own: str, ended: threading.Event) -> None:
  """Touches a file at every beat until the lock is released, or is another's.

  Then it ends the process, or two would write to the folder.
  """
  while not ended.wait(_BEAT_SECONDS):
    with contextlib.suppress(OSError):
      os.utime(path)
      found = _read(path)
      if found not in (own, ''):
        print(
          f'{path.parent} was taken over by another process ({_said(found)}) '
          'while this one did not run: it ends',
          file=sys.stderr,
          flush=True,
        )
        os._exit(1)
