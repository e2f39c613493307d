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
  reached: int = -1  # the last order that it was sent; -1: none
  asked: float = 0.0  # when it was sent that one first, by `time.monotonic`
  is_lost: bool = False  # it had a holder, and no other has caught up so far

  @property
  def worker(self) -> str:
    return '' if self.channel is None else self.channel.worker

  def holder_at(self, end: int) -> str:
    """Returns the holder that has applied so many orders; empty without."""
    return self.worker if self.number == end else ''

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

  def take(self, new: 'Seat', end: int) -> None:
    """Takes the holder of another seat of this stage, with its progress.

    Args:
      new: the other.
      end: the number of orders.
    """
    self.channel, self.number, self.id = new.channel, new.number, new.id
    self.reached, self.asked = new.reached, new.asked
    self.since = time.monotonic()
    if self.number == end:
      self.digests, self.square, self.is_lost = new.digests, new.square, False

  def is_late(self, end: int, patience: float) -> bool:
    """Returns whether an order takes its holder more than so many seconds."""
    is_at_work = self.reached >= 0 and self.number < end
    return is_at_work and time.monotonic() > self.asked + patience


@dataclasses.dataclass
class Worker:
  """A worker that may hold stages."""

  channel: channel_lib.Channel
  most: int  # stages that it can hold
  has: frozenset[int]  # stages whose state is on its disk
