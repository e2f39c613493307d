"""Preparations of the program: compiled programs, signals, errors of disks."""

import contextlib
import errno
import os
import pathlib
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping

import jax
from absl import logging

# The share of a GPU that JAX takes; it refuses both names at once.
MEMORY_FRACTION = 'XLA_CLIENT_MEM_FRACTION'
_OLD_MEMORY_FRACTION = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
# 'false': JAX takes memory of a GPU as it needs it.
PREALLOCATE = 'XLA_PYTHON_CLIENT_PREALLOCATE'
# Errors of the operating system that people mend, and how.
_REMEDIES = {
  errno.ENOSPC: 'the disk is full',
  errno.EDQUOT: 'the quota of this user is used up',
  errno.EROFS: 'the file system is read-only',
  errno.EACCES: 'this user may not write there',
  errno.EPERM: 'this user may not do that',
  errno.EEXIST: 'a file is there, where a folder was expected',
  errno.ENOENT: 'there is no such file or folder',
  errno.ENOTDIR: 'a file is where a folder was expected',
  errno.EISDIR: 'a folder is where a file was expected',
  errno.EIO: 'the disk does not answer as it should',
  errno.EMFILE: 'too many files are open; raise ulimit -n',
}

GO_ON = '. Make room: the same command then goes on'
_CODE = re.compile(r"os_error_code='(\d+)'|\[Errno (\d+)\]")


def keep_compilations() -> None:
  """Keeps compiled programs on disk, for the next start.

  Without a home folder, or where its cache cannot be written, it says so in a
  line, and each start compiles again.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  try:
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    path = pathlib.Path(cache, 'covenant', 'compiled')
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f'.{os.getpid()}.probe'
    probe.write_bytes(b'')
    probe.unlink()
  except (OSError, RuntimeError) as e:  # RuntimeError: there is no home
    why = os_error(e) if isinstance(e, OSError) else str(e)
    print(
      f'compiled programs are not kept: {why}; set XDG_CACHE_HOME to a folder '
      'that can be written',
      file=sys.stderr,
    )
    return
  jax.config.update('jax_compilation_cache_dir', str(path))
  # Small programs as well: there are many, and to read one is faster.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def device_share(
  fraction: float,
  environ: Mapping[str, str] = os.environ,
  shared: bool = False,
) -> dict[str, str]:
  """Returns variables for a process that takes a share of a GPU's memory.

  Without them the first of several processes takes three quarters. What the
  user has set stays as it is.

  Args:
    fraction: the share; 0: not known.
    environ: the environment of the process that starts it.
    shared: True if other processes may use the GPU. Without a fraction, memory
      is then taken as it is needed.

  >>> device_share(0.25, {}), device_share(0.25, {MEMORY_FRACTION: '.9'})
  ({'XLA_CLIENT_MEM_FRACTION': '0.250'}, {})
  >>> device_share(0, {}, shared=True)
  {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  """
  if {MEMORY_FRACTION, _OLD_MEMORY_FRACTION} & set(environ):
    return {}
  if fraction:
    return {MEMORY_FRACTION: f'{fraction:.3f}'}
  return {PREALLOCATE: 'false'} if shared and PREALLOCATE not in environ else {}


def os_error(error: OSError) -> str:
  """Returns an error of the operating system as one line for people.

  >>> os_error(OSError(errno.ENOSPC, 'No space left on device', '/w/a.json'))
  '/w/a.json: the disk is full. Make room: the same command then goes on'
  """
  why = _REMEDIES.get(error.errno or 0) or error.strerror or str(error)
  where = error.filename2 or error.filename
  text = f'{os.fsdecode(where)}: {why}' if where else why
  return text + GO_ON if error.errno in (errno.ENOSPC, errno.EDQUOT) else text


def disk_error(error: BaseException) -> str:
  """Returns what is wrong with a disk by an error of a library; '' if nothing.

  >>> disk_error(ValueError("RESOURCE_EXHAUSTED: ... [os_error_code='28']"))
  'the disk is full'
  """
  cause: BaseException | None = error
  while cause is not None:
    code = cause.errno if isinstance(cause, OSError) else None
    if found := _CODE.search(str(cause)):
      code = code or int(found[1] or found[2])
    # Libraries also make folders that may exist already.
    if code in _REMEDIES and code != errno.EEXIST:
      return _REMEDIES[code]
    cause = cause.__cause__ or cause.__context__
  return ''


def quiet_libraries() -> None:
  """Keeps libraries from printing what they also raise.

  Orbax logs its errors, and TensorStore prints one per array that it had not
  written when another one failed.
  """
  logging.set_verbosity(logging.FATAL)
  show = sys.excepthook

  def hook(
    kind: type[BaseException],
    error: BaseException,
    trace: types.TracebackType | None,
  ) -> None:
    if kind is not RuntimeError or str(error) != 'Event loop is closed':
      show(kind, error, trace)

  sys.excepthook = hook


def is_for_people(error: OSError) -> bool:
  """Returns True if the message of an error says all that its user needs."""
  return error.errno in _REMEDIES


@contextlib.contextmanager
def stoppable(message: str) -> Iterator[Callable[[], bool]]:
  """Yields a function that tells if Ctrl-C or SIGTERM asked to stop.

  A second one stops at once.
  """
  asked = False

  def ask(number: int, frame: object) -> None:
    nonlocal asked
    del number, frame
    if asked:
      raise KeyboardInterrupt
    asked = True
    print(f'\n{message}; once more: at once', file=sys.stderr, flush=True)

  signals = (signal.SIGINT, signal.SIGTERM)
  previous = {number: signal.signal(number, ask) for number in signals}
  try:
    yield lambda: asked
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
