"""The room for a checkpoint, and why one could not be written, in a line."""

import errno
import os

from covenant import startup
from covenant.telemetry import machine

_ROOM = 1 << 17  # bytes of a checkpoint beside its arrays


def require_room(directory: str, needed: int) -> None:
  """Raises OSError if a disk has no room, before Orbax has written a half.

  Args:
    directory: the folder of the checkpoints.
    needed: bytes of the arrays.
  """
  if machine.free_disk_bytes(directory) < needed + _ROOM:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)


def why(directory: str, error: BaseException) -> str:
  """Returns why a checkpoint could not be written, and what is safe."""
  if disk := startup.disk_error(error):
    return f'{directory}: {disk}; earlier checkpoints are whole{startup.GO_ON}'
  return reason(error)


def reason(error: BaseException) -> str:
  """Returns the cause of an error of Orbax, in a line."""
  while error.__cause__ is not None:
    error = error.__cause__
  line = next(iter(str(error).splitlines()), '')
  return f'{type(error).__name__}: {line[:200]}'
