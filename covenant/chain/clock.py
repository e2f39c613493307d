"""The clock of an embedded chain, which is the same for all its processes.

The clock of a machine may be set, forward or back, while a network runs, and a
process that reads it at a bad moment would seal blocks of the future. So time
passes by the clock that counts from the machine's start. Its distance to Unix
time is noted in the chain's file by the first process after each start.
"""

import pathlib
import time
from collections.abc import Callable

from covenant.chain import storage as storage_lib

_BOOT = pathlib.Path('/proc/sys/kernel/random/boot_id')


def machine_clock(storage: storage_lib.ChainStorage) -> Callable[[], float]:
  """Returns a clock of Unix seconds that no setting of the machine's changes.

  Where a machine does not tell when it was started, it is the machine's own.

  Raises:
    ChainError: the chain's file cannot be written.
  """
  try:
    boot = _BOOT.read_text().strip()
    since_start = _since_start
    now = since_start()
  except (OSError, AttributeError):
    return time.time
  with storage.transaction():
    storage.query('CREATE TABLE IF NOT EXISTS clock (boot TEXT, start REAL)')
    rows = storage.query('SELECT start FROM clock WHERE boot = ?', boot)
    if not rows:
      rows = [(time.time() - now,)]
      storage.query('DELETE FROM clock')
      storage.query('INSERT INTO clock VALUES (?, ?)', boot, rows[0][0])
  start = rows[0][0]
  return lambda: start + since_start()


def _since_start() -> float:
  """Returns the seconds since the machine was started, asleep or not."""
  return time.clock_gettime(time.CLOCK_BOOTTIME)
