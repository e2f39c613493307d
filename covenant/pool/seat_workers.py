"""The workers that may hold stages of a pipeline, and the choice among them."""

import dataclasses
from collections.abc import Callable, Collection

from covenant import typing as ct
from covenant.pool import channel as channel_lib

Channel = channel_lib.Channel


@dataclasses.dataclass
class Worker:
  """A worker that may hold stages."""

  channel: Channel
  most: int  # stages that it can hold
  has: frozenset[int]  # stages whose state is on its disk
  failures: int = 0  # stages that it did not serve

  @property
  def name(self) -> str:
    return self.channel.worker


class Workers:
  """The workers that have said hello; used under the lock of the seats.

  Args:
    stages: the number of stages.
    held: returns the number of stages of a channel.
  """

  def __init__(self, stages: int, held: Callable[[Channel], int]):
    self._stages, self._held = frozenset(range(stages)), held
    self._known: dict[str, Worker] = {}

  def get(self, name: str) -> Worker | None:
    """Returns a worker by its address; None if it is not there."""
    return self._known.get(name)

  def greet(self, channel: Channel, text: dict[str, ct.Json]) -> Channel | None:
    """Takes a worker; returns the channel that it had before, if any.

    Raises:
      ValueError, KeyError, TypeError, OverflowError: its message is malformed,
        or the second one on this channel.
    """
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
    return sorted(some, key=lambda w: (w.failures, w.name))

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
        fit.append((worker.failures, lacks and held > 0, lacks, held, name))
    return self._known[min(fit)[-1]] if fit else None
