"""Loss spikes: a loss far above those before it."""

import collections
import math

_LEAST = 8  # losses before the rule applies
_FLOOR = 1e-3  # nats per token: a smaller deviation is noise of rounding


class SpikeDetector:
  """Finds losses above the mean of the last ones by many deviations.

  A spike joins the losses that later ones are compared with, so that a loss
  that stays high is reported once, not forever.

  Args:
    sigmas: the standard deviations that make a spike.
    steps: the number of last losses.
  """

  def __init__(self, sigmas: float, steps: int):
    self._sigmas = sigmas
    self._losses = collections.deque[float](maxlen=steps)

  def add(self, loss: float) -> float | None:
    """Adds a loss; returns its z-score if it is a spike, else None."""
    score = None
    if len(self._losses) >= _LEAST:
      mean = math.fsum(self._losses) / len(self._losses)
      variance = math.fsum((x - mean) ** 2 for x in self._losses)
      deviation = max(math.sqrt(variance / len(self._losses)), _FLOOR)
      z = (loss - mean) / deviation
      score = z if z > self._sigmas else None
    self._losses.append(loss)
    return score
