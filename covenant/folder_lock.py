"""The lock of a folder, which one process holds, on any file system.

The operating system's lock (flock) ends with its process. On NFS it may be
known to one host only, or there is none; so the file of the lock also says who
holds it, and the holder touches it every few seconds. A process on another host
that finds a name there looks whether the file is still touched. It compares no
clocks: they differ between hosts, and jump.
"""

import contextlib
import errno
import importlib
import io
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from covenant import errors

try:
  fcntl = importlib.import_module('fcntl')
except ImportError:  # Windows
  fcntl = None
_FILE = '.lock'
_MOST_HOLDER = 400  # bytes of the text about the holder
_BEAT_SECONDS = 5.0  # between two touches by the holder
_WATCHED = 4  # beats until a holder on another host is taken for dead
# Errors of file systems without locks.
_WITHOUT = (
  *(errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
  errno.EINVAL,
)


class FolderInUseError(errors.CovenantError):
  """Another process holds the lock of a folder."""


@contextlib.contextmanager
def hold(
  folder: str | os.PathLike[str],
  wait: Callable[[float], object] = time.sleep,
) -> Iterator[None]:
  """Holds the lock of a folder, which the death of its process releases.

  A full disk does not matter to it, but then nobody can read who holds it.

  Args:
    folder: the folder; it is made when missing.
    wait: waits some seconds; tests pass their own.

  Raises:
    FolderInUseError: another process, or another block of this one, holds it.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / _FILE
  # Without a buffer, which a full disk would leave to be written at the end.
  with open(path, 'ab+', buffering=0) as file:
    has_lock = _lock(file, folder)
    holder = _holder(path)
    if holder and _may_live(holder, has_lock) and _is_touched(path, wait):
      raise _in_use(folder, holder)
    own = _own()
    _write(file, own)
    if holder and (not has_lock or _host(holder) != _host(own)):
      wait(_BEAT_SECONDS)  # two that waited for the same holder write both
      if (found := _holder(path)) != own:
        raise _in_use(folder, found)
    ended = threading.Event()
    beat = threading.Thread(target=_touch, args=(file, ended), daemon=True)
    beat.start()
    try:
      yield
    finally:
      ended.set()
      beat.join()
      _write(file, '')


def _lock(file: io.FileIO, folder: pathlib.Path) -> bool:
  """Locks a file; returns False where nothing has locks."""
  if fcntl is None:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise _in_use(folder, _holder(pathlib.Path(file.name))) from None
  except OSError as e:
    if e.errno not in _WITHOUT:
      raise
    return False
  return True


def _in_use(folder: pathlib.Path, holder: str) -> FolderInUseError:
  return FolderInUseError(
    f'{folder} is in use by another process ({holder or "unknown"}): wait for '
    'its end, or choose another --workdir'
  )


def _own() -> str:
  since = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())
  return f'{socket.gethostname()}, pid {os.getpid()}, {since}'


def _host(holder: str) -> str:
  return holder.partition(',')[0]


def _holder(path: pathlib.Path) -> str:
  """Returns who says that it holds a lock, as text for a terminal."""
  # A file that is opened anew is read from the server of NFS, not a cache.
  with open(path, 'rb') as file:
    text = file.read(_MOST_HOLDER).decode(errors='replace')
  return ''.join(c for c in text if c.isprintable())


def _write(file: io.FileIO, text: str) -> None:
  with contextlib.suppress(OSError):
    file.truncate(0)
    file.write(text.encode())


def _may_live(holder: str, has_lock: bool) -> bool:
  """Returns False if the holder is known to be dead, without a look."""
  if _host(holder) != socket.gethostname():
    return True
  if has_lock:
    return False  # or it would have the lock
  pid = holder.partition(', pid ')[2].partition(',')[0]
  return not pid.isdecimal() or pathlib.Path('/proc', pid).exists()


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


def _touch(file: io.FileIO, ended: threading.Event) -> None:
  """Touches a file at every beat until the lock is released."""
  while not ended.wait(_BEAT_SECONDS):
    with contextlib.suppress(OSError):
      os.utime(file.fileno())
