"""The bytes and seconds of this process's transfers to stores and to pools."""

import threading
from typing import NamedTuple


class Totals(NamedTuple):
  """Sums since the start of the process, or between two times."""

  bytes_sent: float = 0.0
  bytes_received: float = 0.0
  send_seconds: float = 0.0  # of all transfers together
  receive_seconds: float = 0.0
  retries: float = 0.0  # requests that were sent again

  def since(self, earlier: 'Totals') -> 'Totals':
    """Returns the sums from an earlier time to this one."""
    return Totals(*(x - y for x, y in zip(self, earlier, strict=True)))


class Traffic:
  """Adds up transfers, from any thread."""

  def __init__(self):
    self._lock = threading.Lock()
    self._totals = Totals()

  @property
  def totals(self) -> Totals:
    """The sums up to now."""
    return self._totals

  def add(self, verb: str, size: int, seconds: float, tries: int) -> None:
    """Adds a call of a bucket.

    Args:
      verb: 'write' and 'read' move data; of others only the retries count.
      size: bytes moved.
      seconds: its duration.
      tries: requests that it took, the first included.
    """
    sent, got = verb == 'write', verb == 'read'
    call = Totals(
      size * sent, size * got, seconds * sent, seconds * got, max(tries - 1, 0)
    )
    with self._lock:
      self._totals = Totals(
        *(x + y for x, y in zip(self._totals, call, strict=True))
      )


TRAFFIC = Traffic()  # from and to stores
POOLS = Traffic()  # between a pool and its workers, a head and its stages
