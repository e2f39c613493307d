"""The worker of each stage of a pipeline, and the progress of the stage.

Workers come and go. A stage without a holder goes to the worker that has its
state, or else to the one with the fewest stages: a spare, or a neighbor that
takes over the layers beside its own. A worker that comes later prepares to take
them from the neighbor, which holds them until it has caught up.
"""

import collections
import json
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from covenant import typing as ct
from covenant.pool import channel as channel_lib
from covenant.pool import orders as orders_lib
from covenant.pool import seat as seat_lib


class Event(NamedTuple):
  """A message of a stage, or the news that it is lost."""

  stage: int
  what: str  # the field 'did' of the message, or LOST
  text: dict[str, ct.Json]
  data: bytes


LOST = 'lost'
MOST_IDLE = 32  # channels without a stage; the oldest makes room
_TEXT_BYTES = 1 << 12  # of the text of an event, as it is counted
_GATHERING_SECONDS = 60.0  # for as many workers as stages to come at first


class Seats:
  """The stages of a pipeline and their holders; used by many threads.

  Args:
    stages: the number of stages.
    log: the orders; stages are brought to its end.
    part: returns the part of an order for a stage.
    most_waiting: the most bytes that a stage may send before they are read.

  Attributes:
    events: what stages say about training.
    banned: workers that may hold no stage.
    replaced: number of times that a stage got another holder.
  """

  def __init__(
    self,
    stages: int,
    log: orders_lib.OrderLog,
    part: Callable[[orders_lib.Order, int], orders_lib.Order],
    most_waiting: int = 1 << 30,
  ):
    self._most_waiting = most_waiting
    self._waiting = collections.Counter[int]()  # bytes of events, by stage
    self._open: dict[channel_lib.Channel, None] = {}  # the oldest first
    self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    self.replaced = 0
    self._log = log
    self._part = part
    self.banned: set[str] = set()
    self._seats = [seat_lib.Seat(s) for s in range(stages)]
    self._coming: dict[int, seat_lib.Seat] = {}  # of workers that prepare
    self._workers: dict[str, seat_lib.Worker] = {}
    self._last = [''] * stages  # holders so far
    self._began = time.monotonic()
    self._changed = threading.Condition()  # of a lock that may be entered again

  def receive(
    self,
    channel: channel_lib.Channel,
    text: dict[str, ct.Json],
    data: bytes,
  ) -> None:
    """Takes a message of a worker; see `channel.Channel.run`.

    Raises:
      ValueError, KeyError, TypeError: it is malformed.
    """
    with self._changed:
      match text.get('did'):
        case 'open':
          self._open[channel] = None
          self._make_room()
        case 'hello':
          has = frozenset(int(s) for s in text['has'])
          if channel.worker in self._workers:  # it came back
            self._leave(self._workers[channel.worker].channel)
          self._workers[channel.worker] = seat_lib.Worker(
            channel, int(text['most']), has
          )
          self._assign()
          self._prepare()
        case 'close':
          self._open.pop(channel, None)
          self._leave(channel)
          self._assign()
        case what:
          seat = self._seats[int(text['stage'])]
          coming = self._coming.get(seat.stage)
          if coming is not None and coming.channel is channel:
            if what == 'at':
              self._note(coming, text)
            elif what == 'failed':
              del self._coming[seat.stage]
          elif seat.channel is not channel:
            return  # it has lost this stage meanwhile
          elif what == 'at':
            self._note(seat, text)
          elif what == 'failed':
            self.drop(seat.stage)
          elif self._waiting[seat.stage] > self._most_waiting:
            self.drop(seat.stage)  # it floods the head
          else:
            self._waiting[seat.stage] += len(data) + _TEXT_BYTES
            self.events.put(Event(seat.stage, str(what), text, data))
      self._changed.notify_all()

  def send(
    self, stage: int, text: dict[str, ct.Json], data: bytes = b''
  ) -> None:
    """Sends a message to a stage; does nothing while nobody holds it."""
    with self._changed:
      self._send(self._seats[stage], text, data)

  def poll(self, seconds: float) -> Event | None:
    """Returns the next event; None if there is none for some seconds."""
    try:
      event = self.events.get(timeout=seconds)
    except queue.Empty:
      return None
    if event.what != LOST:
      with self._changed:
        self._waiting[event.stage] -= len(event.data) + _TEXT_BYTES
    return event

  def worker(self, stage: int) -> str:
    """Returns the holder of a stage; empty without one."""
    return self._seats[stage].worker

  def holds(self, worker: str) -> bool:
    """Returns whether a worker holds a stage, or prepares to."""
    return any(seat.worker == worker for seat in self._all())

  def drop(self, stage: int) -> None:
    """Takes a stage from its holder."""
    with self._changed:
      seat = self._seats[stage]
      if (channel := seat.channel) is None:
        return
      self._vacate(seat)
      channel.send({'do': 'leave', 'stage': stage})
      self._assign(not_again=(stage, channel.worker))
      self._changed.notify_all()

  def ban(self, name: str) -> None:
    """Takes all stages from a worker, which gets none until the ban ends."""
    with self._changed:
      self.banned.add(name)
      if (worker := self._workers.get(name)) is not None:
        self._leave(worker.channel)
        worker.channel.close()
        self._assign()
        self._changed.notify_all()

  def spread(self) -> None:
    """Moves stages from workers with several to those prepared for them."""
    with self._changed:
      for stage, coming in list(self._coming.items()):
        if coming.number == self._log.number:
          self.drop(stage)
      self._prepare()

  def _prepare(self) -> None:
    """Lets workers without a stage prepare for those of workers with several.

    A stage whose state such a worker has comes first, then the one that was
    taken over last, whose moments are the youngest.
    """
    for name, worker in self._workers.items():
      if self._held(worker.channel) or name in self.banned:
        continue
      stay = [s for s in self._seats if s.stage not in self._coming]
      holders = collections.Counter(s.worker for s in stay if s.worker)
      crowded = [s for s in stay if holders[s.worker] > 1]
      crowded.sort(key=lambda s: (s.stage not in worker.has, -s.since))
      if crowded:
        new = seat_lib.Seat(crowded[0].stage, worker.channel)
        self._coming[new.stage] = new
        self._send(new, {'do': 'take', 'stage': new.stage})

  def give(self, order: orders_lib.Order) -> None:
    """Adds an order to the log and sends it to all stages."""
    with self._changed:
      end = self._log.number
      self._log.add(order)
      for seat in self._all():
        if self._log.number <= end:  # stages may have to go back
          seat.reached = -1
        if seat.number > self._log.number:
          self._reset(seat)
        elif seat.number >= 0:
          self._bring(seat)

  def wait(self, stop: Callable[[], bool], until: float | None = None) -> bool:
    """Waits until every stage has applied all orders.

    Args:
      stop: returns True to stop waiting.
      until: the time to stop waiting, by `time.monotonic`.

    Returns:
      Whether every stage has.
    """
    with self._changed:
      while not self.is_ready:
        if stop() or (until is not None and time.monotonic() > until):
          return False
        self._changed.wait(0.2)
        self._assign()
      return True

  @property
  def is_ready(self) -> bool:
    """True if every stage has a holder and has applied all orders."""
    return all(s.number == self._log.number for s in self._seats)

  def states(self) -> list[tuple[str, dict[str, list[str]]]]:
    """Returns each stage's holder and the digests that it says.

    The holder is empty if it has not applied all orders: others said them.
    """
    with self._changed:
      end = self._log.number
      return [(seat.holder_at(end), seat.digests) for seat in self._seats]

  def missing(self) -> set[int]:
    """Returns the stages that are not ready; first gives out free ones."""
    with self._changed:
      self._assign()
      last = self._log.number
      return {seat.stage for seat in self._seats if seat.number != last}

  def lost(self, patience: float) -> set[int]:
    """Returns the stages whose holders were lost, and have not caught up.

    One that takes an order for longer than its patience, in seconds, counts.
    """
    with self._changed:
      return {
        seat.stage
        for seat in self._seats
        if seat.is_lost or seat.is_late(self._log.number, patience)
      }

  def drop_late(self, patience: float) -> None:
    """Takes stages from holders that take an order for too long."""
    with self._changed:
      for seat in self._seats:
        if seat.is_late(self._log.number, patience):
          self.drop(seat.stage)

  def stand_in(
    self, stage: int, digests: dict[str, list[str]], square: float
  ) -> None:
    """Takes what another computed of a stage that is not there.

    Args:
      stage: the stage.
      digests: those of its tensors after the last order.
      square: the sum of squares of its part of the last aggregated delta.
    """
    with self._changed:
      seat = self._seats[stage]
      if seat.number != self._log.number:
        seat.digests, seat.square = digests, square

  def digests(self) -> list[dict[str, list[str]]]:
    """Returns the digests of each stage's tensors."""
    return [seat.digests for seat in self._seats]

  def square(self) -> float:
    """Returns the sum of squares of the last aggregated delta."""
    return sum(seat.square for seat in self._seats)

  def _note(self, seat: seat_lib.Seat, text: dict[str, ct.Json]) -> None:
    """Notes which state a stage has, and sends it what follows."""
    if not self._log.has(int(text['number']), str(text['id'])):
      self._reset(seat)
      return
    seat.note(text, self._log.number)
    self._bring(seat)

  def rebase(self, base: orders_lib.Base) -> None:
    """Lets stages begin from another state where they are not past it."""
    with self._changed:
      self._log.rebase(base)
      for seat in self._all():
        if seat.number >= 0 and not self._log.has(seat.number, seat.id):
          seat.reached = -1
          self._reset(seat)
      self._changed.notify_all()

  def _reset(self, seat: seat_lib.Seat) -> None:
    """Lets a stage begin from the base of the log."""
    seat.number = -1
    base = self._log.base
    text = {'do': 'reset', 'stage': seat.stage, 'number': base.number}
    text |= {'id': base.id, 'places': base.places}
    self._send(seat, text, json.dumps(base.files).encode())

  def _bring(self, seat: seat_lib.Seat) -> None:
    """Sends a stage its next order, if there is one."""
    order = self._log.get(seat.number)
    if seat.number < self._log.number and order is not None:
      text, data = orders_lib.encode(self._part(order, seat.stage))
      text |= {'do': 'order', 'stage': seat.stage, 'after': order.after}
      if seat.number > seat.reached:  # to repeat itself gains it no time
        seat.reached, seat.asked = seat.number, time.monotonic()
      self._send(seat, text, data)

  def _make_room(self) -> None:
    """Closes the oldest channels that hold no stage, if there are many."""
    idle = [c for c in self._open if not self._held(c)]
    for channel in idle[:-MOST_IDLE]:
      self._open.pop(channel)
      channel.close()

  def _leave(self, channel: channel_lib.Channel) -> None:
    known = self._workers.get(channel.worker)
    if known is not None and known.channel is channel:
      del self._workers[channel.worker]
    for stage, coming in list(self._coming.items()):
      if coming.channel is channel:
        del self._coming[stage]
    for seat in self._seats:
      if seat.channel is channel:
        self._vacate(seat)

  def _vacate(self, seat: seat_lib.Seat) -> None:
    seat.channel, seat.number, seat.is_lost = None, -1, True
    self.events.put(Event(seat.stage, LOST, {}, b''))

  def _assign(self, not_again: tuple[int, str] = (-1, '')) -> None:
    """Gives stages without a holder to workers."""
    for seat in self._seats:
      if seat.channel is not None:
        continue
      if (coming := self._coming.pop(seat.stage, None)) is not None:
        if coming.worker not in self.banned:
          self._enter(seat, coming)
          continue
        self._send(coming, {'do': 'leave', 'stage': seat.stage})
      fit = [
        (self._held(w.channel), seat.stage not in w.has, name)
        for name, w in self._workers.items()
        if self._held(w.channel) < (w.most if self._may_share(seat) else 1)
        and name not in self.banned
        and (seat.stage, name) != not_again
      ]
      # A worker that has the state keeps its moments and error feedback.
      fit.sort(key=lambda x: (x[1] and bool(x[0]), x[1], x[0], x[2]))
      if not fit:
        continue
      channel = self._workers[fit[0][2]].channel
      self._enter(seat, seat_lib.Seat(seat.stage, channel))
      self._send(seat, {'do': 'take', 'stage': seat.stage})

  def _enter(self, seat: seat_lib.Seat, new: seat_lib.Seat) -> None:
    """Gives a stage to the holder that a new seat has."""
    if self._last[seat.stage] not in ('', new.worker):
      self.replaced += 1
    self._last[seat.stage] = new.worker
    seat.take(new, self._log.number)

  def _may_share(self, seat: seat_lib.Seat) -> bool:
    """Returns whether a stage may go to a worker that holds another.

    One that nobody has held yet waits for a worker of its own for a while.
    """
    is_new = not self._last[seat.stage]
    return not is_new or time.monotonic() > self._began + _GATHERING_SECONDS

  def _held(self, channel: channel_lib.Channel) -> int:
    return sum(seat.channel is channel for seat in self._all())

  def _all(self) -> list[seat_lib.Seat]:
    return [*self._seats, *self._coming.values()]

  def _send(
    self, seat: seat_lib.Seat, text: dict[str, ct.Json], data: bytes = b''
  ) -> None:
    if seat.channel is not None:
      seat.channel.send(text, data)
