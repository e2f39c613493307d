"""Yuma consensus: the pay of each uid from the validators' weights.

The steps and defaults are those of Bittensor's `subtensor` pallet
(pallets/subtensor/src/epoch/run_epoch.rs and docs/consensus.md of
opentensor/subtensor), with Yuma 3 and liquid alpha off, as they are by
default. It computes with 32-bit fractions and stores 16-bit ones, this module
with float64; its published numbers are met to about 1e-4.

Axes: a matrix is [voter or holder, subject], over N registered uids.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

U16 = 65535  # a weight that counts as 1
# Subtensor's default is this u16 fraction, a little below a half: exactly half
# of the stake is a majority, whatever the rounding.
KAPPA = 32767 / U16
BONDS_ALPHA = 0.1  # 1 - bonds_moving_average, of 900,000 millionths
ACTIVITY_CUTOFF = 5000  # blocks without new weights after which stake is idle


class Uids(NamedTuple):
  """The registered uids."""

  stake_N: np.ndarray  # float64, in any unit, 0 or more
  validator_N: np.ndarray  # bool: has a validator permit
  registered_N: np.ndarray  # int64: block of the registration
  updated_N: np.ndarray  # int64: block of the last weights, or registered


class Epoch(NamedTuple):
  """The result of an epoch, float64. Shares sum to 0 if no uid is paid."""

  consensus_N: np.ndarray  # the weight that a majority of stake supports
  trust_N: np.ndarray  # part of a validator's weight that was not clipped
  incentive_N: np.ndarray  # shares of the miners' half, sum 1
  dividends_N: np.ndarray  # shares of the validators' half, sum 1
  emission_N: np.ndarray  # shares of all that is paid, sum 1
  bonds_NxN: np.ndarray  # for the next epoch; columns sum to 1


def epoch(
  uids: Uids,
  weights_NxN: np.ndarray,
  bonds_NxN: np.ndarray,
  block: int,
  tempo: int,
) -> Epoch:
  """Computes one epoch of one subnet.

  Args:
    uids: the registered uids.
    weights_NxN: 0 or more, in any unit per row.
    bonds_NxN: the bonds of the last epoch; zeros at first.
    block: the block of the epoch.
    tempo: blocks since the last epoch.
  """
  stake_N = _normalized(uids.stake_N)
  heard_N = uids.validator_N & (uids.updated_N + ACTIVITY_CUTOFF >= block)
  active_N = _normalized(np.where(heard_N, stake_N, 0.0))

  # Weights without a permit, on oneself, or meant for an earlier owner of the
  # uid do not count.
  outdated_NxN = uids.updated_N[:, None] <= uids.registered_N[None, :]
  counted_NxN = uids.validator_N[:, None] & ~outdated_NxN
  counted_NxN &= ~np.eye(len(stake_N), dtype=bool)
  weights_NxN = _normalized(np.where(counted_NxN, weights_NxN, 0.0), axis=1)

  consensus_N = stake_median(weights_NxN, active_N)
  clipped_NxN = np.minimum(weights_NxN, consensus_N[None, :])
  incentive_N = _normalized(active_N @ clipped_NxN)

  # A uid that changed hands since the last epoch carries no bonds over.
  new_N = uids.registered_N >= block - tempo
  bonds_NxN = np.where(new_N[None, :], 0.0, bonds_NxN)
  bonds_NxN = move_bonds(bonds_NxN, clipped_NxN * active_N[:, None])
  dividends_N = _normalized(bonds_NxN @ incentive_N)

  emission_N = _normalized(incentive_N + dividends_N)
  if not emission_N.any():  # no weights that count: stake is paid instead
    emission_N = active_N if active_N.any() else stake_N
  return Epoch(
    consensus_N,
    clipped_NxN.sum(axis=1),
    incentive_N,
    dividends_N,
    emission_N,
    bonds_NxN,
  )


def stake_median(weights_NxN: np.ndarray, stake_N: np.ndarray) -> np.ndarray:
  """Returns the largest weight that KAPPA of the stake gives, per column.

  >>> weights_NxN = np.array([[0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
  >>> stake_median(weights_NxN, np.array([0.3, 0.2, 0.5]))
  array([0.5, 0.5])

  Args:
    weights_NxN: the weights of each validator; rows sum to 1 or 0.
    stake_N: the stake of each validator; sums to 1 or 0.

  Returns:
    float64 [N]; zeros if no validator has stake.
  """
  staked_N = stake_N > 0
  if not staked_N.any():
    return np.zeros(weights_NxN.shape[1])
  stake_V, weights_VxN = stake_N[staked_N], weights_NxN[staked_N]
  order_VxN = np.argsort(weights_VxN, axis=0, kind='stable')
  up_to_VxN = np.cumsum(stake_V[order_VxN], axis=0)
  # The first of the sorted weights with more than 1 - KAPPA of the stake up to
  # and including it.
  first_N = (up_to_VxN <= stake_V.sum() - KAPPA).sum(axis=0)
  chosen_N = np.take_along_axis(order_VxN, first_N[None, :], axis=0)
  return np.take_along_axis(weights_VxN, chosen_N, axis=0)[0]


def move_bonds(bonds_NxN: np.ndarray, bought_NxN: np.ndarray) -> np.ndarray:
  """Returns the moving average of bonds: dividends reward early support.

  Args:
    bonds_NxN: the bonds so far.
    bought_NxN: clipped weight times stake of this epoch.

  Returns:
    float64 [N, N], columns sum to 1 or 0.
  """
  old_NxN = _normalized(bonds_NxN, axis=0)
  new_NxN = _normalized(bought_NxN, axis=0)
  return _normalized(
    BONDS_ALPHA * new_NxN + (1 - BONDS_ALPHA) * old_NxN, axis=0
  )


def quantize(weights: Mapping[int, float]) -> dict[int, int]:
  """Converts weights as Bittensor's SDK does: the largest becomes 65535.

  >>> quantize({4: 1.0, 5: 7.0, 6: 2.0, 7: 0.0})
  {4: 9362, 5: 65535, 6: 18724}

  Returns:
    Integers by uid, without those that round to 0.

  Raises:
    ValueError: a weight is below 0 or not finite, or none is above 0.
  """
  for uid, weight in weights.items():
    if not (math.isfinite(weight) and weight >= 0):
      raise ValueError(
        f'weight of uid {uid}: expected a finite number of 0 or more, got '
        f'{weight}'
      )
  top = max(weights.values(), default=0)
  if top == 0:
    raise ValueError(
      f'weights: expected one above 0, got {len(weights)} without; to say '
      'nothing, set none'
    )
  scaled = {uid: round(w / top * U16) for uid, w in weights.items()}
  return {uid: value for uid, value in scaled.items() if value}


def _normalized(x: np.ndarray, axis: int | None = None) -> np.ndarray:
  """Returns an array divided by its sum, or unchanged if that is 0."""
  total = x.sum(axis=axis, keepdims=True)
  return x / np.where(total > 0, total, 1.0)
