"""Where the wall-clock time of an emulated round goes."""

import collections
import time
from collections.abc import Callable

from covenant.node import base as node_lib
from covenant.protocol import round as round_lib

Phase = round_lib.Phase
# What nodes are told to do -> the field of `metrics.Round` that counts it.
_FIELDS = {
  Phase.BEGIN: 'train_seconds',
  Phase.TRAIN: 'train_seconds',
  Phase.COMMIT: 'exchange_seconds',
  Phase.UPLOAD: 'exchange_seconds',
  Phase.COLLECT: 'exchange_seconds',
  Phase.VOTE: 'exchange_seconds',
  Phase.DECIDE: 'exchange_seconds',
  Phase.APPLY: 'outer_seconds',
  Phase.KEEP: 'outer_seconds',
  Phase.CATCH_UP: 'outer_seconds',
  Phase.SCORE: 'score_seconds',
}


class Stopwatch:
  """Adds up what all nodes of a host spend, one at a time."""

  def __init__(self):
    self._spent = collections.defaultdict[str, float](float)

  def observe(self, event: node_lib.Event) -> None:
    """Counts an event of a node."""
    self._spent[_FIELDS[Phase(event.what)]] += event.seconds

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
