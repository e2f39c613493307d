"""One read under way: what has come, and whether anybody still wants it.

A thread that reads an object announces the read by `watch`; the bucket that
serves it finds it by `current`, counts what it receives and stops when the
read is canceled. So a reader knows a slow source from a silent one, through
every wrapper of a bucket.
"""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Generator


class Transfer:
  """A read of one object, safe for many threads.

  Attributes:
    received: bytes that have come so far.
    size: bytes of the object; 0 until it is known.
  """

  def __init__(self):
    self.received = 0
    self.size = 0
    self._digested: tuple[bytes, bytes] | None = None
    self._lock = threading.Lock()
    self._is_canceled = False
    self._stop: Callable[[], object] | None = None

  def read_as(self, data: bytes, digest: bytes) -> None:
    """Notes the object that was read, and its digest, made meanwhile."""
    self._digested = data, digest

  def digest_of(self, data: bytes) -> bytes:
    """Returns the blake2b of what a bucket gave, 32 bytes.

    It is not computed again if these are the very bytes that were read: a
    wrapper of the bucket may have given others.
    """
    if self._digested is not None and self._digested[0] is data:
      return self._digested[1]
    return hashlib.blake2b(data, digest_size=32).digest()

  def on_cancel(self, stop: Callable[[], object] | None) -> None:
    """Sets what ends the read; it is called at once if that is due."""
    with self._lock:
      self._stop = stop
      due = self._is_canceled
    if due and stop is not None:
      stop()

  def cancel(self) -> None:
    """Ends the read, once: its caller gets an error."""
    with self._lock:
      stop = None if self._is_canceled else self._stop
      self._is_canceled = True
    if stop is not None:
      stop()


_here = threading.local()


def current() -> Transfer:
  """Returns the read of this thread; a new one if nobody watches."""
  found = getattr(_here, 'transfer', None)
  return Transfer() if found is None else found


@contextlib.contextmanager
def watch(transfer: Transfer) -> Generator[None]:
  """Makes `transfer` the read of this thread."""
  before = getattr(_here, 'transfer', None)
  _here.transfer = transfer
  try:
    yield
  finally:
    _here.transfer = before
