"""The workers that may hold stages of a pipeline, and the choice among them."""

import dataclasses
from collections.abc import Callable, Collection

from covenant import typing as ct
from covenant.pool import channel as channel_lib

Channel = channel_lib.Channel
MOST_IDLE = 32  # channels without a stage; the oldest makes room
_KEYS = 10_000  # workers whose failures are remembered
_MOST_FAILURES = 4  # that are counted


@dataclasses.dataclass
class Worker:
  """A worker that may hold stages."""

  channel: Channel
  most: int  # stages that it can hold
  has: frozenset[int]  # stages whose state is on its disk

  @property
  def name(self) -> str:
    return self.channel.worker


class Workers:
  """The workers that have said hello; used under the lock of the seats.

  The failures of a worker are those of its key: it does not lose them by coming
  back. They are forgotten when the last one is old.

  Args:
    stages: the number of stages.
    held: returns the number of stages of a channel.
    now: returns the number of outer steps so far.
    memory: outer steps after which failures are forgotten.
  """

  def __init__(
    self,
    stages: int,
    held: Callable[[Channel], int],
    now: Callable[[], int],
    memory: int,
  ):
    self._stages, self._held = frozenset(range(stages)), held
    self._now, self._memory = now, memory
    self._open: dict[Channel, None] = {}  # the oldest first
    self._known: dict[str, Worker] = {}
    # The number of them, and the outer steps at the last; the oldest first.
    self._failures: dict[str, tuple[int, int]] = {}

  def open(self, channel: Channel) -> None:
    """Takes a new channel; the oldest without a stage may make room."""
    self._open[channel] = None
    idle = [c for c in self._open if not self._held(c)]
    for old in idle[:-MOST_IDLE]:
      self._open.pop(old)
      old.close()

  def close(self, channel: Channel) -> None:
    """Forgets a channel that is closed."""
    self._open.pop(channel, None)

  def fail(self, name: str) -> None:
    """Counts a stage that a worker did not serve."""
    count = min(self.failures(name) + 1, _MOST_FAILURES)
    self._failures.pop(name, None)
    self._failures[name] = count, self._now()
    if len(self._failures) > _KEYS:
      del self._failures[next(iter(self._failures))]

  def failures(self, name: str) -> int:
    """Returns the number of stages that a worker did not serve; at most 4."""
    count, last = self._failures.get(name, (0, 0))
    return count if self._now() - last < self._memory else 0

  def get(self, name: str) -> Worker | None:
    """Returns a worker by its address; None if it is not there."""
    return self._known.get(name)

  def greet(self, channel: Channel, text: dict[str, ct.Json]) -> Channel | None:
    """Takes a worker; returns the channel that it had before, if any.

    Raises:
      ValueError, KeyError, TypeError, OverflowError: its message is malformed,
        or the second one on this channel, or the channel is closed.
    """
    if channel not in self._open:
      raise ValueError('its channel is closed')
    has = self._stages & {int(s) for s in text['has']}
    new, old = Worker(channel, int(text['most']), has), self.get(channel.worker)
    if old is not None and old.channel is channel:
      raise ValueError('it has said hello already')
    self._known[new.name] = new
    return None if old is None else old.channel

  def leave(self, channel: Channel) -> None:
    """Forgets the worker of a channel, unless it has come back on another."""
    known = self.get(channel.worker)
    if known is not None and known.channel is channel:
      del self._known[channel.worker]

  def idle(self, besides: Collection[str]) -> list[Worker]:
    """Returns the workers without a stage, those with few failures first."""
    free = (w for w in self._known.values() if not self._held(w.channel))
    some = [w for w in free if w.name not in besides]
    return sorted(some, key=lambda w: (self.failures(w.name), w.name))

  def fittest(
    self,
    stage: int,
    besides: Collection[str],
    is_early: bool = False,
    must_have: bool = False,
  ) -> Worker | None:
    """Returns the worker that a stage goes to, if there is one.

    One that has the state keeps its moments and error feedback.

    Args:
      stage: the stage.
      besides: workers that do not get it.
      is_early: whether others may still come: nobody gets a second stage.
      must_have: whether only workers that have its state get it.
    """
    fit = []
    for name, worker in self._known.items():
      held, lacks = self._held(worker.channel), stage not in worker.has
      most = 1 if is_early else worker.most
      if held < most and name not in besides and not (must_have and lacks):
        failures = self.failures(name)
        fit.append((failures, lacks and held > 0, lacks, held, name))
    return self._known[min(fit)[-1]] if fit else None
