"""Many machines under one uid: a round of hierarchical SparseLoCo.

Outside, a pool is a miner: it trains on its uid's sequences and sends one
payload. Inside, its round is cut in sub-rounds. In each, workers train short
leases from the pool's parameters; what passes inspection is averaged, and the
parameters move on. What they moved by over the round is the pool's delta.

Nothing here reads a clock, a network or a chain: time is what callers say, and
whoever computes leases again is handed in. It may be called from any thread.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant.data import receipt as receipt_lib
from covenant.pool import leases as leases_lib
from covenant.pool import merge as merge_lib
from covenant.pool import verification
from covenant.wire import payload

Verdict = verification.Verdict


class Job(NamedTuple):
  """All that a worker needs to know of a lease, beside the parameters."""

  round: int
  number: int  # of the lease
  base: bytes  # 16 bytes: which parameters to begin at
  step: int  # of the run, for the learning rate
  steps: int
  tokens_NxL1: np.ndarray  # int32, steps * batch sequences in order

  @property
  def batch(self) -> int:
    return len(self.tokens_NxL1) // self.steps

  def header(self, run: bytes) -> payload.Header:
    """What the payload of the delta must say."""
    receipt = receipt_lib.Receipt()
    receipt.add(self.tokens_NxL1)
    return payload.Header(
      run, self.round, self.number, self.base, receipt.digest(),
      receipt.sequences,
    )  # fmt: skip


Again = Callable[[Any, Job], Any]  # (params, job) -> message
Verify = Callable[[str, bytes, bytes], bool]  # worker, data, signature


def name(data: bytes, salt: bytes) -> bytes:
  """Of parameters: 16 bytes."""
  digest = hashlib.blake2b(data, digest_size=16)
  digest.update(salt)
  return digest.digest()


class Task(NamedTuple):
  """A round of the pool's uid."""

  round: int
  root: bytes  # of the history that led to `params`
  params: Any
  sequences: int  # assigned
  read: Callable[[int, int], np.ndarray]  # first, count -> tokens, int32
  begins: float  # seconds
  ends: float  # when the payload must be made, at the latest


class Outcome(NamedTuple):
  """What a round led to."""

  params: Any
  sequences: int  # the first so many of those assigned were trained on
  loss: float  # the median of what workers say; nan: nothing came
  work: Mapping[str, int]  # verified sequences by worker
  proven: Set[str]  # passed an audit
  caught: Set[str]  # failed one
  verdicts: Mapping[str, Mapping[Verdict, int]]  # by worker, how often


