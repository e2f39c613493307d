"""A stage of a pipeline as its head sees it: its holder, and its progress."""

import collections
import dataclasses
import math
import time

from covenant import typing as ct
from covenant.pool import channel as channel_lib

# Commands that a holder gets before any order, see `Seat.reached`.
TAKE, RESET = -2, -1
_TIMES = 3  # requests of a holder for its sections of a payload


@dataclasses.dataclass
class Seat:
  """A stage and its holder."""

  stage: int
  channel: channel_lib.Channel | None = None
  number: int = -1  # orders that its holder has applied; -1: not said yet
  id: str = ''  # the id of its state
  digests: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  square: float = 0.0  # sum of squares of its part of the last delta
  since: float = 0.0  # start of its holder, by `time.monotonic`
  reached: int = TAKE  # the last thing that it was told: an order, or these two
  asked: float = 0.0  # the time of that, by `time.monotonic`
  seconds: float = 0.0  # its time for an answer, or it loses the stage
  took: float = 0.0  # seconds until it was at the end of the orders
  is_lost: bool = False  # it had a holder, and no other has caught up so far
  # Requests of its holder for each payload of the newest order, by uid.
  served: collections.Counter[int] = dataclasses.field(
    default_factory=collections.Counter
  )

  @property
  def worker(self) -> str:
    return '' if self.channel is None else self.channel.worker

  def send(self, text: dict[str, ct.Json], data: bytes = b'') -> None:
    """Sends its holder a message; does nothing without one."""
    if self.channel is not None:
      self.channel.send(text, data)

  def holder_at(self, end: int) -> str:
    """Returns the holder that has applied so many orders; empty without."""
    return self.worker if self.number == end else ''

  def note(self, text: dict[str, ct.Json], end: int) -> None:
    """Notes the state that its holder says it has; raises as `Seats.receive`.

    Args:
      text: the message.
      end: the number of orders; digests are those after the last.
    """
    number, square = int(text['number']), float(text['square'])
    if not 0 <= square < math.inf:
      raise ValueError(f'expected a sum of squares, got {square}')
    digests = {
      str(name): [bytes.fromhex(x).hex() for x in found]
      for name, found in text['digests'].items()
    }
    if self.number < end == number:
      self.took = time.monotonic() - self.asked
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
    self.reached, self.asked, self.seconds = new.reached, new.asked, new.seconds
    self.served, self.took = new.served, new.took
    self.since = time.monotonic()
    if self.number == end:
      self.digests, self.square, self.is_lost = new.digests, new.square, False

  def tell(self, what: int) -> bool:
    """Returns whether something is new to its holder; notes that it is told.

    Nothing is told twice: a holder that repeats itself gains no time.
    """
    if what <= self.reached:
      return False
    self.reached, self.asked = what, time.monotonic()
    self.served.clear()
    return True

  def serve(self, number: int, uid: int) -> bool:
    """Returns whether its holder may have its sections of a payload.

    It may have those of the order that it was told last, `_TIMES` each: the
    payload may have to be fetched every time.

    Args:
      number: of the order.
      uid: of one of its payloads.
    """
    self.served[uid] += number == self.reached
    return number == self.reached and self.served[uid] <= _TIMES

  def is_late(self, end: int) -> bool:
    """Returns whether its holder takes too long for what it was told last."""
    is_at_work = self.channel is not None and self.number < end
    return is_at_work and time.monotonic() > self.asked + self.seconds

  def is_as_slow(self, late: 'Seat', end: int) -> bool:
    """Returns whether its holder was hardly faster than another that is late.

    All are slow while they compile, and gain nothing by changing stages.
    """
    waited = time.monotonic() - late.asked
    return self.number < end or waited < 2 * self.took
