"""A stage of a pipeline as its head sees it: its holder, and its progress."""

import dataclasses
import time

from covenant import typing as ct
from covenant.pool import channel as channel_lib


@dataclasses.dataclass
class Seat:
  """A stage and its holder."""

  stage: int
  channel: channel_lib.Channel | None = None
  number: int = -1  # orders that it has applied; -1: it has not said yet
  id: str = ''  # of its state
  digests: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  square: float = 0.0  # of its part of the last aggregated delta
  since: float = 0.0  # when its holder got it, by `time.monotonic`
  asked: float = 0.0  # when it was sent the last order, by `time.monotonic`
  is_lost: bool = False  # it had a holder, and no other has caught up so far

  @property
  def worker(self) -> str:
    return '' if self.channel is None else self.channel.worker

  def note(self, text: dict[str, ct.Json], end: int) -> None:
    """Notes the state that its holder says; raises as `Seats.receive`.

    Args:
      text: the message.
      end: the number of orders; digests are those after the last.
    """
    number, square = int(text['number']), float(text['square'])
    digests = {
      str(name): [bytes.fromhex(x).hex() for x in found]
      for name, found in text['digests'].items()
    }
    self.number, self.id = number, str(text['id'])
    if number == end:
      self.digests, self.square, self.is_lost = digests, square, False

  def is_late(self, end: int, patience: float) -> bool:
    """Returns whether an order takes its holder more than so many seconds."""
    is_at_work = 0 <= self.number < end
    return is_at_work and time.monotonic() > self.asked + patience


@dataclasses.dataclass
class Worker:
  """A worker that may hold stages."""

  channel: channel_lib.Channel
  most: int  # stages that it can hold
  has: frozenset[int]  # stages whose state is on its disk
