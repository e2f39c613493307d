"""Which sequences of a round are with which worker of a pool.

A uid's assigned sequences are cut up as workers ask for them. All leases have
the same inner steps; how many sequences a step has follows from what a worker
has shown it can do, so that all are back at about the same time. A lease that
is overdue is given again, before anything new.

A round is cut in sub-rounds. In one, all leases begin at the same parameters,
and as many sequences are out as were opened.
"""

import math
from typing import NamedTuple

_PATIENCE = 3.0  # times as long as a worker usually takes
_GRACE = 2.0  # seconds more, for the way there and back
_NEWEST = 0.5  # weight of the newest lease in a worker's rate


class Lease(NamedTuple):
  """Sequences [first, first + steps * batch) of the round's, to train on."""

  number: int  # of the round; never used twice in it
  worker: str
  first: int
  steps: int
  batch: int  # sequences a step
  since: float  # seconds, by the clock of the desk
  until: float

  @property
  def sequences(self) -> int:
    return self.steps * self.batch


class Rates:
  """What each worker can do, in sequences a second; outlives a round.

  A worker compiles its program for each batch it meets: the first lease with
  one says nothing of its speed.
  """

  def __init__(self):
    self._rates: dict[str, float] = {}
    self._compiled: set[tuple[str, int]] = set()  # worker, batch

  def learn(self, lease: Lease, now: float) -> None:
    """Of a lease that came back."""
    if (lease.worker, lease.batch) not in self._compiled:
      self._compiled.add((lease.worker, lease.batch))
      return
    rate = lease.sequences / max(now - lease.since, 1e-6)
    old = self._rates.get(lease.worker, rate)
    self._rates[lease.worker] = old + _NEWEST * (rate - old)

  def slower(self, lease: Lease) -> None:
    """Of a lease that did not: the next one is half as much."""
    if lease.worker in self._rates:
      self._rates[lease.worker] /= 2

  def __getitem__(self, worker: str) -> float | None:
    """None: it has not shown anything."""
    return self._rates.get(worker)

  def seconds(self, worker: str, sequences: int, batch: int) -> float:
    """How long a lease should take; infinite where nobody knows."""
    if (worker, batch) not in self._compiled or worker not in self._rates:
      return math.inf
    return sequences / self._rates[worker]

  def most(self, worker: str) -> int:
    """The largest batch to try: twice that of a lease that came back."""
    return 2 * max((b for w, b in self._compiled if w == worker), default=0)


class Desk:
  """The leases of one round. Time is what callers say it is.

  Args:
    total: sequences of the round.
    steps: inner steps of a lease.
    rates: of the workers; learned from.
  """

  def __init__(self, total: int, steps: int, rates: Rates):
    self._steps = steps
    self._rates = rates
    self._total = total
    self._free = [(0, total)] if total else []  # [first, end), rising
    self._out: dict[int, Lease] = {}
    self._back: dict[int, Lease] = {}
    self._next = 0
    self._open = 0  # sequences that this sub-round may still give away
    self._until = 0.0
    self._active: set[str] = set()  # who asked in this sub-round or the last
    self._asked: set[str] = set()

  @property
  def left(self) -> int:
    """Sequences that are not back, or were refused."""
    out = sum(lease.sequences for lease in self._out.values())
    return out + sum(end - first for first, end in self._free)

  @property
  def complete(self) -> bool:
    """Whether all that was opened is back."""
    return not self._out and (self._open <= 0 or not self._free)

  @property
  def prefix(self) -> int:
    """How many of the first sequences are back without a gap."""
    starts = [first for first, _ in self._free]
    starts += [lease.first for lease in self._out.values()]
    return min(starts, default=self._total)

  def begin(self, quota: int, until: float) -> None:
    """A sub-round: what is out is lost, what was returned is accepted.

    Args:
      quota: sequences to give away.
      until: seconds, when it ends at the latest.
    """
    for lease in [*self._out.values()]:
      self._rates.slower(lease)
      self._cancel(lease)
    self._back.clear()
    self._open, self._until = quota, until
    self._active, self._asked = self._asked, set()

  def take(self, worker: str, now: float, most: int = 1 << 30) -> Lease | None:
    """A lease for a worker; None while there is nothing to do.

    Who has one and asks again has lost it: it was started anew.

    Args:
      worker: who asks.
      now: seconds.
      most: sequences a step, at most.
    """
    self._asked.add(worker)
    for lease in [*self._out.values()]:
      if now > lease.until or lease.worker == worker:
        self._rates.slower(lease)
        self._open += lease.sequences
        self._cancel(lease)
    if not self._free or self._open <= 0 or now >= self._until:
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
    until = min(self._until, now + _PATIENCE * seconds + _GRACE)
    lease = Lease(self._next, worker, first, steps, batch, now, until)
    self._next += 1
    self._out[lease.number] = lease
    self._open -= count
    return lease

  def find(self, number: int, worker: str) -> Lease | None:
    """The lease of a number, if it is out and that worker's."""
    lease = self._out.get(number)
    return lease if lease is not None and lease.worker == worker else None

  def give_back(self, lease: Lease, now: float) -> None:
    """It is done, and what came of it may be merged."""
    del self._out[lease.number]
    self._back[lease.number] = lease
    self._rates.learn(lease, now)

  def refuse(self, lease: Lease) -> None:
    """What came of a lease counts for nothing: it is given again."""
    if self._back.pop(lease.number, None) is None:
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
    """A fair share of what is left, in sequences a step; 1 at first."""
    rate = self._rates[worker]
    if rate is None:
      return 1
    known = [self._rates[w] or 0.0 for w in self._active | self._asked]
    out = sum(lease.sequences for lease in self._out.values())
    seconds = (self._open + out) / sum(known)
    fair = math.floor(rate * seconds / self._steps)
    return max(min(fair, self._rates.most(worker)), 1)
