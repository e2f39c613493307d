"""Attacks on a pool: what bad workers can cost the others, and earn.

The pool is the real one; workers, clock and wire are emulated
(experiments/emulated_pool.py). Each scenario has eight honest workers and some
bad ones of one kind. It passes if every round of the pool is delivered whole,
cheaters are paid nothing, no honest worker is caught, the accounts sum to the
earnings to the last rao, and something bad was done.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant.data import dataset
from covenant.node import connect
from covenant.pool import deltas as deltas_lib
from experiments import emulated_pool
from experiments import pool_workers

HONEST = 8
ROUNDS = 6
# Least share of a round's sequences, which a pool without bad workers trains.
LEAST = 1.0
_PAYS_HONEST_WORK = ('timed echo', *pool_workers.FAULTY)


class PoolScenario(NamedTuple):
  """Bad workers of one kind beside the honest ones."""

  kind: str  # a name of `pool_workers.KINDS`
  bad: int = 3

  @property
  def name(self) -> str:
    return f'{self.bad} of {HONEST + self.bad} workers: {self.kind}'


class PoolOutcome(NamedTuple):
  """The result of a scenario."""

  name: str
  leases: int  # of bad workers
  refused: int  # of these, not valid
  sequences: float  # trained share of those assigned
  pay: float  # a bad worker's pay and held pay, relative to an honest one's
  wrong: str  # what does not hold; empty: all does

  @property
  def passed(self) -> bool:
    return not self.wrong


def get_config(base: config_lib.Config) -> config_lib.Config:
  """Returns the config of the scenarios, made from configs/tiny.py."""
  inner = dataclasses.replace(
    base.optim.inner, batch_size=8, learning_rate=0.01
  )
  return dataclasses.replace(
    base,
    miners=2,
    optim=dataclasses.replace(base.optim, inner=inner, inner_steps=16),
    pool=config_lib.Pool(
      subrounds=4, steps=2, batch=1, audits=3, deposit=3, threshold=0.0
    ),
  )


def scenarios() -> list[PoolScenario]:
  """Returns all scenarios."""
  kinds = [kind for kind in pool_workers.KINDS if kind != 'honest']
  return [PoolScenario(kind) for kind in kinds]


class PoolSuite:
  """Runs scenarios one after another, compiled once; see `get_config`."""

  def __init__(self, config: config_lib.Config):
    self._kit = emulated_pool.Kit(config, dataset.load(config))

  def run(self, scenario: PoolScenario, seed: int = 0) -> PoolOutcome:
    kinds = [scenario.kind] * scenario.bad + ['honest'] * HONEST
    crowd = [
      pool_workers.Member(
        connect.local_key(seed, f'worker-{i}'), kind, 1.0 + i % 4
      )
      for i, kind in enumerate(kinds)
    ]
    pool = emulated_pool.Emulation(self._kit, 0, crowd, seed)
    shared = self._kit.shared_model.init()
    assigned = trained = 0
    counts = {True: [0, 0], False: [0, 0]}  # honest: leases, refused
    caught: set[str] = set()
    honest = {m.key.address for m in crowd if m.kind == 'honest'}
    for r in range(ROUNDS):
      work, outcome = pool.round(shared, r, f'{seed}/{r}'.encode())
      shared, _ = self._kit.shared_model.apply_round(shared, {0: work.message})
      trained += outcome.sequences
      assigned += (
        self._kit.config.optim.inner_steps
        * self._kit.config.optim.inner.batch_size
      )
      caught |= outcome.caught
      for worker, verdicts in outcome.verdicts.items():
        for verdict, n in verdicts.items():
          kept = counts[worker in honest]
          kept[0] += n
          kept[1] += n if verdict is not deltas_lib.LeaseVerdict.VALID else 0
    accounts = {
      m.key.address: pool.ledger.account(m.key.address) for m in crowd
    }
    earned = {w: a.held + a.due + a.paid for w, a in accounts.items()}
    paid = {w: a.due + a.paid for w, a in accounts.items()}
    totals = pool.ledger.totals()
    wrong = ''
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(shared.params)):
      wrong = 'the parameters are not finite'
    elif trained < LEAST * assigned:
      wrong = f'{trained} of {assigned} sequences were trained'
    elif found := caught & honest:
      wrong = f'{len(found)} honest workers were caught'
    elif totals.pop('earned') != sum(totals.values()):
      wrong = 'the accounts do not sum to the earnings'
    elif not counts[False][0]:
      wrong = 'nothing bad was done'
    elif scenario.kind not in _PAYS_HONEST_WORK and any(
      paid[w] for w in paid if w not in honest
    ):
      wrong = 'a cheater was paid'
    others = set(earned) - honest
    fair = sum(earned[w] for w in honest) / len(honest)
    bad = sum(earned[w] for w in others) / max(len(others), 1)
    return PoolOutcome(
      scenario.name,
      counts[False][0],
      counts[False][1],
      trained / assigned,
      bad / fair,
      wrong,
    )
