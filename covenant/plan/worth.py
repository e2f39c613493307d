"""The worth of a token by how an island trains on it, as measured.

A token of a run in which all islands are full replicas with the run's own batch
counts as one. A token whose activations pass compressed between the stages of a
pipeline, or of a step on a larger batch, teaches less: its worth is the number
of plain tokens that lower the loss as much. `python -m experiments.worth`
measures both, at two sizes; a test compares the tables here with its results.

Between the measured points the worth is linear in the logarithms of the
compression ratio and of the size, and beyond the sizes it is that of the
nearest one. A batch counts by the critical batch of the run, the sequences at
which a step costs twice the tokens; it grows with the tokens of a run to the
power of 0.47 (arXiv 2410.21676), which is assumed to hold per peer.
"""

import bisect
import functools
import math
from collections.abc import Sequence

from covenant import config as config_lib
from covenant.models import llama

# (compression ratio, worth) by the parameters of the model, in a network of
# which half are full replicas.
COMPRESSION: dict[int, tuple[tuple[float, float], ...]] = {
  115_008: ((8.0, 0.78), (21.33, 0.65), (64.0, 0.57)),
  51_360: ((8.0, 0.94), (21.33, 0.88), (42.67, 0.83)),
}
# The tokens of the measured runs, and the critical batch of a peer in tokens.
MEASURED_TOKENS = 552_960
CRITICAL_BATCH = 53.0
_GROWTH = 0.47  # power of a run's tokens with which the critical batch grows


def of_compression(config: config_lib.Config, fold: float) -> float:
  """Returns the worth of a token of a pipeline.

  >>> of_compression(config_lib.Config(), 1.0)
  1.0

  Args:
    config: the config of the run.
    fold: the ratio by which activations are compressed; 1 if they are not.
  """
  return _of_compression(llama.num_params(config.model), fold)


@functools.cache
def _of_compression(params: int, fold: float) -> float:
  at = math.log(fold)
  sizes = [
    (
      math.log(size),
      _line([(0.0, 1.0), *((math.log(x), y) for x, y in curve)], at),
    )
    for size, curve in sorted(COMPRESSION.items())
  ]
  low, high = sizes[0][0], sizes[-1][0]
  found = _line(sizes, min(max(math.log(params), low), high))
  return min(max(found, 0.0), 1.0)


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
  """Interpolates between sorted points, and continues the last two."""
  if len(points) == 1:
    return points[0][1]
  i = bisect.bisect_right([at for at, _ in points], x)
  (a, low), (b, high) = points[max(min(i, len(points) - 1), 1) - 1 :][:2]
  return low + (high - low) * (x - a) / (b - a)


def critical_batch(config: config_lib.Config) -> float:
  """Returns the critical batch of one peer, in sequences."""
  optim, peers = config.optim, config.plan.peers
  step = optim.inner.batch_size * config.data.context
  tokens = config.rounds * optim.inner_steps * step * peers
  grown = CRITICAL_BATCH * (tokens / MEASURED_TOKENS) ** _GROWTH
  return grown / config.data.context


def of_batch(config: config_lib.Config, batch: float) -> float:
  """Returns the worth of a token of a step on `batch` sequences.

  A batch no larger than the run's own costs nothing.

  >>> of_batch(config_lib.Config(), 1)
  1.0
  """
  own = config.optim.inner.batch_size
  critical = critical_batch(config)
  return min((own + critical) / (batch + critical), 1.0)
