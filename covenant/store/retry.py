"""The tries of one call of a bucket."""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import TypeVar

from covenant.store import backend
from covenant.store import interface

_T = TypeVar('_T')


@dataclasses.dataclass
class Call:
  """The state of one call of a bucket."""

  tries: int = 0
  last: str = 'no answer'  # reason why the last try failed
  over: bool = False


async def retry(
  call: Call,
  act: Callable[[], Awaitable[_T]],
  settings: backend.StoreSettings,
  is_own: bool,
) -> _T:
  """Repeats `act` while it fails for a transient reason.

  Args:
    call: the call, whose tries are counted.
    act: asks the store once.
    settings: the pauses between tries.
    is_own: whether the bucket is the own one; a stranger's is given up earlier.
  """
  longest = settings.backoff_seconds
  while True:
    call.tries += 1
    try:
      return await act()
    except Exception as e:
      error = backend.explain(e)
    if call.over or not _is_worth_another(error, call.tries, is_own):
      raise error from None
    call.last = str(error)
    await settings.sleep(settings.rng.uniform(0, longest))
    longest = min(2 * longest, settings.backoff_limit_seconds)


def _is_worth_another(error: Exception, tries: int, is_own: bool) -> bool:
  if not isinstance(error, interface.StoreUnavailableError):
    return False
  return is_own or tries < error.most_tries
