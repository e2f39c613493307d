"""A pool: many machines train one miner's round (hierarchical SparseLoCo).

To the network a pool is a miner: it trains on its uid's sequences and sends one
payload. Its round is divided into sub-rounds. In each, workers train short
leases from the pool's parameters, and the verified deltas are averaged into new
parameters. The change over the whole round is the pool's delta.

This module reads no clock, network or chain: callers pass the time and the
function that recomputes leases. It is thread-safe.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Set

import jax
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.pool import deltas as deltas_lib
from covenant.pool import leases as leases_lib
from covenant.pool import tasks
from covenant.train import local as local_lib
from covenant.wire import payload

LeaseVerdict = deltas_lib.LeaseVerdict

_FARTHEST = 1.5  # largest step, relative to a full sub-round
_HARMLESS = (LeaseVerdict.VALID, LeaseVerdict.STALE)
_STRIKES = 3  # other verdicts until a worker gets no lease for the round
_GUESTS = 2  # leases of new workers of one network address at a time
_FETCHES = 3  # times that a worker is sent the parameters of a sub-round
_LAST = 0.75  # share of the time that the last sub-round plans with


Job = tasks.Job
PoolTask = tasks.PoolTask
PoolResult = tasks.PoolResult
_PoolRound = tasks.PoolRound

Again = Callable[[ct.Params, Job], ct.Message]  # (params, job) -> message
Verify = Callable[[str, bytes, bytes], bool]  # worker, data, signature


def parameters_id(data: bytes, salt: bytes) -> bytes:
  """Returns the 16-byte id of serialized parameters."""
  digest = hashlib.blake2b(data, digest_size=16)
  digest.update(salt)
  return digest.digest()


class PoolState:
  """The state of a pool: its workers' rates and the current round.

  Args:
    config: the config of the run; an amendment replaces it between rounds.
    abstract_params: the parameters or their shapes.
    run: the id of the run.
    merger: averages deltas.
    inspector: verifies deltas.
    again: recomputes a lease.
    verify: returns True if a worker signed some bytes.
    draw: the random generator that selects audits, unknown to workers.
    trusted: workers that have proved themselves before.
  """

  def __init__(
    self,
    config: config_lib.Config,
    abstract_params: ct.Params,
    run: bytes,
    merger: deltas_lib.Merger,
    inspector: deltas_lib.Inspector,
    again: Again,
    verify: Verify,
    draw: np.random.Generator,
    trusted: Iterable[str] = (),
  ):
    self.config = config
    self._trusted = set(trusted)
    self._recent: set[str] = set()  # workers of the last round
    self._abstract_params = abstract_params
    self._run = run
    self._merger = merger
    self._inspector = inspector
    self._spec = deltas_lib.spec(config, abstract_params)
    self._again = again
    self._verify = verify
    self._draw = draw
    self._lock = threading.Lock()
    self._rates = leases_lib.Rates()
    self._round: _PoolRound | None = None

  @property
  def payload_bytes(self) -> int:
    """The size of every delta's payload."""
    return self._spec.payload_bytes

  def warm_up(self, params: ct.Params, message: ct.Message) -> None:
    """Compiles the programs of merging before the first round."""
    lease = leases_lib.Lease(0, '', 0, 1, 1, 0.0, 0.0)
    deltas = [
      deltas_lib.Delta(lease._replace(number=n), message, 0.0, 0.0)
      for n in range(2)
    ]
    self._inspector.inspect(deltas, self._draw)
    self._inspector.agrees(message, message)
    self._merger.merge(params, [message], [1])

  def begin(
    self, task: PoolTask, held: Mapping[str, int], banned: Set[str]
  ) -> None:
    """Starts a round.

    Args:
      task: the round's training.
      held: the pay held back per worker; more held means more audits.
      banned: workers that receive no lease.
    """
    queue = leases_lib.LeaseQueue(
      task.sequences, self.config.pool.steps, self._rates
    )
    with self._lock:
      self._round = _PoolRound(task, queue, task.params, held, set(banned))
      self._open(self._round, task.begins)

  def parameters(self, base: bytes) -> tuple[bytes, bytes] | None:
    """Returns the parameters of the current sub-round if `base` is their id.

    Returns:
      The serialized parameters and the salt of their id; None otherwise.
    """
    current = self._round
    if current is None or current.base != base:
      return None
    return current.data, current.salt

  def take(
    self, worker: str, now: float, most: int = 1 << 30, origin: str = ''
  ) -> Job | None:
    """Leases sequences to a worker; returns None while there are none.

    A worker that has not proved itself by a valid lease gets a trial, unless
    no worker that has is around.

    Args:
      worker: its address.
      now: the time, seconds.
      most: the largest batch that fits its memory, sequences per step.
      origin: the network address that it asks from; empty if unknown.
    """
    with self._lock:
      current = self._round
      if current is None or current.merging or worker in current.banned:
        return None
      queue = current.queue
      is_new = worker not in self._trusted
      if is_new and origin and self._guests(current, worker, origin) >= _GUESTS:
        return None
      first = self._recent if current.subround == 1 else set()
      around = queue.asking | first
      trial = is_new and bool(self._trusted & around)
      if trial and current.subround > self.config.pool.subrounds:
        return None  # the rest is for known workers
      if trial and worker in {w for w, _ in current.origins.values()}:
        return None  # one in a sub-round, whose verdict comes at its end
      lease = queue.take(worker, now, most, trial)
      self._strike_lost(current)
      if lease is None or worker in current.banned:
        return None
      job = self._job(current, lease)
      current.jobs[lease.number] = job
      current.origins[lease.number] = worker, origin
    return job

  def is_trusted(self, worker: str) -> bool:
    """Returns whether a worker has proved itself by a valid lease."""
    return worker in self._trusted

  def holds(self, worker: str, number: int) -> bool:
    """Returns whether a worker's lease is open, so that its delta is due."""
    with self._lock:
      current = self._round
      if current is None or current.merging:
        return False
      return current.queue.find(number, worker) is not None

  def may_fetch(self, worker: str, base: bytes) -> bool:
    """Returns whether a worker may have the parameters of the sub-round.

    It needs a lease, and is sent them a few times only.
    """
    with self._lock:
      current = self._round
      if current is None or current.base != base:
        return False
      if not current.queue.has(worker):
        return False
      sent = current.fetched.get(worker, 0)
      current.fetched[worker] = sent + 1
      return sent < _FETCHES

  def _guests(self, current: _PoolRound, worker: str, origin: str) -> int:
    """Returns the number of other new workers of an origin with a lease."""
    return sum(
      other != worker
      and other not in self._trusted
      and asked_from == origin
      and current.queue.find(number, other) is not None
      for number, (other, asked_from) in current.origins.items()
    )

  def _strike_lost(self, current: _PoolRound) -> None:
    """Counts leases that did not come back; their workers are new again."""
    for lease in current.queue.take_lost():
      self._trusted.discard(lease.worker)
      self._count(current, lease.worker, LeaseVerdict.LOST)

  def deliver(
    self, worker: str, number: int, data: bytes, loss: float, now: float
  ) -> LeaseVerdict:
    """Accepts the delta of a lease; `VALID` is subject to inspection."""
    with self._lock:
      current = self._round
      if current is None or not current.queue.find(number, worker):
        return self._count(current, worker, LeaseVerdict.STALE)
      job = current.jobs[number]
    verdict, message = self._decode(job, worker, data)
    with self._lock:
      lease = current.queue.find(number, worker)
      if current is not self._round or current.merging or lease is None:
        return self._count(self._round, worker, LeaseVerdict.STALE)
      if verdict is not LeaseVerdict.VALID:
        current.queue.refuse(lease)
        return self._count(current, worker, verdict)
      current.queue.give_back(lease, now)
      current.deltas.append(deltas_lib.Delta(lease, message, loss, now))
      return verdict

  def advance(self, now: float) -> bool:
    """Ends the sub-round if it is due; returns True if the round is over."""
    current = self._round
    assert current is not None
    with self._lock:
      if not current.queue.complete and now < current.until:
        return False
      current.merging = True  # no leases and no deliveries meanwhile
    self._merge(current)
    with self._lock:
      over = now >= current.task.ends or not current.queue.left
      if not over:
        self._open(current, now)
    return over

  def finish(self) -> PoolResult:
    """Ends the round and returns its result."""
    with self._lock:
      current, self._round = self._round, None
    assert current is not None
    work = {w: n for w, n in current.work.items() if w not in current.caught}
    self._recent = set(work)
    losses = [x for x in current.losses if np.isfinite(x)]
    return PoolResult(
      current.params,
      max(current.queue.prefix, 1) if current.work else 0,
      float(np.median(losses)) if losses else float('nan'),
      work,
      current.proven - current.caught,
      current.caught,
      current.verdicts,
    )

  def _open(self, current: _PoolRound, now: float) -> None:
    """Starts the next sub-round."""
    task, queue = current.task, current.queue
    left = max(self.config.pool.subrounds - current.subround, 1)
    share = 1 / left
    if left == 1 and not current.repairing:
      # The rest is for leases of this sub-round that do not come back.
      share, current.repairing = _LAST, True
    current.until = now + (task.ends - now) * share
    queue.begin(-(-queue.left // left), current.until, now)
    self._strike_lost(current)
    current.subround += 1
    current.origins, current.fetched = {}, {}
    steps, done = self.config.optim.inner_steps, task.sequences - queue.left
    current.step = task.round * steps + done * steps // task.sequences
    current.jobs, current.deltas, current.merging = {}, [], False
    leaves = jax.tree.leaves(jax.device_get(current.params))
    current.data = b''.join(np.asarray(x, '<f4').tobytes() for x in leaves)
    # The salt gives equal parameters another id in every sub-round.
    current.salt = task.root + current.subround.to_bytes(8, 'little')
    current.base = parameters_id(current.data, current.salt)

  def _job(self, current: _PoolRound, lease: leases_lib.Lease) -> Job:
    return Job(
      current.task.round,
      lease.number,
      current.base,
      current.step,
      lease.steps,
      current.task.read(lease.first, lease.sequences),
    )

  def _decode(
    self, job: Job, worker: str, data: bytes
  ) -> tuple[LeaseVerdict, ct.Message | None]:
    expected = job.header(self._run)
    try:
      found = payload.decode(
        data,
        expected,
        self._abstract_params,
        self._spec,
        lambda signed, by: self._verify(worker, signed, by),
      )
    except payload.PayloadError:
      return LeaseVerdict.REFUSED, None
    if found.header != expected:
      return LeaseVerdict.RECEIPT, None
    return LeaseVerdict.VALID, found.message

  def _merge(self, current: _PoolRound) -> None:
    deltas = sorted(current.deltas, key=lambda d: d.lease.first)
    verdicts = self._inspector.inspect(deltas, self._draw)
    verdicts |= self._audit(current, deltas, verdicts)
    merged = []
    for delta in deltas:
      lease = delta.lease
      if lease.worker in current.caught:
        verdicts[lease.number] = LeaseVerdict.FALSE
        self._trusted.discard(lease.worker)
      verdict = verdicts[lease.number]
      self._count(current, lease.worker, verdict)
      if verdict is not LeaseVerdict.VALID:
        current.queue.refuse(lease)
        continue
      merged.append(delta)
      current.losses.append(delta.loss)
      current.work.setdefault(lease.worker, 0)
      current.work[lease.worker] += lease.sequences
      self._trusted.add(lease.worker)
    sequences = [d.lease.sequences for d in merged]
    # Each sequence moves the parameters equally far, however many arrive in a
    # sub-round: refused work that is repeated later is not a whole step.
    usual = current.task.sequences / self.config.pool.subrounds
    current.params = self._merger.merge(
      current.params,
      [d.message for d in merged],
      sequences,
      min(sum(sequences) / usual, _FARTHEST),
    )

  def _audit(
    self,
    current: _PoolRound,
    deltas: list[deltas_lib.Delta],
    verdicts: Mapping[int, LeaseVerdict],
  ) -> dict[int, LeaseVerdict]:
    """Recomputes some leases, more often those of workers with held pay."""
    left = [d for d in deltas if verdicts[d.lease.number] is LeaseVerdict.VALID]
    usual = 1 + sum(current.held.values()) / max(len(current.held), 1)
    found = {}
    for _ in range(min(self.config.pool.audits, len(left))):
      stakes_N = np.array([current.held.get(d.lease.worker, 0) for d in left])
      proven_N = np.array([d.lease.worker in current.proven for d in left])
      # A worker for which nothing is held knows that, so it is drawn as well,
      # and one that has just passed an audit can still be.
      weights_N = (0.5 + stakes_N / usual) * np.where(proven_N, 0.1, 1.0)
      weights_N /= weights_N.sum()
      chosen = left.pop(
        self._draw.choice(len(left), p=weights_N / sum(weights_N))
      )
      worker, number = chosen.lease.worker, chosen.lease.number
      try:
        message = self._again(current.params, current.jobs[number])
      except local_lib.DivergedError:
        continue  # so would an honest worker: nothing can be said
      if self._inspector.agrees(chosen.message, message):
        current.proven.add(worker)
      else:
        current.caught.add(worker)
        current.banned.add(worker)
        found[number] = LeaseVerdict.FALSE
        left = [d for d in left if d.lease.worker != worker]
      if not left:
        break
    return found

  def _count(
    self, current: _PoolRound | None, worker: str, verdict: LeaseVerdict
  ) -> LeaseVerdict:
    if current is not None:
      counts = current.verdicts.setdefault(worker, {})
      counts[verdict] = counts.get(verdict, 0) + 1
      bad = sum(n for v, n in counts.items() if v not in _HARMLESS)
      if bad >= _STRIKES and bad > counts.get(LeaseVerdict.VALID, 0):
        current.banned.add(worker)
    return verdict
