"""Payloads of the next round, fetched while a round is replayed."""

import contextlib
import threading
from collections.abc import Callable

from covenant.store import interface as store_lib
from covenant.wire import manifest as manifest_lib


class Ahead:
  """Payloads that a thread fetches, which nobody waits for after a failure."""

  def __init__(self, fetch: Callable[[dict[bytes, bytes]], None]):
    self._have: dict[bytes, bytes] = {}
    self._fetch = fetch
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    with contextlib.suppress(manifest_lib.ManifestError, store_lib.StoreError):
      self._fetch(self._have)

  def result(self) -> dict[bytes, bytes]:
    """Returns what has come, once all of it has or cannot."""
    self._thread.join()
    return self._have
