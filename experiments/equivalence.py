"""Equivalence of two cells: two one-sided t tests on paired seeds (TOST).

The 90 % interval of a mean difference decides at 5 %, as two one-sided tests
do: two cells are equivalent if the interval lies within the margin on both
sides, and not if it lies outside. One is not worse than the other if the upper
end of the interval lies within the margin.

The margin of a loss is a share of the reference's mean loss, 0.5 %, as in the
grid that another project announced before its runs (docs/report.md).
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from experiments import study

MARGIN = 0.005  # of the reference's mean loss
LEVEL = 0.9  # of the interval


class Interval(NamedTuple):
  """An interval of a mean difference, in nats per byte."""

  low: float
  high: float

  def __str__(self) -> str:
    return f'[{self.low:+.4f}, {self.high:+.4f}]'


def interval(found: study.Gap, level: float = LEVEL) -> Interval:
  """Returns Student's interval of a mean; unbounded with a single seed."""
  if found.n < 2:
    return Interval(-math.inf, math.inf)
  quantile = float(stats.t.ppf((1 + level) / 2, found.n - 1))
  return Interval(
    found.mean - quantile * found.error, found.mean + quantile * found.error
  )


def equivalent(found: study.Gap, margin: float) -> str:
  """Decides if a mean difference lies within `margin` of zero."""
  low, high = interval(found)
  if -margin <= low and high <= margin:
    return 'PASS'
  return 'FAIL' if low > margin or high < -margin else 'UNDECIDED'


def not_worse(found: study.Gap, margin: float) -> str:
  """Decides if a mean difference is at most `margin`: the upper test alone."""
  low, high = interval(found)
  if high <= margin:
    return 'PASS'
  return 'FAIL' if low > margin else 'UNDECIDED'


def margin(runs: Sequence[study.Run], reference: str) -> float:
  """Returns the margin in nats per byte for differences to a cell."""
  return MARGIN * statistics.mean(study.losses(runs, reference).values())


def describe(found: study.Gap, reference: float) -> str:
  """Returns a difference as text, with its interval and its share.

  >>> print(describe(study.Gap(0.01, 0.0, 3), 2.0))
  +0.0100 ± 0.0000 (n = 3), 90 % [+0.0100, +0.0100], +0.50 %
  """
  share = found.mean / reference
  return f'{found}, 90 % {interval(found)}, {100 * share:+.2f} %'
