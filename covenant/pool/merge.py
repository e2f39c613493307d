"""The deltas of a pool's workers, and how they move its parameters.

A worker has no state that outlives a lease: its optimizer begins anew, and
what compression leaves out is lost, not fed back. So a delta is a function of
the pool's parameters and of the lease alone, anybody can compute it again, and
workers come and go. That is bought with bandwidth: a quarter of all elements
travel, with two bits each, where a pool's own payload has one in 64.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from covenant import config as config_lib
from covenant.optim import aggregate
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.wire import payload

_SENT = 4  # of so many elements one travels


def compression(config: config_lib.Config) -> compression_lib.TopK:
  """What a worker sends of a delta."""
  height, width = config.optim.compression.block
  return compression_lib.TopK(
    k=max(height * width // _SENT, 1),
    block=(height, width),
    quantizer=quantize.SignMagnitude(),
  )


def spec(config: config_lib.Config, like: Any) -> payload.Spec:
  """The layout of the payloads inside a pool."""
  return payload.make_spec(like, compression(config))


class Merger:
  """Compiled once for a run; holds no state."""

  def __init__(self, config: config_lib.Config, like: Any):
    rules = {'like': like, 'compression': compression(config)}
    self._start = jax.jit(functools.partial(aggregate.start, **rules))
    self._add = jax.jit(functools.partial(aggregate.add, **rules))
    self._norms = jax.jit(functools.partial(aggregate.message_norms, **rules))

    def move(params: Any, sums: Any) -> Any:
      delta = aggregate.mean(sums, aggregate.Peers(), **rules, over='all')
      return jax.tree.map(lambda p, d: (p - d).astype(p.dtype), params, delta)

    self._move = jax.jit(move)

  def norms(self, message: Any) -> np.ndarray:
    """L2 norm of each tensor of a message: float32 [P]."""
    return np.asarray(self._norms(message))

  def merge(
    self,
    params: Any,
    messages: Sequence[Any],
    sequences: Sequence[int],
    scale: float = 1.0,
  ) -> Any:
    """The parameters moved by the mean delta, weighted by sequences.

    Each tensor of a message is clipped to the (lower) median norm, as in the
    outer step of the network.

    Args:
      params: at which all deltas begin.
      messages: one a lease, in the order of their sequences: who merges the
        same gets the same bits.
      sequences: that each was trained on.
      scale: of the mean.
    """
    if not messages:
      return params
    weights_R = np.asarray(sequences, np.float32) / np.float32(sum(sequences))
    weights_R *= np.float32(scale)
    # As `aggregate.clip_factors`, but not compiled for every number of leases.
    norms_RxP = np.stack([self.norms(m) for m in messages])
    median_P = np.sort(norms_RxP, axis=0)[(len(messages) - 1) // 2]
    clip_RxP = np.minimum(np.float32(1), median_P / (norms_RxP + 1e-8))
    factors_RxP = clip_RxP.astype(np.float32) * weights_R[:, None]
    sums = self._start()
    for message, factors_P in zip(messages, factors_RxP, strict=True):
      sums = self._add(sums, message, factors_P)
    return self._move(params, sums)
