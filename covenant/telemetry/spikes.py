"""Loss spikes: a loss far above those before it."""

import collections
import math

from covenant import metrics

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

  def add(self, step: metrics.Step) -> str:
    """Adds a step; returns a text about its loss if that is a spike."""
    if step.loss is None:
      return ''
    score = self.score(step.loss)
    if score is None:
      return ''
    return (
      f'the loss of inner step {step.step} is {step.loss:.4g}, {score:.1f} '
      'standard deviations above those before it'
    )

  def score(self, loss: float) -> float | None:
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
