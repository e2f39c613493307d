"""A pool with many workers in one process, in virtual time.

The pool is that of the real one (covenant/pool/pool.py), the leases are
trained by the same program; only the clock, the wire and the workers are this
module's. Some workers are slow, some fail, some cheat; see `KINDS`.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant.chain import keys
from covenant.data import tokens as tokens_lib
from covenant.gauntlet import scores
from covenant.node import connect
from covenant.pool import lease_trainer as lease_trainer_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import merge as merge_lib
from covenant.pool import pool as pool_lib
from covenant.pool import verification
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib

_ROUND_SECONDS = 1000.0
_SLOWEST, _FASTEST = 1.0, 8.0  # sequences a second
_AGAIN_SECONDS = 0.25  # until a worker who got no lease asks again
_INCOME = 10**9 + 7  # rao a round


class Member(NamedTuple):
  """One worker of an emulated pool."""

  key: keys.Key
  kind: str  # of `KINDS`; 'honest'
  speed: float  # sequences a second


@dataclasses.dataclass
class Sent:
  """What a worker does with a lease: what it returns, and how late."""

  data: bytes | None  # None: nothing
  seconds: float  # times those that its speed takes


class Scene(NamedTuple):
  """What those who do not work may use instead."""

  trainer_of_leases: lease_trainer_lib.LeaseTrainer
  like: Any
  draw: np.random.Generator
  seen: dict[str, Any]  # what cheaters keep for later


def _scaled(message: Any, factor: float) -> Any:
  def packet(path: Any, x: Any) -> Any:
    if getattr(path[-1], 'name', '') != 'scales':
      return x
    # The first two scales are levels, which multiply the others.
    y = np.array(x)
    y[:2] = (y[:2].astype(np.float32) * factor).astype(y.dtype)
    return y

  return jax.tree_util.tree_map_with_path(packet, message)


def _flipped(message: Any) -> Any:
  def packet(path: Any, x: Any) -> Any:
    return x ^ 1 if getattr(path[-1], 'name', '') == 'codes' else x

  return jax.tree_util.tree_map_with_path(packet, message)


def _noise(message: Any, draw: np.random.Generator) -> Any:
  def packet(path: Any, x: Any) -> Any:
    if getattr(path[-1], 'name', '') != 'codes':
      return x
    return draw.integers(0, 4, x.shape, np.uint8)

  return jax.tree_util.tree_map_with_path(packet, message)


class _Honest:
  """Does what the lease says."""

  def __init__(self, member: Member, scene: Scene):
    self._member = member
    self._scene = scene

  def work(self, params: Any, job: pool_lib.Job) -> Sent:
    message, loss = self._scene.trainer_of_leases.train(params, job)
    del loss
    return Sent(self._encode(job, self._lie(message, params, job)), 1.0)

  def _lie(self, message: Any, params: Any, job: pool_lib.Job) -> Any:
    return message

  def _encode(self, job: pool_lib.Job, message: Any) -> bytes:
    return self._scene.trainer_of_leases.encode(
      job, message, self._member.key.sign
    )


class _Crashes(_Honest):
  """Takes every other lease to its grave."""

  _turn = 0

  def work(self, params: Any, job: pool_lib.Job) -> Sent:
    self._turn += 1
    if self._turn % 2:
      return Sent(None, 50.0)
    return super().work(params, job)


class _Late(_Honest):
  """Gives everything back ten times too late."""

  def work(self, params: Any, job: pool_lib.Job) -> Sent:
    return Sent(super().work(params, job).data, 10.0)


class _Malformed(_Honest):
  """Some bytes of what it sends are others."""

  def work(self, params: Any, job: pool_lib.Job) -> Sent:
    data = bytearray(super().work(params, job).data or b'')
    data[len(data) // 2] ^= 0xFF
    return Sent(bytes(data), 1.0)


class _Noise(_Honest):
  """Random signs at the right places, of the right size."""

  def _lie(self, message: Any, params: Any, job: pool_lib.Job) -> Any:
    return _noise(message, self._scene.draw)


class _Flipped(_Honest):
  """The other way."""

  def _lie(self, message: Any, params: Any, job: pool_lib.Job) -> Any:
    return _flipped(message)


class _Scaled(_Honest):
  """Twenty times as far."""

  def _lie(self, message: Any, params: Any, job: pool_lib.Job) -> Any:
    return _scaled(message, 20.0)


class _Lazy(_Honest):
  """Trains one step of each lease, and makes it as long as all."""

  def work(self, params: Any, job: pool_lib.Job) -> Sent:
    first = job._replace(steps=1, tokens_NxL1=job.tokens_NxL1[: job.batch])
    message, _ = self._scene.trainer_of_leases.train(params, first)
    return Sent(
      self._encode(job, _scaled(message, float(job.steps))), 1 / job.steps
    )


class _Zeros(_Honest):
  """Sends nothing, well formed."""

  def _lie(self, message: Any, params: Any, job: pool_lib.Job) -> Any:
    return _scaled(message, 0.0)


class _Copier(_Honest):
  """One copier trains once a round, on what it likes; all send that."""

  def work(self, params: Any, job: pool_lib.Job) -> Sent:
    kept = self._scene.seen.get('copy')
    if kept is None or kept[0] != job.round:
      other = job._replace(tokens_NxL1=job.tokens_NxL1[::-1])
      kept = job.round, self._scene.trainer_of_leases.train(params, other)[0]
      self._scene.seen['copy'] = kept
    return Sent(self._encode(job, kept[1]), 0.5)


class _Stale(_Honest):
  """Trains from the first parameters that it ever got."""

  def work(self, params: Any, job: pool_lib.Job) -> Sent:
    old = self._scene.seen.setdefault('stale', params)
    message, _ = self._scene.trainer_of_leases.train(old, job)
    return Sent(self._encode(job, message), 1.0)


KINDS: Mapping[str, Callable[[Member, Scene], _Honest]] = {
  'honest': _Honest,
  'noise': _Noise,
  'copier': _Copier,
  'lazy': _Lazy,
  'zeros': _Zeros,
  'stale': _Stale,
  'scaled': _Scaled,
  'flipped': _Flipped,
  'malformed': _Malformed,
  'crashes': _Crashes,
  'late': _Late,
}
FAULTY = ('crashes', 'late')  # they do no harm, and are paid for what counts
CHEATS = tuple(k for k in KINDS if k not in ('honest', *FAULTY))


def members(count: int, bad: float, seed: int) -> list[Member]:
  """Workers whose speeds spread 8:1, a share of whom is bad, in all kinds."""
  draw = np.random.default_rng(seed)
  chosen = draw.permutation(count)[: round(bad * count)]
  kinds = [*CHEATS, *FAULTY]
  kind = {int(i): kinds[n % len(kinds)] for n, i in enumerate(chosen)}
  spread = np.linspace(0, math.log(_FASTEST / _SLOWEST), count)
  speeds_W = _SLOWEST * np.exp(draw.permutation(spread))
  return [
    Member(
      connect.local_key(seed, f'worker-{i}'),
      kind.get(i, 'honest'),
      float(speeds_W[i]),
    )
    for i in range(count)
  ]


class Kit:
  """What all emulated pools of a run share, compiled once."""

  def __init__(self, config: config_lib.Config, data: tokens_lib.TokenData):
    self.config = config
    self.data = data
    self.shared_model = shared_state_lib.SharedModel(config)
    like = self.shared_model.abstract_params
    self.trainer = trainer_lib.Trainer(config, self.shared_model, data)
    self.trainer_of_leases = lease_trainer_lib.LeaseTrainer(
      config, self.shared_model
    )
    self.merger = merge_lib.Merger(config, like)
    self.inspector = verification.Inspector(config, like, self.merger)
    self.scorer = scores.Scorer(config, self.shared_model.method, like)


class Emulation:
  """One pool and its workers.

  Args:
    kit: of the run.
    uid: of the pool.
    crowd: the workers.
    seed: of what cheaters draw, and of the audits.
  """

  def __init__(self, kit: Kit, uid: int, crowd: list[Member], seed: int = 0):
    self._kit = kit
    self._uid = uid
    scene = Scene(
      kit.trainer_of_leases,
      kit.shared_model.abstract_params,
      np.random.default_rng([seed, 0]),
      {},
    )
    self._workers = {m.key.address: KINDS[m.kind](m, scene) for m in crowd}
    self._speeds = {m.key.address: m.speed for m in crowd}
    self._pool = pool_lib.Pool(
      kit.config,
      kit.shared_model.abstract_params,
      kit.shared_model.run,
      kit.merger,
      kit.inspector,
      lambda params, job: kit.trainer_of_leases.train(params, job)[0],
      keys.verify,
      np.random.default_rng([seed, 1]),
    )
    pool = kit.config.pool
    policy = ledger_lib.Policy(pool.fee, round(pool.threshold * ledger_lib.RAO))
    self.ledger = ledger_lib.Ledger(':memory:', policy)
    self._private: local_lib.MinerState | None = None
    self.now = 0.0

  def round(
    self, shared: shared_state_lib.SharedState, round_index: int, seed: bytes
  ) -> tuple[local_lib.TrainedRound, pool_lib.PoolResult]:
    """One round of the uid: what it sends, and how that came about."""
    kit, config = self._kit, self._kit.config
    task = local_lib.Task(self._uid, round_index, seed, bytes(32))
    split, context = kit.data.train, config.data.context
    ids_N = local_lib.assigned_ids(config, task, split).reshape(-1)
    self._pool.begin(
      pool_lib.PoolTask(
        round_index,
        task.root,
        shared.params,
        len(ids_N),
        lambda first, n: split.read(ids_N[first : first + n], context),
        self.now,
        self.now + _ROUND_SECONDS,
      ),
      self.ledger.held(),
      self.ledger.banned(round_index - config.pool.ban_rounds),
    )
    self._run()
    outcome = self._pool.finish()
    self.ledger.settle(
      round_index,
      _INCOME * (round_index + 1),
      outcome.work,
      outcome.proven,
      outcome.caught,
    )
    if self._private is None:
      fresh = kit.trainer.init(shared.params, round_index)
      self._private = fresh._replace(inner=None)
    work, self._private = kit.trainer.compress_round(
      shared.params,
      self._private,
      outcome.params,
      ids_N[: outcome.sequences],
      outcome.loss,
    )
    return work, outcome

  def _run(self) -> None:
    """Lets the workers do what they do until the round is over."""
    turn = [(self.now, i, address) for i, address in enumerate(self._workers)]
    heapq.heapify(turn)
    under_way: dict[str, tuple[int, bytes | None]] = {}
    params: tuple[bytes, Any] = b'', None
    count = len(turn)
    while True:
      now, _, worker = heapq.heappop(turn)
      self.now = now
      if worker in under_way:
        number, data = under_way.pop(worker)
        if data is not None:
          self._pool.deliver(worker, number, data, 1.0, now)
      if self._pool.advance(now):
        return
      job = self._pool.take(worker, now, self._kit.config.pool.batch)
      wait = _AGAIN_SECONDS
      if job is not None:
        if params[0] != job.base:
          found = self._pool.parameters(job.base)
          assert found is not None
          params = job.base, self._kit.trainer_of_leases.parameters(found[0])
        sent = self._workers[worker].work(params[1], job)
        wait = sent.seconds * len(job.tokens_NxL1) / self._speeds[worker]
        under_way[worker] = job.number, sent.data
      count += 1
      heapq.heappush(turn, (now + wait, count, worker))


class Trial(NamedTuple):
  """A pool with bad workers beside an honest one, of the same size."""

  gains: list[float]  # of the pool's payloads on random data, nats a token
  honest_gains: list[float]  # of the honest pool's, from the same parameters
  errors: list[float]  # standard errors of both gains of a round together
  kinds: dict[str, str]  # of the pool's workers, by address
  paid: dict[str, int]  # rao, of the pool's workers, by address
  held: dict[str, int]
  totals: dict[str, int]  # of the pool's ledger
  refused: dict[str, dict[str, int]]  # by kind: verdicts and how often


def trial(
  kit: Kit, workers: int, bad: float, rounds: int, seed: int = 0
) -> Trial:
  """Runs two pools as the two miners of a network, round after round.

  Both begin each round at the same parameters, on sequences of their own; both
  payloads make the next ones. Each is scored as a validator scores it.

  Args:
    kit: of a run with two miners or more.
    workers: of each pool; their speeds spread 8:1.
    bad: share of the first pool's that are bad, in all of `KINDS`.
    rounds: how many.
    seed: of everything that is drawn.
  """
  config, split = kit.config, kit.data.train
  crowds = members(workers, bad, seed), members(workers, 0.0, seed)
  pools = [Emulation(kit, u, c, seed + u) for u, c in enumerate(crowds)]
  shared = kit.shared_model.init()
  kinds = {m.key.address: m.kind for m in crowds[0]}
  found = Trial([], [], [], kinds, {}, {}, {}, {})
  for r in range(rounds):
    assigned_by = f'{seed}/{r}'.encode()
    later = assigned_by + b'/later'
    works = [pool.round(shared, r, assigned_by) for pool in pools]
    messages = {uid: work.message for uid, (work, _) in enumerate(works)}
    ids_N = scores.random_ids(
      config, 2, r, split.num_sequences(config.data.context), assigned_by, later
    )
    context = config.data.context
    opened = kit.scorer.open(
      shared.params, messages, split.read(ids_N, context)
    )
    scored = [
      kit.scorer.score(
        opened,
        message,
        split.read(
          scores.own_ids(
            config, uid, r, split.num_sequences(context), assigned_by, later
          ),
          context,
        ),
      )
      for uid, message in messages.items()
    ]
    found.gains.append(scored[0].gain)
    found.honest_gains.append(scored[1].gain)
    found.errors.append(math.hypot(*(s.gain_error for s in scored)))
    for worker, counts in works[0][1].verdicts.items():
      sums = found.refused.setdefault(kinds[worker], {})
      for verdict, n in counts.items():
        sums[verdict.name] = sums.get(verdict.name, 0) + n
    shared, _ = kit.shared_model.apply_round(shared, messages)
  ledger = pools[0].ledger
  accounts = {worker: ledger.account(worker) for worker in kinds}
  found.paid.update({w: a.due + a.paid for w, a in accounts.items()})
  found.held.update({w: a.held for w, a in accounts.items()})
  found.totals.update(ledger.totals())
  return found
