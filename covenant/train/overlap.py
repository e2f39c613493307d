"""Rounds whose first steps are trained before the last round is exchanged.

The early steps continue from where the miner's own parameters have got to.
Once the shared parameters are there, the difference that the early steps made
is added to them, and the delta of the round is measured against them. So every
step is part of exactly one delta.
"""

import functools
import itertools

import jax

from covenant import typing as ct
from covenant.train import local as local_lib
from covenant.train import placement as placement_lib


def begin(
  replica: local_lib.Replica,
  state: local_lib.MinerState,
  run: local_lib.RoundInProgress,
  steps: int,
) -> tuple[local_lib.RoundInProgress, local_lib.MinerState]:
  """Trains the first steps of a round; returns while they are under way.

  Args:
    replica: the functions of the miner's kind, without overlap.
    state: the miner's own state, with `local`; consumed.
    run: a round without steps.
    steps: the number of steps to train.
  """
  assert state.local is not None
  run = run._replace(origin=state.local)
  local, inner, constants = replica.begin_round(state.local, state, run)
  for tokens_BxL1 in itertools.islice(run.batches, steps):
    local, inner = local_lib.inner_step(
      replica, run, tokens_BxL1, local, inner, constants
    )
  return run, state._replace(inner=inner, local=local)


def wrap(
  replica: local_lib.Replica, placement: placement_lib.Placement
) -> local_lib.Replica:
  """Returns the replica of miners whose rounds `begin` has begun.

  Args:
    replica: the functions of the miner's kind, without overlap.
    placement: the placement of the miner.
  """
  load = placement.host.load

  def begin_round(
    params: ct.Params,
    state: local_lib.MinerState,
    run: local_lib.RoundInProgress,
  ) -> tuple[ct.Params, ct.OptState | None, local_lib.Constants]:
    local = _shift(
      placement.replicate(load(params)),
      placement.replicate(load(run.origin)),
      state.local,
    )
    return local, placement.replicate(load(state.inner)), ()

  return replica._replace(begin_round=begin_round, keep=placement.host.offload)


@functools.partial(jax.jit, donate_argnames='local')
def _shift(params: ct.Params, origin: ct.Params, local: ct.Params) -> ct.Params:
  """Returns `params` moved by the difference of `local` and `origin`."""
  return jax.tree.map(lambda p, o, x: p + (x - o), params, origin, local)