class Pool:
  """What a pool remembers of its workers, and the round under way.

  Args:
    config: of the run; its section `pool`.
    like: the parameters or their shapes.
    run: id of the run.
    merger: of the run.
    inspector: of the run.
    again: computes a lease, as its worker should have.
    verify: whether a worker signed some bytes.
    draw: decides who is audited; unknown to workers.
  """

  def __init__(
    self,
    config: config_lib.Config,
    like: Any,
    run: bytes,
    merger: merge_lib.Merger,
    inspector: verification.Inspector,
    again: Again,
    verify: Verify,
    draw: np.random.Generator,
  ):
    self._config = config
    self._like = like
    self._run = run
    self._merger = merger
    self._inspector = inspector
    self._spec = merge_lib.spec(config, like)
    self._again = again
    self._verify = verify
    self._draw = draw
    self._lock = threading.Lock()
    self._rates = leases_lib.Rates()
    self._round: _Round | None = None

  @property
  def payload_bytes(self) -> int:
    """Of every delta."""
    return self._spec.payload_bytes

  def warm_up(self, params: Any, message: Any) -> None:
    """Compiles what merging takes, before the first round and not in it."""
    lease = leases_lib.Lease(0, '', 0, 1, 1, 0.0, 0.0)
    deltas = [
      verification.Delta(lease._replace(number=n), message, 0.0, 0.0)
      for n in range(2)
    ]
    self._inspector.inspect(deltas, self._draw)
    self._inspector.agrees(message, message)
    self._merger.merge(params, [message], [1])

  def begin(
    self, task: Task, held: Mapping[str, int], banned: Set[str]
  ) -> None:
    """A round of the uid.

    Args:
      task: what it is.
      held: what is at stake for each worker: who has more is audited more.
      banned: who gets no lease.
    """
    desk = leases_lib.Desk(task.sequences, self._config.pool.steps, self._rates)
    with self._lock:
      self._round = _Round(task, desk, task.params, dict(held), set(banned))
      self._open(self._round, task.begins)

  def parameters(self, base: bytes) -> tuple[bytes, bytes] | None:
    """Those of the sub-round under way, as bytes, if `base` names them.

    And the salt with which `base` is their digest, see `name`.
    """
    current = self._round
    if current is None or current.base != base:
      return None
    return current.data, current.salt

  def take(self, worker: str, now: float, most: int = 1 << 30) -> Job | None:
    """A lease for a worker; None while there is none for it.

    Args:
      worker: who asks.
      now: seconds.
      most: sequences a step that it has memory for.
    """
    with self._lock:
      current = self._round
      if current is None or current.merging or worker in current.banned:
        return None
      lease = current.desk.take(worker, now, most)
      if lease is None:
        return None
      job = self._job(current, lease)
      current.jobs[lease.number] = job
    return job

  def deliver(
    self, worker: str, number: int, data: bytes, loss: float, now: float
  ) -> Verdict:
    """What came of a lease; `VALID` is subject to inspection."""
    with self._lock:
      current = self._round
      if current is None or not current.desk.find(number, worker):
        return self._count(current, worker, Verdict.STALE)
      job = current.jobs[number]
    verdict, message = self._decode(job, worker, data)
    with self._lock:
      lease = current.desk.find(number, worker)
      if current is not self._round or current.merging or lease is None:
        return self._count(self._round, worker, Verdict.STALE)
      if verdict is not Verdict.VALID:
        current.desk.refuse(lease)
        return self._count(current, worker, verdict)
      current.desk.give_back(lease, now)
      current.deltas.append(verification.Delta(lease, message, loss, now))
      return verdict

  def advance(self, now: float) -> bool:
    """Ends the sub-round if its time has come; whether the round is over."""
    current = self._round
    assert current is not None
    with self._lock:
      if not current.desk.complete and now < current.until:
        return False
      current.merging = True  # nobody takes, nobody delivers
    self._merge(current)
    with self._lock:
      over = now >= current.task.ends or not current.desk.left
      if not over:
        self._open(current, now)
    return over

  def finish(self) -> Outcome:
    """What the round led to; it is over."""
    with self._lock:
      current, self._round = self._round, None
    assert current is not None
    work = {w: n for w, n in current.work.items() if w not in current.caught}
    losses = [x for x in current.losses if np.isfinite(x)]
    return Outcome(
      current.params,
      max(current.desk.prefix, 1) if current.work else 0,
      float(np.median(losses)) if losses else float('nan'),
      work,
      current.proven - current.caught,
      current.caught,
      current.verdicts,
    )

  def _open(self, current: '_Round', now: float) -> None:
    """The next sub-round."""
    task, desk = current.task, current.desk
    left = max(self._config.pool.subrounds - current.subround, 1)
    current.until = now + (task.ends - now) / left
    desk.begin(-(-desk.left // left), current.until)
    current.subround += 1
    steps, done = self._config.optim.inner_steps, task.sequences - desk.left
    current.step = task.round * steps + done * steps // task.sequences
    current.jobs, current.deltas, current.merging = {}, [], False
    leaves = jax.tree.leaves(jax.device_get(current.params))
    current.data = b''.join(np.asarray(x, '<f4').tobytes() for x in leaves)
    # Of equal parameters those of another round or sub-round are others.
    current.salt = task.root + current.subround.to_bytes(8, 'little')
    current.base = name(current.data, current.salt)

  def _job(self, current: '_Round', lease: leases_lib.Lease) -> Job:
    return Job(
      current.task.round,
      lease.number,
      current.base,
      current.step,
      lease.steps,
      current.task.read(lease.first, lease.sequences),
    )

  def _decode(self, job: Job, worker: str, data: bytes) -> tuple[Verdict, Any]:
    expected = job.header(self._run)
    try:
      found = payload.decode(
        data,
        expected,
        self._like,
        self._spec,
        lambda signed, by: self._verify(worker, signed, by),
      )
    except payload.PayloadError:
      return Verdict.REFUSED, None
    if found.header != expected:
      return Verdict.RECEIPT, None
    return Verdict.VALID, found.message

  def _merge(self, current: '_Round') -> None:
    deltas = sorted(current.deltas, key=lambda d: d.lease.first)
    verdicts = self._inspector.inspect(deltas, self._draw)
    verdicts |= self._audit(current, deltas, verdicts)
    merged = []
    for delta in deltas:
      lease = delta.lease
      if lease.worker in current.caught:
        verdicts[lease.number] = Verdict.FALSE
      verdict = verdicts[lease.number]
      self._count(current, lease.worker, verdict)
      if verdict is not Verdict.VALID:
        current.desk.refuse(lease)
        continue
      merged.append(delta)
      current.losses.append(delta.loss)
      current.work.setdefault(lease.worker, 0)
      current.work[lease.worker] += lease.sequences
    sequences = [d.lease.sequences for d in merged]
    # Each sequence moves the parameters as far, however many came together:
    # what was refused and is made up for later must not count as a whole step.
    usual = current.task.sequences / self._config.pool.subrounds
    current.params = self._merger.merge(
      current.params,
      [d.message for d in merged],
      sequences,
      min(sum(sequences) / usual, _FARTHEST),
    )

  def _audit(
    self,
    current: '_Round',
    deltas: list[verification.Delta],
    verdicts: Mapping[int, Verdict],
  ) -> dict[int, Verdict]:
    """Computes a few leases again, of who has most at stake most often."""
    left = [d for d in deltas if verdicts[d.lease.number] is Verdict.VALID]
    usual = 1 + sum(current.held.values()) / max(len(current.held), 1)
    found = {}
    for _ in range(min(self._config.pool.audits, len(left))):
      stakes_N = np.array([current.held.get(d.lease.worker, 0) for d in left])
      proven_N = np.array([d.lease.worker in current.proven for d in left])
      # Who has just proved itself can still be drawn: nobody is ever safe.
      weights_N = (0.1 + stakes_N / usual) * np.where(proven_N, 0.1, 1.0)
      weights_N /= weights_N.sum()
      chosen = left.pop(
        self._draw.choice(len(left), p=weights_N / sum(weights_N))
      )
      worker, number = chosen.lease.worker, chosen.lease.number
      message = self._again(current.params, current.jobs[number])
      if self._inspector.agrees(chosen.message, message):
        current.proven.add(worker)
      else:
        current.caught.add(worker)
        current.banned.add(worker)
        found[number] = Verdict.FALSE
        left = [d for d in left if d.lease.worker != worker]
      if not left:
        break
    return found

  def _count(
    self, current: '_Round | None', worker: str, verdict: Verdict
  ) -> Verdict:
    if current is not None:
      counts = current.verdicts.setdefault(worker, {})
      counts[verdict] = counts.get(verdict, 0) + 1
      bad = sum(n for v, n in counts.items() if v not in _HARMLESS)
      # It only costs others their time; next round it may try again.
      if bad >= _STRIKES and bad > counts.get(Verdict.VALID, 0):
        current.banned.add(worker)
    return verdict


_FARTHEST = 1.5  # of what a full sub-round moves
_HARMLESS = (Verdict.VALID, Verdict.STALE)
_STRIKES = 3


class _Round:
  """A round under way."""

  def __init__(
    self,
    task: Task,
    desk: leases_lib.Desk,
    params: Any,
    held: dict[str, int],
    banned: set[str],
  ):
    self.task = task
    self.desk = desk
    self.params = params
    self.held = held
    self.banned = banned
    self.subround = 0
    self.until = 0.0
    self.base = b''
    self.step = 0
    self.data = self.salt = b''
    self.merging = False
    self.jobs: dict[int, Job] = {}
    self.deltas: list[verification.Delta] = []
    self.work: dict[str, int] = {}
    self.losses: list[float] = []
    self.proven: set[str] = set()
    self.caught: set[str] = set()
    self.verdicts: dict[str, dict[Verdict, int]] = {}
