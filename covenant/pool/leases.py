"""Leases: the assignment of a round's sequences to the workers of a pool.

The uid's sequences are leased as workers ask. All leases have the same number
of inner steps; the batch follows from a worker's measured rate, so that leases
end at about the same time. An overdue lease is given to another worker first.

Strangers get trial leases: a few sequences from the end, for which nobody
waits, so that a lease that does not come back leaves no gap before the work of
others.

A round is divided into sub-rounds. All leases of a sub-round start from the
same parameters, and a quota limits their sequences.
"""

import math
from typing import NamedTuple

_PATIENCE = 3.0  # deadline, in multiples of the expected time
_GRACE = 2.0  # seconds added to the deadline for transfers
_TRIALS = 8  # one sequence in so many of a sub-round may be out on trial
_SLOWEST = 1e-9  # sequences per second: a rate that can be divided by
_NEWEST = 0.5  # weight of the newest lease in a worker's rate


class Lease(NamedTuple):
  """Sequences [first, first + steps * batch) of a round, leased."""

  number: int  # unique within the round
  worker: str
  first: int
  steps: int
  batch: int  # sequences per step
  since: float  # start, seconds
  until: float  # deadline, seconds
  trial: bool = False  # True if the sub-round does not wait for it

  @property
  def sequences(self) -> int:
    return self.steps * self.batch


class Rates:
  """The measured rates of workers, sequences per second, across rounds.

  A worker compiles a program for each new batch, so its first lease with a
  batch is not measured.
  """

  def __init__(self):
    self._rates: dict[str, float] = {}
    self._compiled: set[tuple[str, int]] = set()  # worker, batch

  def learn(self, lease: Lease, now: float) -> None:
    """Updates the rate of a worker that returned a lease."""
    if (lease.worker, lease.batch) not in self._compiled:
      self._compiled.add((lease.worker, lease.batch))
      return
    rate = lease.sequences / max(now - lease.since, 1e-6)
    old = self._rates.get(lease.worker, rate)
    self._rates[lease.worker] = old + _NEWEST * (rate - old)

  def slower(self, lease: Lease) -> None:
    """Halves the rate of a worker that missed a lease."""
    if (rate := self._rates.get(lease.worker)) is not None:
      self._rates[lease.worker] = max(rate / 2, _SLOWEST)

  def __getitem__(self, worker: str) -> float | None:
    """Returns the rate of a worker; None before it is measured."""
    return self._rates.get(worker)

  def seconds(self, worker: str, sequences: int, batch: int) -> float:
    """Returns the expected seconds of a lease; infinite if unknown."""
    if (worker, batch) not in self._compiled or worker not in self._rates:
      return math.inf
    return sequences / self._rates[worker]

  def most(self, worker: str) -> int:
    """Returns the largest batch to try: twice the largest returned one."""
    return 2 * max((b for w, b in self._compiled if w == worker), default=0)


