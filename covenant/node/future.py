"""Values that may still be computed: reading an attribute never waits."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar('T')
U = TypeVar('U')


class Future(Generic[T]):
  """A value that is waited for when it is asked for, and then kept.

  Unlike `concurrent.futures.Future` it runs in the thread that asks, which lets
  the processes of one emulation exchange results in one order.

  Args:
    wait: returns the value, or raises; called once.

  >>> Future(lambda: 2).then(lambda x: x + 1).result()
  3
  """

  def __init__(self, wait: Callable[[], T]):
    self._wait: Callable[[], T] | None = wait
    self._value: Any = None
    self._error: BaseException | None = None

  @classmethod
  def done(cls, value: T) -> 'Future[T]':
    """Returns a future that has its value."""
    future = cls(lambda: value)
    future.result()
    return future

  def result(self) -> T:
    """Returns the value once it is there; raises what computing it raised."""
    if self._wait is not None:
      wait, self._wait = self._wait, None
      try:
        self._value = wait()
      except BaseException as e:
        self._error = e
    if self._error is not None:
      raise self._error
    return self._value

  def then(self, change: Callable[[T], U]) -> 'Future[U]':
    """Returns the future of `change` of this value."""
    return Future(lambda: change(self.result()))
