"""Next-token cross-entropy in nats a token, and its gradient.

Shapes: B batch, L length, V vocabulary, L1 = L + 1. A target below zero is
ignored; the end of a text is an ordinary token, and predicting it counts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from covenant import config
from covenant.models import llama


class Loss(NamedTuple):
  """Scalars over the targets of a batch that count.

  total: what to differentiate, nats plus the z-loss. float32
  nats: mean cross-entropy in nats a token; 0 if no target counts. float32
  tokens: how many targets count. int32
  """

  total: jax.Array
  nats: jax.Array
  tokens: jax.Array


def cross_entropy(
  logits_BxLxV: jax.Array, targets_BxL: jax.Array, z_loss: float = 0.0
) -> Loss:
  """Mean cross-entropy, plus `z_loss` * mean(logsumexp(logits)^2).

  The z-loss keeps the logits from drifting: Chowdhery et al, `PaLM
  <https://arxiv.org/abs/2204.02311>`_, 2022, section 5, with 1e-4.
  """
  logits_BxLxV = logits_BxLxV.astype(jnp.float32)
  counts_BxL = targets_BxL >= 0
  index_BxLx1 = jnp.maximum(targets_BxL, 0)[..., None]
  hit_BxL = jnp.take_along_axis(logits_BxLxV, index_BxLx1, axis=-1)[..., 0]
  log_z_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)

  tokens = jnp.sum(counts_BxL, dtype=jnp.int32)
  divisor = jnp.maximum(tokens, 1).astype(jnp.float32)
  nats = jnp.sum(log_z_BxL - hit_BxL, where=counts_BxL) / divisor
  total = nats
  if z_loss:
    square = jnp.sum(jnp.square(log_z_BxL), where=counts_BxL) / divisor
    total = nats + z_loss * square
  return Loss(total, nats, tokens)


def next_token_loss(
  model: config.Model, params: Any, tokens_BxL1: jax.Array
) -> Loss:
  """The loss of predicting tokens 1 to L from tokens 0 to L - 1.

  Negative tokens are padding: never a target, and read as token 0.
  """
  inputs_BxL = jnp.maximum(tokens_BxL1[:, :-1], 0)
  logits_BxLxV = llama.apply(model, params, inputs_BxL)
  return cross_entropy(logits_BxLxV, tokens_BxL1[:, 1:], model.z_loss)


def next_token_gradient(
  model: config.Model,
  params: Any,
  tokens_BxL1: jax.Array,
  microbatch: int | None = None,
) -> tuple[Loss, Any]:
  """`next_token_loss` and the gradient of its total.

  Args:
    model: the architecture.
    params: of `llama.init`.
    tokens_BxL1: negative tokens are padding.
    microbatch: sequences in flight at once, a divisor of B; None is all. The
      result is the same up to rounding. Activations take B / microbatch times
      less memory; on a CPU this is also faster once they fit its caches.

  Returns:
    The loss over the whole batch, and its gradient, like `params`.
  """
  batch = tokens_BxL1.shape[0]
  microbatch = microbatch or batch
  if batch % microbatch:
    raise ValueError(
      f'microbatch must divide the batch of {batch} sequences, got {microbatch}'
    )
  tokens = jnp.sum(tokens_BxL1[:, 1:] >= 0, dtype=jnp.int32)
  divisor = jnp.maximum(tokens, 1).astype(jnp.float32)

  def share(params, tokens_MxL1):
    """This slice's part of the batch's means."""
    loss = next_token_loss(model, params, tokens_MxL1)
    weight = loss.tokens.astype(jnp.float32) / divisor
    return loss.total * weight, loss.nats * weight

  gradient = jax.value_and_grad(share, has_aux=True)
  if microbatch == batch:
    (total, nats), grads = gradient(params, tokens_BxL1)
    return Loss(total, nats, tokens), grads

  def add(sums, tokens_MxL1):
    scalars, grads = gradient(params, tokens_MxL1)
    return jax.tree.map(jnp.add, sums, grads), scalars

  slices = tokens_BxL1.reshape(-1, microbatch, tokens_BxL1.shape[1])
  zeros = jax.tree.map(jnp.zeros_like, params)
  grads, (totals, nats) = jax.lax.scan(add, zeros, slices)
  return Loss(jnp.sum(totals), jnp.sum(nats), tokens), grads
