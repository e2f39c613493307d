"""Where the wall-clock time of an emulated round goes."""

import collections
import time
from collections.abc import Callable

from covenant.node import node as node_lib
from covenant.node import round as round_lib

Do = round_lib.Do
# What nodes are told to do -> the field of `metrics.Round` that counts it.
_FIELDS = {
  Do.BEGIN: 'train_seconds',
  Do.TRAIN: 'train_seconds',
  Do.COMMIT: 'exchange_seconds',
  Do.UPLOAD: 'exchange_seconds',
  Do.COLLECT: 'exchange_seconds',
  Do.VOTE: 'exchange_seconds',
  Do.DECIDE: 'exchange_seconds',
  Do.APPLY: 'outer_seconds',
  Do.KEEP: 'outer_seconds',
  Do.CATCH_UP: 'outer_seconds',
  Do.SCORE: 'score_seconds',
}


class Stopwatch:
  """Adds up what all nodes of a host spend, one at a time."""

  def __init__(self):
    self._spent = collections.defaultdict[str, float](float)

  def observe(self, event: node_lib.Event) -> None:
    """Counts an event of a node."""
    self._spent[_FIELDS[Do(event.what)]] += event.seconds

  def train(self, wait: Callable[[], None]) -> None:
    """Waits for training that is under way; counts it."""
    began = time.perf_counter()
    wait()
    self._spent['train_seconds'] += time.perf_counter() - began

  def lap(self) -> dict[str, float]:
    """Seconds since the last lap, by field."""
    spent = {field: self._spent[field] for field in _FIELDS.values()}
    self._spent.clear()
    return spent
