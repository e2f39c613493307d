"""The worker of each stage of a pipeline, and the progress of the stage.

Workers come and go. A stage without a holder goes to the worker that has its
state, or else to the one with the fewest stages: a spare, or a neighbor that
takes over the layers beside its own. A worker that comes later prepares to take
them from the neighbor, which holds them until it has caught up.

A holder is told to take a stage, to begin anew, or to take an outer step. It
must answer within `pool.patience`, or it loses the stage once another worker
can take it that was not as slow with its own. It then gets a stage only if
nobody else does, and with twice the time, so that a slow worker has enough in
the end.
"""

import collections
import math
import threading
import time
from collections.abc import Callable

from covenant import typing as ct
from covenant.pool import channel as channel_lib
from covenant.pool import orders as orders_lib
from covenant.pool import seat as seat_lib
from covenant.pool import seat_events
from covenant.pool import seat_orders
from covenant.pool import seat_workers


class Seats:
  """The stages of a pipeline and their holders; used by many threads.

  Args:
    stages: the number of stages.
    log: the orders; stages are brought to its end.
    part: returns the part of an order for a stage.
    longest: the most bytes of a message of a stage.
    patience: seconds that a holder may take for what it is told.
    memory: outer steps after which a worker's failures are forgotten.

  Attributes:
    events: messages of stages about training.
    banned: workers that may hold no stage.
    replaced: number of times that a stage got another holder.
  """

  def __init__(
    self,
    stages: int,
    log: orders_lib.OrderLog,
    part: seat_orders.Part,
    longest: int = 1 << 30,
    patience: float = 60.0,
    memory: int = 100,
  ):
    self._patience = patience
    self._longest = longest
    # Two microbatches per stage and boundary are under way: sent or unread.
    self._most_waiting = (2 * stages + 4) * longest
    self.events = seat_events.Events(self._most_waiting)
    self.replaced = 0
    self._log = log
    self._orders = seat_orders.SeatOrders(log, part)
    self.banned: set[str] = set()
    self._seats = [seat_lib.Seat(s) for s in range(stages)]
    self._coming: dict[int, seat_lib.Seat] = {}  # of workers that prepare
    self._workers = seat_workers.Workers(
      stages, self._held, lambda: log.number, memory
    )
    self._last = [''] * stages  # holders so far
    self._began = time.monotonic()
    self._given = self._began if log.number > log.base.number else math.inf
    self._changed = threading.Condition()  # of a lock that may be entered again

  def open(self, channel: channel_lib.Channel) -> None:
    """Takes a new channel; the oldest without a stage may make room."""
    with self._changed:
      self._workers.open(channel)

  def longest(self, channel: channel_lib.Channel) -> int:
    """Returns the most bytes of its messages; 0 if it holds no stage."""
    return self._longest if self._held(channel) else 0

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
        case 'hello':
          if (old := self._workers.greet(channel, text)) is not None:
            self._leave(old)  # it came back
          self._assign()
          self._prepare()
        case what:
          seat = self._seats[int(text['stage'])]
          coming = self._coming.get(seat.stage)
          if coming is not None and coming.channel is channel:
            if what == 'at':
              self._note(coming, text)
            elif what == 'failed':
              self._give_up(coming)
          elif seat.channel is not channel:
            return  # it has lost this stage meanwhile
          elif what == 'at':
            self._note(seat, text)
          elif what == 'failed':
            self.drop(seat.stage)
          elif what not in seat_events.ANSWERS:
            raise ValueError(f'a stage does not say {str(what)[:20]!r}')
          elif not self.events.put(
            seat_events.Event(seat.stage, what, text, data, channel.worker)
          ):
            self.drop(seat.stage)  # it floods the head
      self._changed.notify_all()

  def close(self, channel: channel_lib.Channel) -> None:
    """Gives the stages of a channel that is closed to others."""
    with self._changed:
      self._workers.close(channel)
      self._dismiss(channel)

  def send(
    self, stage: int, text: dict[str, ct.Json], data: bytes = b''
  ) -> None:
    """Sends a message to a stage; does nothing while nobody holds it.

    A worker for which too much waits has lost its stages, and its channel.
    """
    with self._changed:
      seat = self._seats[stage]
      seat.send(text, data)
      if seat.channel and seat.channel.waiting > self._most_waiting:
        self._workers.fail(seat.worker)
        self._dismiss(seat.channel)

  def poll(self, seconds: float) -> seat_events.Event | None:
    """Returns the next event; None if there is none for some seconds."""
    return self.events.poll(seconds)

  def worker(self, stage: int) -> str:
    """Returns the holder of a stage; empty without one."""
    return self._seats[stage].worker

  def holds(self, worker: str) -> bool:
    """Returns whether a worker holds a stage, or prepares to."""
    return any(seat.worker == worker for seat in self._all())

  def serve(self, worker: str, stage: int, number: int, uid: int) -> bool:
    """Returns whether a worker may have sections now; see `Seat.serve`."""
    with self._changed:
      mine = (s for s in self._all() if (s.stage, s.worker) == (stage, worker))
      return any(seat.serve(number, uid) for seat in mine)

  def drop(
    self, stage: int, if_another: bool = False, holder: str = ''
  ) -> None:
    """Takes a stage from its holder; if one is named, only from that one.

    With `if_another` only if another worker can take the stage.
    """
    with self._changed:
      seat = self._seats[stage]
      worker = seat.worker
      if not worker or holder not in ('', worker):
        return
      if not if_another or self._fittest(seat, worker) is not None:
        self._give_up(seat)
        self._assign(besides=worker)
        self._changed.notify_all()

  def ban(self, name: str) -> None:
    """Takes all stages from a worker, which gets none until the ban ends."""
    with self._changed:
      self.banned.add(name)
      if (worker := self._workers.get(name)) is not None:
        self._dismiss(worker.channel)

  def _dismiss(self, channel: channel_lib.Channel) -> None:
    """Takes all stages from a channel, and closes it."""
    self._leave(channel)
    channel.close()
    self._assign()
    self._changed.notify_all()

  def spread(self) -> None:
    """Moves stages from workers with several to those prepared for them."""
    with self._changed:
      for stage, coming in list(self._coming.items()):
        seat = self._seats[stage]
        if coming.number == self._log.number and seat.channel is not None:
          seat.send({'do': 'leave', 'stage': stage})
          self._vacate(seat)
      self._assign()
      self._prepare()

  def _prepare(self) -> None:
    """Lets workers without a stage prepare for those of workers with several.

    A stage whose state such a worker has comes first, then the one that was
    taken over last, whose moments are the youngest.
    """
    for worker in self._workers.idle(self.banned):
      stay = [s for s in self._seats if not self._is_prepared(s.stage)]
      holders = collections.Counter(s.worker for s in stay if s.worker)
      crowded = [s for s in stay if holders[s.worker] > 1]
      crowded.sort(key=lambda s: (s.stage not in worker.has, -s.since))
      if crowded:
        stage = crowded[0].stage
        if stage in self._coming:
          self._give_up(self._coming[stage])
        self._coming[stage] = self._take(stage, worker)

  def _is_prepared(self, stage: int) -> bool:
    """Returns whether a worker prepares for a stage, and is not late."""
    new = self._coming.get(stage)
    return new is not None and not new.is_late(self._log.number)

  def give(self, order: orders_lib.Order) -> None:
    """Adds an order to the log and sends it to all stages."""
    with self._changed:
      number, state = self._log.number, self._log.id
      self._log.add(order)
      self._given = time.monotonic()
      if self._log.number <= number and self._log.id != state:
        self._orders.go_back(self._all(), order.number)
      for seat in self._all():
        self._orders.bring(seat)

  def wait(self, stop: Callable[[], bool], until: float | None = None) -> bool:
    """Waits for all stages to apply all orders; returns False if stopped.

    Args:
      stop: returns True to stop waiting.
      until: the time to stop waiting, by `time.monotonic`.
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

    The holder is empty if it has not applied all orders; the digests are then
    those of somebody else.
    """
    with self._changed:
      return [(s.holder_at(self._log.number), s.digests) for s in self._seats]

  def missing(self) -> set[int]:
    """Returns the stages that are not ready; first gives out free ones."""
    with self._changed:
      self._assign()
      return {s.stage for s in self._seats if s.number != self._log.number}

  def lost(self) -> set[int]:
    """Returns the stages that the others need not wait for.

    Their holders were lost, and no others have caught up, or they are not there
    by the patience after the last order, or after the start of the head. Before
    there are any orders all stages must come.
    """
    with self._changed:
      is_late = time.monotonic() > self._given + self._patience
      return {
        seat.stage
        for seat in self._seats
        if seat.is_lost or (is_late and seat.number != self._log.number)
      }

  def stand_in(
    self, stage: int, digests: dict[str, list[str]], square: float
  ) -> None:
    """Takes the result of another for a stage that is not there.

    Args:
      stage: the stage.
      digests: those of its tensors after the last order.
      square: the sum of squares of its part of the last aggregated delta.
    """
    with self._changed:
      seat = self._seats[stage]
      if seat.number != self._log.number:
        seat.digests, seat.square = digests, square

  def square(self) -> float:
    """Returns the sum of squares of the last aggregated delta."""
    return sum(seat.square for seat in self._seats)

  def _note(self, seat: seat_lib.Seat, text: dict[str, ct.Json]) -> None:
    """Notes which state a stage has, and sends it what follows."""
    if not self._log.has(int(text['number']), str(text['id'])):
      self._orders.reset(seat)
      return
    seat.note(text, self._log.number)
    self._orders.bring(seat)

  def rebase(self, base: orders_lib.Base) -> None:
    """Sets the state from which stages begin that are not past it."""
    with self._changed:
      self._log.rebase(base)
      self._orders.go_back(self._all(), self._log.number)
      self._changed.notify_all()

  def _leave(self, channel: channel_lib.Channel) -> None:
    self._workers.leave(channel)
    for coming in [c for c in self._coming.values() if c.channel is channel]:
      del self._coming[coming.stage]
    for seat in self._seats:
      if seat.channel is channel:
        self._vacate(seat)

  def _give_up(self, seat: seat_lib.Seat) -> None:
    """Takes a stage from a worker, or from one that prepares for it."""
    self._workers.fail(seat.worker)
    seat.send({'do': 'leave', 'stage': seat.stage})
    if self._coming.get(seat.stage) is seat:
      del self._coming[seat.stage]
    else:
      self._vacate(seat)

  def _vacate(self, seat: seat_lib.Seat) -> None:
    seat.channel, seat.number, seat.is_lost = None, -1, True
    self.events.lose(seat.stage)

  def _assign(self, besides: str = '') -> None:
    """Gives stages without a holder to workers, and those of late ones.

    Args:
      besides: a worker that gets none now.
    """
    for seat in self._seats:
      if seat.worker and not seat.is_late(self._log.number):
        continue
      if (new := self._next(seat, besides or seat.worker)) is not None:
        if seat.worker:
          self._give_up(seat)
        self._enter(seat, new)

  def _next(self, seat: seat_lib.Seat, besides: str) -> seat_lib.Seat | None:
    """Returns the seat of another worker for a stage, if there is one."""
    if (coming := self._coming.pop(seat.stage, None)) is not None:
      if coming.worker not in self.banned:
        return coming
      coming.send({'do': 'leave', 'stage': seat.stage})
    worker = self._fittest(seat, besides)
    return None if worker is None else self._take(seat.stage, worker)

  def _fittest(
    self, seat: seat_lib.Seat, besides: str
  ) -> seat_workers.Worker | None:
    """Returns the worker that a stage goes to, if there is one.

    After a start of the head stages wait for workers that have their state.
    """
    has_gathered = time.monotonic() > self._began + self._patience
    is_early = not (self._last[seat.stage] or has_gathered)
    others = {*self.banned, besides}
    if seat.worker:
      end = self._log.number
      others |= {s.worker for s in self._seats if s.is_as_slow(seat, end)}
    must_have = is_early and self._log.number > 0
    return self._workers.fittest(seat.stage, others, is_early, must_have)

  def _take(self, stage: int, worker: seat_workers.Worker) -> seat_lib.Seat:
    """Lets a worker take a stage; returns its seat."""
    seconds = self._patience * 2 ** self._workers.failures(worker.name)
    seat = seat_lib.Seat(stage, worker.channel, seconds=seconds)
    seat.asked = time.monotonic()
    seat.send({'do': 'take', 'stage': stage})
    return seat

  def _enter(self, seat: seat_lib.Seat, new: seat_lib.Seat) -> None:
    """Gives a stage to the holder that a new seat has."""
    if self._last[seat.stage] not in ('', new.worker):
      self.replaced += 1
    self._last[seat.stage] = new.worker
    seat.take(new, self._log.number)

  def _held(self, channel: channel_lib.Channel) -> int:
    return sum(seat.channel is channel for seat in self._all())

  def _all(self) -> list[seat_lib.Seat]:
    return [*self._seats, *self._coming.values()]
