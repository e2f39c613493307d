"""Gains of the units of work of some sequences by an update.

A gain is the loss before minus the loss after. The last axes of arrays are the
stretches of positions of a sequence (S), or its units of work (Q).
"""

import numpy as np

from covenant import typing as ct

PARTS = 16  # stretches of positions of a sequence (S)
UNITS = 4  # units of work in a sequence, its quarters (Q)
OUTLIER = 8.0  # in noises: a gain counts as at most this many
# Nats per token: a loss that overflowed counts as this much worse than before.
_WORST = 100.0


def gains(before: ct.Array, after: ct.Array) -> np.ndarray:
  """Returns before minus after, at least -`_WORST`, overflows included.

  Where the loss before is not finite, nothing can be compared: the gain is 0.
  """
  before = np.asarray(before, np.float64)
  after, known = np.asarray(after, np.float64), np.isfinite(before)
  before = np.where(known, before, 0.0)
  worst = before + _WORST
  after = np.where(np.isfinite(after), np.minimum(after, worst), worst)
  return np.where(known, before - after, 0.0)


def mean(x_N: np.ndarray) -> tuple[float, float]:
  """Returns the mean and its standard error."""
  if x_N.size < 2:
    return float(x_N.mean()), np.inf
  return float(x_N.mean()), float(x_N.std(ddof=1) / np.sqrt(x_N.size))


def split(x_NxS: np.ndarray) -> np.ndarray:
  """Returns the means of the units of each sequence, [N, Q]."""
  return x_NxS.reshape(len(x_NxS), UNITS, -1).mean(2)


def moments(x: np.ndarray, noise: float) -> tuple[float, float]:
  """Returns the mean, and the mean square over the noise, of gains.

  No unit counts as more than `OUTLIER` noises: squares have long tails.
  """
  if not noise:
    return 0.0, 0.0
  x = np.clip(x, -OUTLIER * noise, OUTLIER * noise)
  return float(x.mean()), float((x**2).mean() / noise)


def worse_half(x_NxQ: np.ndarray) -> tuple[float, float]:
  """Returns the mean of the lower half of N * Q values, and its error.

  The error is the jackknife's over N sequences; of fewer than four, all count.

  >>> worse_half(np.array([[1.0, 3.0], [9.0, 9.0], [2.0, 9.0], [4.0, 3.0]]))[0]
  2.25
  """
  size = len(x_NxQ)
  if size < 4:
    return mean(x_NxQ.mean(1))
  left_N = np.array([_lower(np.delete(x_NxQ, i, 0)) for i in range(size)])
  spread = ((left_N - left_N.mean()) ** 2).sum() * (size - 1) / size
  return _lower(x_NxQ), float(np.sqrt(spread))


def _lower(x: np.ndarray) -> float:
  return float(np.sort(x, axis=None)[: x.size // 2].mean())
