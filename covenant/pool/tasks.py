"""The task, leases, state and result of a pool in a round."""

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

import numpy as np

from covenant import typing as ct
from covenant.data import assignment
from covenant.pool import deltas as deltas_lib
from covenant.pool import leases as leases_lib
from covenant.wire import payload

LeaseVerdict = deltas_lib.LeaseVerdict


class Job(NamedTuple):
  """The description of a lease that a worker receives."""

  round: int
  number: int  # of the lease within its round
  base: bytes  # 16-byte id of the starting parameters
  step: int  # inner step of the run, for the learning rate
  steps: int  # inner steps of the lease
  tokens_NxL1: np.ndarray  # int32, steps * batch sequences in order

  @property
  def batch(self) -> int:
    return len(self.tokens_NxL1) // self.steps

  def header(self, run: bytes) -> payload.Header:
    """Returns the header that the delta's payload must have."""
    receipt = assignment.Receipt()
    receipt.add(self.tokens_NxL1)
    return payload.Header(
      run, self.round, self.number, self.base, receipt.digest(),
      receipt.sequences,
    )  # fmt: skip


class PoolTask(NamedTuple):
  """The training of one round, as the pool's miner assigns it."""

  round: int
  root: bytes  # history root that led to `params`
  params: ct.Params  # at the start of the round
  sequences: int  # number assigned
  read: Callable[[int, int], np.ndarray]  # first, count -> tokens, int32
  begins: float  # seconds
  ends: float  # deadline of the payload, seconds


class PoolResult(NamedTuple):
  """The result of one round."""

  params: ct.Params  # at the end of the round
  sequences: int  # trained prefix of the assigned sequences
  loss: float  # median of the workers' reports, nats per token; nan if none
  work: Mapping[str, int]  # verified sequences per worker
  proven: Set[str]  # workers that passed an audit
  caught: Set[str]  # workers that failed one
  verdicts: Mapping[str, Mapping[LeaseVerdict, int]]  # counts per worker


@dataclasses.dataclass
class PoolRound:
  """The state of the current round and of its sub-round."""

  task: PoolTask
  queue: leases_lib.LeaseQueue
  params: ct.Params
  held: Mapping[str, int]
  banned: set[str]
  subround: int = 0
  until: float = 0.0
  step: int = 0
  base: bytes = b''
  data: bytes = b''
  salt: bytes = b''
  merging: bool = False
  repairing: bool = False  # the last time before the deadline
  jobs: dict[int, Job] = dataclasses.field(default_factory=dict)
  # (worker, network address) by the number of a lease.
  origins: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)
  fetched: dict[str, int] = dataclasses.field(default_factory=dict)
  deltas: list[deltas_lib.Delta] = dataclasses.field(default_factory=list)
  work: dict[str, int] = dataclasses.field(default_factory=dict)
  losses: list[float] = dataclasses.field(default_factory=list)
  proven: set[str] = dataclasses.field(default_factory=set)
  caught: set[str] = dataclasses.field(default_factory=set)
  verdicts: dict[str, dict[LeaseVerdict, int]] = dataclasses.field(
    default_factory=dict
  )


def describe(
  round_index: int, outcome: PoolResult, assigned: int, earned: float
) -> str:
  """Returns the result of a round for people.

  Args:
    round_index: the round.
    outcome: its result.
    assigned: sequences assigned.
    earned: the pay of all rounds, in TAO.
  """
  leases = sum(
    n
    for counts in outcome.verdicts.values()
    for verdict, n in counts.items()
    if verdict is LeaseVerdict.VALID
  )
  text = (
    f'round {round_index}: {outcome.sequences} of {assigned} sequences, '
    f'{leases} leases of {len(outcome.work)} workers, loss {outcome.loss:.3f}; '
    f'earned {earned:.9f} TAO in all'
  )
  for worker, counts in sorted(outcome.verdicts.items()):
    for verdict, n in counts.items():
      if verdict is not LeaseVerdict.VALID:
        text += f'\n  {worker}: {n} x {verdict.value}'
  return text
