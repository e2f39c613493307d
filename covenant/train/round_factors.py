"""The factors by which the messages of a round move the shared state.

They need the norms of all tensors of all messages, but no parameters: every
stage of a pipeline moves its own tensors by them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covenant.optim import exact
from covenant.optim import reduce
from covenant.optim import weight
from covenant.train import step_bound


class RoundFactors(NamedTuple):
  """The factors of a round."""

  factors_RxP: np.ndarray  # of each tensor of each message
  parts_R: np.ndarray  # the weights of the messages, see `reduce.add`
  totals: weight.Totals
  steps: np.ndarray  # sizes of the last rounds with this one, newest first


def compute(
  norms_RxP: np.ndarray,
  weights: Sequence[weight.Weight],
  clip: str,
  steps: np.ndarray,
  is_bounded: bool,
) -> RoundFactors:
  """Returns the factors of a round with at least one message.

  Args:
    norms_RxP: the norm of each tensor of each message, in the order of uids.
    weights: the weights of the messages.
    clip: see `reduce.clip_factors`.
    steps: the sizes of the last rounds, newest first.
    is_bounded: whether a step may not be far longer than those before.
  """
  parts_R, sizes_R = weight.columns(weights)
  clips_RxP = reduce.clip_factors(norms_RxP, clip, sizes_R)
  size = step_bound.size(norms_RxP, clips_RxP, parts_R)
  factors_RxP = exact.product(clips_RxP, weight.wholes(parts_R)[:, None])
  bound = step_bound.factor(size, steps)
  if bound < 1 and is_bounded:
    factors_RxP = exact.product(factors_RxP, np.full((1, 1), bound))
    size = exact.product(np.full(1, bound), np.full(1, size))[0]
  return RoundFactors(
    factors_RxP,
    parts_R,
    weight.totals(parts_R),
    step_bound.remember(steps, size),
  )
