"""The requests of a head to its stages in a round, and their answers."""

import math
import time
from collections.abc import Callable

from covenant import typing as ct
from covenant.pool import seat_events
from covenant.pool import seats as seats_lib

_LOOK_SECONDS = 0.2  # between two looks at the deadline
# The answer to a message, where it has another name.
_ANSWERS = {'begin': 'begun', 'look_up': 'looked_up', 'seal': 'sealed'}


class LostError(Exception):
  """A stage has lost its holder."""


class LateError(Exception):
  """There is no time left."""


class NonsenseError(Exception):
  """A stage sends a message that nobody asked for.

  Args are the stage, the worker that sent it, and the reason.
  """


class StageTalk:
  """The questions of a round that are open.

  Args:
    seats: the stages.
    stages: their number.
    late: returns True when the time is over, or the head is to stop.
    patience: seconds that a stage may take for an answer.

  Attributes:
    lost: stages that have lost their holder since the round knew of it.
    away: stages that are bypassed.
    busy: seconds that each stage says it has worked.
  """

  def __init__(
    self,
    seats: seats_lib.Seats,
    stages: int,
    late: Callable[[], bool],
    patience: float,
  ):
    self._seats, self._stages = seats, stages
    self._late, self._patience = late, patience
    self.lost: set[int] = set()
    self.away: set[int] = set()
    self.busy = [0.0] * stages
    # Stage, answer, microbatch and attempt of each open question.
    self._open: dict[tuple[int, str, ct.Json, ct.Json], None] = {}
    self._heard = [0.0] * stages  # last answer, or first question after it
    self._waited = [0.0] * stages  # seconds for answers

  def ask(
    self, stage: int, text: dict[str, ct.Json], data: bytes = b''
  ) -> None:
    """Sends a stage a message that it answers."""
    if all(key[0] != stage for key in self._open):
      self._heard[stage] = time.monotonic()
    answer = _ANSWERS.get(text['do'], text['do'])
    key = stage, answer, text.get('microbatch'), text.get('attempt')
    self._open[key] = None
    self._seats.send(stage, {**text, 'stage': stage}, data)

  def tell_all(self, text: dict[str, ct.Json]) -> None:
    """Sends all stages but bypassed ones a message that none answers."""
    for s in range(self._stages):
      if s not in self.away:
        self._seats.send(s, {**text, 'stage': s})

  def before(self, stage: int) -> int:
    """Returns the stage before one that is not bypassed."""
    return max(s for s in range(stage) if s not in self.away)

  def after(self, stage: int) -> int:
    """Returns the stage after one that is not bypassed."""
    others = range(stage + 1, self._stages)
    return min(s for s in others if s not in self.away)

  def answer(self, stage: int, what: str) -> seat_events.Event:
    """Returns the next answer of a kind of a stage; raises as `next`."""
    while True:
      event = self.next()
      if (event.stage, event.what) == (stage, what):
        return event

  def next(self) -> seat_events.Event:
    """Returns the next answer to an open question.

    Raises:
      LostError: a stage is lost, or has not answered for too long.
      LateError: the time is over.
      NonsenseError: a stage gives an answer without a question.
    """
    looked = time.monotonic()
    while True:
      # A hostile stage may send events that are no answers without an end.
      if time.monotonic() > looked + _LOOK_SECONDS:
        looked = time.monotonic()
        if self._late():
          raise LateError
        self._drop_silent()
      event = self._seats.poll(_LOOK_SECONDS)
      if event is None:
        continue
      if event.what == seat_events.LOST:
        if event.stage in self.away:
          continue
        self.lost.add(event.stage)
        raise LostError
      number, attempt = (
        event.text.get(name) for name in ('microbatch', 'attempt')
      )
      # A bool is an int, but no index.
      if any(type(x) not in (int, type(None)) for x in (number, attempt)):
        raise NonsenseError(event.stage, event.worker, 'a malformed message')
      key = event.stage, event.what, number, attempt
      if key in self._open:
        del self._open[key]
        now = time.monotonic()
        self._waited[event.stage] += now - self._heard[event.stage]
        self._heard[event.stage] = now
        self.busy[event.stage] += _seconds(event.text.get('seconds'))
        return event
      if any(attempt is not None and attempt == k[3] for k in self._open):
        why = 'it answers what nobody asked'
        raise NonsenseError(event.stage, event.worker, why)

  def slowest(self) -> int | None:
    """Returns the stage whose answers took twice as long as any other's."""
    waited = self._waited.copy()
    for stage in {key[0] for key in self._open}:
      waited[stage] += time.monotonic() - self._heard[stage]
    second, first = [0.0, *sorted(waited)][-2:]
    return waited.index(first) if first > 2 * second else None

  def forget(self) -> None:
    """Forgets all questions; answers that still come are ignored."""
    self._open.clear()

  def forget_losses(self) -> set[int]:
    """Returns the stages that were lost, now that all have holders again."""
    while (event := self._seats.poll(0)) is not None:
      if event.what == seat_events.LOST:
        self.lost.add(event.stage)
    found, self.lost = self.lost, set()
    return found

  def _drop_silent(self) -> None:
    now = time.monotonic()
    for stage in {key[0] for key in self._open}:
      if now - self._heard[stage] > self._patience:
        self._seats.drop(stage)


def _seconds(said: ct.Json) -> float:
  """Returns a time that a stage says, or 0."""
  is_time = isinstance(said, float) and math.isfinite(said) and said > 0
  return said if is_time else 0.0
