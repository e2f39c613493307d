"""Messages of stages about training, until the head reads them."""

import collections
import json
import queue
import threading
from typing import NamedTuple

from covenant import typing as ct


class Event(NamedTuple):
  """A message of a stage, or the news that it is lost."""

  stage: int
  what: str  # the field 'did' of the message, or LOST
  text: dict[str, ct.Json]
  data: bytes
  worker: str = ''  # its sender, which may have lost the stage since


# Messages of a stage about training.
ANSWERS = frozenset(
  ('begun', 'looked_up', 'forward', 'last', 'backward', 'sealed')
)
LOST = 'lost'
_OBJECT_BYTES = 1 << 12  # of the objects of a message, as they are counted


class Events:
  """Messages that wait to be read; used by many threads.

  Args:
    most: the most bytes of a stage that may wait.
  """

  def __init__(self, most: int):
    self._most = most
    self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._bytes = collections.Counter[int]()  # by stage
    self._lost: set[int] = set()  # stages whose loss waits

  def put(self, event: Event) -> bool:
    """Adds a message, unless too many of its stage wait; returns whether."""
    with self._lock:
      if self._bytes[event.stage] > self._most:
        return False
      self._bytes[event.stage] += _size(event)
      self._queue.put(event)
      return True

  def lose(self, stage: int) -> None:
    """Adds the news that a stage is lost, once until it is read."""
    with self._lock:
      if stage not in self._lost:
        self._lost.add(stage)
        self._queue.put(Event(stage, LOST, {}, b''))

  def poll(self, seconds: float) -> Event | None:
    """Returns the next event; None if there is none for some seconds."""
    try:
      event = self._queue.get(timeout=seconds)
    except queue.Empty:
      return None
    with self._lock:
      if event.what == LOST:
        self._lost.discard(event.stage)
      else:
        self._bytes[event.stage] -= _size(event)
    return event


def _size(event: Event) -> int:
  return len(event.data) + len(json.dumps(event.text)) + _OBJECT_BYTES
