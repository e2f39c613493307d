"""A pool with many workers in one process, in virtual time.

The pool (covenant/pool/pool.py) and the program that trains leases are the real
ones; only the clock, the wire and the workers are emulated. Some workers are
slow, some fail, some cheat (experiments/pool_workers.py).
"""

import heapq
import math
from typing import Any, NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant.chain import keys
from covenant.data import tokens as tokens_lib
from covenant.gauntlet import scores
from covenant.pool import deltas as deltas_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import pool as pool_lib
from covenant.pool import worker as worker_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from experiments import pool_workers

_ROUND_SECONDS = 1000.0
_AGAIN_SECONDS = 0.25  # between requests of a worker without a lease
_INCOME = 10**9 + 7  # rao per round


class Kit:
  """The compiled programs that all emulated pools of a run share."""

  def __init__(self, config: config_lib.Config, data: tokens_lib.TokenData):
    self.config = config
    self.data = data
    self.shared_model = shared_state_lib.SharedModel(config)
    like = self.shared_model.abstract_params
    self.trainer = trainer_lib.Trainer(config, self.shared_model, data)
    self.trainer_of_leases = worker_lib.LeaseTrainer(config, self.shared_model)
    self.merger = deltas_lib.Merger(config, like)
    self.inspector = deltas_lib.Inspector(config, like, self.merger)
    self.scorer = scores.Scorer(config, self.shared_model.method, like)


class Emulation:
  """One pool and its workers.

  Args:
    kit: the programs of the run.
    uid: the uid of the pool.
    crowd: the workers.
    seed: seed of the cheaters and of the audits.
  """

  def __init__(
    self, kit: Kit, uid: int, crowd: list[pool_workers.Member], seed: int = 0
  ):
    self._kit = kit
    self._uid = uid
    draw = np.random.default_rng([seed, 0])
    scene = pool_workers.Scene(
      kit.trainer_of_leases, draw, {}, lambda w: self.ledger.account(w).held
    )
    self._workers = {
      m.key.address: pool_workers.Worker(m, scene) for m in crowd
    }
    self._speeds = {m.key.address: m.speed for m in crowd}
    self._pool = pool_lib.PoolState(
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
    policy = ledger_lib.PaymentPolicy(
      pool.fee, round(pool.threshold * ledger_lib.RAO), pool.deposit
    )
    self.ledger = ledger_lib.Ledger(':memory:', policy)
    self._private: local_lib.MinerState | None = None
    self.now = 0.0

  def round(
    self, shared: shared_state_lib.SharedState, round_index: int, seed: bytes
  ) -> tuple[local_lib.TrainedRound, pool_lib.PoolResult]:
    """Does one round; returns the pool's message and how it was made."""
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
    """Lets the workers work until the round is over."""
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
      name = self._workers[worker].name
      batch = self._kit.config.pool.batch
      job = self._pool.take(name, now, batch, origin=worker)
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

  gains: list[float]  # bad pool's, per round, nats per token of random data
  honest_gains: list[float]  # honest pool's, from the same parameters
  errors: list[float]  # standard error of the difference of both, per round
  kinds: dict[str, str]  # worker address -> kind, in the bad pool
  paid: dict[str, int]  # worker address -> rao due and paid
  held: dict[str, int]  # worker address -> rao held back
  totals: dict[str, int]  # sums of the bad pool's ledger, rao
  refused: dict[str, dict[str, int]]  # kind -> verdict -> number of leases


def trial(
  kit: Kit, workers: int, bad: float, rounds: int, seed: int = 0
) -> Trial:
  """Runs two pools as the two miners of a network, round after round.

  Both begin each round at the same parameters, on sequences of their own, and
  both payloads make the next parameters. A validator's scorer scores each.

  Args:
    kit: the programs of a run with two miners or more.
    workers: the number of workers per pool; their speeds spread 8:1.
    bad: the share of bad workers in the first pool, in all kinds.
    rounds: the number of rounds.
    seed: the seed of all draws.
  """
  config, split = kit.config, kit.data.train
  crowds = [pool_workers.members(workers, b, seed) for b in (bad, 0.0)]
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
      shared.params, shared.params, messages, split.read(ids_N, context)
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