class LeaseQueue:
  """The leases of one round; callers pass the time.

  Args:
    total: the sequences of the round.
    steps: the inner steps of a lease.
    rates: the workers' rates, updated from leases.
  """

  def __init__(self, total: int, steps: int, rates: Rates):
    self._steps = steps
    self._rates = rates
    self._total = total
    self._free = [(0, total)] if total else []  # ascending [first, end)
    self._out: dict[int, Lease] = {}
    self._back: dict[int, Lease] = {}
    self._next = 0
    self._open = 0  # sequences that this sub-round may still lease
    self._until = 0.0
    self._trials = 0  # sequences of trials that may be out at a time
    self._active: set[str] = set()  # workers that asked in the last sub-round
    self._asked: set[str] = set()
    self._lost: list[Lease] = []

  @property
  def left(self) -> int:
    """Sequences without an accepted delta."""
    out = sum(lease.sequences for lease in self._out.values())
    return out + sum(end - first for first, end in self._free)

  @property
  def complete(self) -> bool:
    """True if every sequence of the quota has been returned.

    Trials are not waited for.
    """
    waited = any(not lease.trial for lease in self._out.values())
    return not waited and (self._open <= 0 or not self._free)

  @property
  def asking(self) -> set[str]:
    """The workers that asked in this sub-round or the one before."""
    return self._active | self._asked

  def take_lost(self) -> list[Lease]:
    """Returns the leases that did not come back since the last call."""
    lost, self._lost = self._lost, []
    return lost

  @property
  def prefix(self) -> int:
    """The number of leading sequences that are returned without a gap."""
    starts = [first for first, _ in self._free]
    starts += [lease.first for lease in self._out.values()]
    return min(starts, default=self._total)

  def begin(self, quota: int, until: float, now: float = math.inf) -> None:
    """Starts a sub-round: drops open leases and accepts returned ones.

    Args:
      quota: the sequences to lease.
      until: the deadline of the sub-round, seconds.
      now: the time, seconds. Trials that had more time left are not lost.
    """
    for lease in [*self._out.values()]:
      if lease.trial and now < lease.until:
        self._cancel(lease)
      else:
        self._lose(lease)
    self._back.clear()
    self._open, self._until = quota, until
    self._trials = max(quota // _TRIALS, 2 * self._steps)
    self._active, self._asked = self._asked, set()

  def take(
    self, worker: str, now: float, most: int = 1 << 30, trial: bool = False
  ) -> Lease | None:
    """Leases sequences to a worker; returns None while there are none.

    A worker that asks again has restarted, and its open lease is lost.

    Args:
      worker: its address.
      now: the time, seconds.
      most: the largest batch, sequences per step.
      trial: leases a few sequences for which nobody waits.
    """
    self._asked.add(worker)
    for lease in [*self._out.values()]:
      if now > lease.until or lease.worker == worker:
        if not lease.trial:
          self._open += lease.sequences
        self._lose(lease)
    if not self._free or now >= self._until:
      return None
    if trial:
      return self._take_trial(worker, now)
    if self._open <= 0:
      return None
    first, end = self._free[0]
    available = min(end - first, self._open)
    steps = min(self._steps, available)
    batch = min(self._batch(worker), available // steps, max(most, 1))
    batch = 1 << (batch.bit_length() - 1)
    count = steps * batch
    self._free[0] = first + count, end
    if first + count == end:
      self._free.pop(0)
    seconds = self._rates.seconds(worker, count, batch)
    # A lease of unknown duration leaves time for another worker's.
    patience = min(_PATIENCE * seconds + _GRACE, (self._until - now) / 2)
    if seconds < math.inf:
      patience = _PATIENCE * seconds + _GRACE
    until = min(self._until, now + patience)
    lease = Lease(self._next, worker, first, steps, batch, now, until)
    self._next += 1
    self._out[lease.number] = lease
    self._open -= count
    return lease

  def _take_trial(self, worker: str, now: float) -> Lease | None:
    """Leases the last free sequences, one per step."""
    first, end = self._free[-1]
    steps = min(self._steps, end - first)
    out = sum(lease.sequences for lease in self._out.values() if lease.trial)
    if out + steps > self._trials:
      return None
    self._free[-1] = first, end - steps
    if first == end - steps:
      self._free.pop()
    until = now + (self._until - now) / 2
    lease = Lease(self._next, worker, end - steps, steps, 1, now, until, True)
    self._next += 1
    self._out[lease.number] = lease
    return lease

  def _lose(self, lease: Lease) -> None:
    self._rates.slower(lease)
    self._lost.append(lease)
    self._cancel(lease)

  def find(self, number: int, worker: str) -> Lease | None:
    """Returns the open lease of a number if it is that worker's."""
    lease = self._out.get(number)
    return lease if lease is not None and lease.worker == worker else None

  def has(self, worker: str) -> bool:
    """Returns whether a worker has an open lease."""
    return any(lease.worker == worker for lease in self._out.values())

  def give_back(self, lease: Lease, now: float) -> None:
    """Marks a lease as returned."""
    del self._out[lease.number]
    self._back[lease.number] = lease
    self._rates.learn(lease, now)

  def refuse(self, lease: Lease) -> None:
    """Discards the delta of a lease, whose sequences are leased again."""
    if self._back.pop(lease.number, None) is None and not lease.trial:
      self._open += lease.sequences
    self._cancel(lease)

  def _cancel(self, lease: Lease) -> None:
    self._out.pop(lease.number, None)
    spans = sorted([*self._free, (lease.first, lease.first + lease.sequences)])
    merged = spans[:1]
    for first, end in spans[1:]:
      if first == merged[-1][1]:
        merged[-1] = merged[-1][0], end
      else:
        merged.append((first, end))
    self._free = merged

  def _batch(self, worker: str) -> int:
    """Returns a worker's fair share in sequences per step; 1 at first."""
    rate = self._rates[worker]
    if rate is None:
      return 1
    known = [self._rates[w] or 0.0 for w in self._active | self._asked]
    out = sum(x.sequences for x in self._out.values() if not x.trial)
    seconds = (self._open + out) / sum(known)
    fair = math.floor(rate * seconds / self._steps)
    return max(min(fair, self._rates.most(worker)), 1)
