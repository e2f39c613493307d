"""Work beside the rounds: what a node must not wait for.

A node publishes its status and its checkpoints while the rounds go on. A slow
or dead store then delays nothing but these.
"""

import threading
from collections.abc import Callable

from covenant.chain import interface as chain_lib
from covenant.store import interface as store_lib

_PAUSE_SECONDS = 5.0  # after the first failure, before the next try
_LONGEST_PAUSE = 300.0  # seconds; a pause is twice as long as the last one
_FAILURES = (chain_lib.ChainError, store_lib.StoreError, OSError)


class CanceledError(Exception):
  """The process ends, and does not wait for this work."""


class Beside:
  """A thread that does the newest work, again until it is done.

  Args:
    name: of the thread.
    tries: how often a work is tried; later work replaces one that waits.
    pause: waits some seconds between two tries, unless the event is set.

  Attributes:
    failures: the number of tries that failed.
  """

  def __init__(
    self,
    name: str,
    tries: int = 1 << 30,
    pause: Callable[[threading.Event, float], object] = threading.Event.wait,
  ):
    self._name = name
    self._tries = tries
    self._pause = pause
    self._lock = threading.Lock()
    self._waiting: tuple[Callable[[], None], int] | None = None
    self._thread: threading.Thread | None = None
    self._canceled = threading.Event()
    self._error = ''
    self._is_failing = False
    self.failures = 0

  @property
  def is_failing(self) -> bool:
    """True if the work under way has failed, and is tried again."""
    with self._lock:
      return self._thread is not None and self._is_failing

  @property
  def is_busy(self) -> bool:
    """True if work is under way or waits."""
    with self._lock:
      return self._thread is not None

  def take_error(self) -> str:
    """Returns what failed since this was asked last; empty if nothing did."""
    with self._lock:
      error, self._error = self._error, ''
    return error

  def check(self) -> None:
    """Raises CanceledError in work that nobody waits for any more."""
    if self._canceled.is_set():
      raise CanceledError

  def submit(self, work: Callable[[], None], tries: int | None = None) -> None:
    """Does work soon, in place of any that has not begun.

    Args:
      work: is done on the thread.
      tries: how often it is tried; None: as often as any work.
    """
    with self._lock:
      self._waiting = work, tries or self._tries
      if self._thread is None:
        self._thread = threading.Thread(
          target=self._run, name=self._name, daemon=True
        )
        self._thread.start()

  def close(self, seconds: float | None, cancel: bool = False) -> bool:
    """Waits for the end of all work; returns whether it came in time.

    Args:
      seconds: the longest wait; None: until it is done.
      cancel: ask the work to end early.
    """
    if cancel:
      self._canceled.set()
    in_time = self.wait(seconds)
    self._canceled.set()
    return in_time

  def wait(self, seconds: float | None) -> bool:
    """Waits for the end of all work, so long; returns whether it came."""
    with self._lock:
      thread = self._thread
    if thread is not None:
      thread.join(seconds)
    return not self.is_busy

  def _run(self) -> None:
    try:
      while True:
        with self._lock:
          waiting, self._waiting = self._waiting, None
          if waiting is None:
            self._thread = None
            return
        self._do(*waiting)
    finally:
      with self._lock:
        if self._thread is threading.current_thread():
          self._thread = None

  def _do(self, work: Callable[[], None], tries: int) -> None:
    seconds, self._is_failing = _PAUSE_SECONDS, False
    for left in reversed(range(tries)):
      try:
        work()
        return
      except CanceledError:
        return
      except Exception as e:
        # Only what may pass is tried again; anything else is a bug.
        may_pass = isinstance(e, _FAILURES)
        with self._lock:
          self._error = f'{type(e).__name__}: {e}'
          self.failures += 1
          self._is_failing = True
          is_replaced = self._waiting is not None
      if not (left and may_pass) or is_replaced or self._canceled.is_set():
        return
      self._pause(self._canceled, seconds)
      with self._lock:
        if self._waiting is not None:
          return
      seconds = min(2 * seconds, _LONGEST_PAUSE)
