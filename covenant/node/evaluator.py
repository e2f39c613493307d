"""The shared model on held-out text: the same sequences at every evaluation."""

from typing import Any, NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant.data import assignment
from covenant.data import tokens as tokens_lib
from covenant.models import loss as loss_lib


class HeldOut(NamedTuple):
  nats_per_token: float
  nats_per_byte: float
  sequences: int


class Evaluator:
  """Compiled evaluation of one run's model on its held-out split."""

  def __init__(self, config: config_lib.Config, data: tokens_lib.TokenData):
    context = config.data.context
    self._split = data.heldout
    self._context = context
    ids = assignment.evaluation(
      data.heldout.num_sequences(context), config.eval.sequences
    )
    # Whole batches of one shape: one compilation, every sequence weighs alike.
    batch = min(config.optim.inner.batch_size, len(ids))
    self._ids_NxB = ids[: len(ids) // batch * batch].reshape(-1, batch)
    self._nats = jax.jit(
      lambda params, tokens_BxL1: (
        loss_lib.next_token_loss(config.model, params, tokens_BxL1).nats
      )
    )

  def evaluate(self, params: Any) -> HeldOut:
    """Mean held-out loss of `params`."""
    batches = tokens_lib.prefetch(self._split, self._ids_NxB, self._context)
    nats = np.mean(jax.device_get([self._nats(params, b) for b in batches]))
    return HeldOut(
      nats_per_token=float(nats),
      nats_per_byte=float(nats) / self._split.bytes_per_token,
      sequences=self._ids_NxB.size,
    )
