"""The deltas of a pool's workers, and how they move its parameters.

A worker has no state that outlives a lease: its optimizer begins anew, and
what compression leaves out is lost, not fed back. So a delta is a function of
the pool's parameters and of the lease alone, anybody can compute it again, and
workers come and go. That is bought with bandwidth: a quarter of all elements
travel, with two bits each, where a pool's own payload has one in 64.
"""

from collections.abc import Sequence

import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.optim import compression as compression_lib
from covenant.optim import outer_step
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import weight
from covenant.wire import payload

_SENT = 4  # of so many elements one travels


def compression(config: config_lib.Config) -> compression_lib.TopK:
  """Returns the compressor of a worker's delta."""
  height, width = config.optim.compression.block
  return compression_lib.TopK(
    k=max(height * width // _SENT, 1),
    block=(height, width),
    quantizer=quantize.SignMagnitude(),
  )


def spec(config: config_lib.Config, abstract_params: ct.Params) -> payload.Spec:
  """Returns the layout of the payloads inside a pool."""
  return payload.make_spec(abstract_params, compression(config))


class Merger:
  """Merges deltas into parameters; compiled once for a run, holds no state."""

  def __init__(self, config: config_lib.Config, abstract_params: ct.Params):
    self._outer = reduce.nesterov(1.0)
    self._step = outer_step.OuterStep(
      abstract_params,
      compression(config),
      self._outer,
      mean_over='all',
    )

  def norms(self, message: ct.Message) -> np.ndarray:
    """Returns the L2 norm of each tensor of a message: float32 [P]."""
    return self._step.norms([message])[0]

  def merge(
    self,
    params: ct.Params,
    messages: Sequence[ct.Message],
    sequences: Sequence[int],
    scale: float = 1.0,
  ) -> ct.Params:
    """Returns the parameters moved by the mean delta, weighted by sequences.

    Each tensor of a message is clipped to the (lower) median norm, as in the
    outer step of the network.

    Args:
      params: the parameters at which all deltas begin.
      messages: one per lease, in the order of their sequences: whoever merges
        the same gets the same bits.
      sequences: the number that each was trained on.
      scale: a factor of the mean.
    """
    if not messages:
      return params
    weights_R = np.asarray(sequences, np.float32) / np.float32(sum(sequences))
    weights_R *= np.float32(scale)
    clip_RxP = reduce.clip_factors(self._step.norms(messages))
    factors_RxP = clip_RxP * weights_R[:, None]
    whole_R = np.full(len(messages), weight.WHOLE, np.uint16)
    # The factors hold the weights, so the divisor is that of one message.
    return self._step.apply_sum(
      params,
      self._outer.init(params),
      messages,
      factors_RxP,
      whole_R,
      weight.Totals(),
    ).params
