"""Next-token cross-entropy in nats per token, and its gradient.

A target below zero is ignored; the end of a text is an ordinary target.

Shapes: B batch, L length, C positions of a chunk, D width, V vocabulary, L1 =
L + 1; all of the shard where an array is sharded.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from covenant import config
from covenant import typing as ct
from covenant.models import llama
from covenant.models import sharding

Hidden = Callable[
  [config.Model, ct.Params, jax.Array], tuple[jax.Array, jax.Array]
]


class Loss(NamedTuple):
  """Scalars over the targets of a batch that are not ignored.

  Attributes:
    total: the objective, nats plus the z-loss; float32.
    nats: the mean cross-entropy in nats per token, 0 without targets; float32.
    tokens: the number of targets; int32.
  """

  total: jax.Array
  nats: jax.Array
  tokens: jax.Array


def cross_entropy(
  logits_BxLxV: jax.Array, targets_BxL: jax.Array, z_loss: float = 0.0
) -> Loss:
  """Computes mean cross-entropy plus `z_loss` * mean(logsumexp(logits)^2).

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
  model: config.Model,
  params: ct.Params,
  tokens_BxL1: jax.Array,
  hidden: Hidden = llama.hidden,
) -> Loss:
  """Computes the loss of predicting tokens 1 to L from tokens 0 to L - 1.

  Inside `jax.shard_map` over a miner's mesh it is that of this device's
  sequences.

  Args:
    model: the architecture.
    params: parameters of `llama.init`.
    tokens_BxL1: tokens; negative ones are no targets. They are padding, or in a
      packed model the first tokens of documents (`llama.ids`).
    hidden: another implementation of `llama.hidden`.
  """
  inputs_BxL = llama.inputs(model, tokens_BxL1)
  x_BxLxD, w_DxV = hidden(model, params, inputs_BxL)
  return _of_product(model, x_BxLxD, w_DxV, tokens_BxL1[:, 1:])


def _of_product(
  model: config.Model,
  x_BxLxD: jax.Array,
  w_DxV: jax.Array,
  targets_BxL: jax.Array,
) -> Loss:
  """Computes the loss of the logits x @ w."""
  chunk = model.loss_chunk or x_BxLxD.shape[1]
  if sharding.is_cut('vocab') or chunk < x_BxLxD.shape[1]:
    return _chunked(x_BxLxD, w_DxV, targets_BxL, chunk, model.z_loss)
  logits_BxLxV = llama.logits(model, x_BxLxD, w_DxV)
  return cross_entropy(logits_BxLxV, targets_BxL, model.z_loss)


def _chunked(
  x_BxLxD: jax.Array,
  w_DxV: jax.Array,
  targets_BxL: jax.Array,
  chunk: int,
  z_loss: float,
) -> Loss:
  """Computes `cross_entropy` of the logits x @ w, chunk by chunk of positions.

  Neither pass holds more logits than those of one chunk. Each device holds
  those of its shard of w, for all sequences along 'fsdp'.
  """

  @jax.checkpoint
  def sums(x_BxCxD, targets_BxC):
    """Sums nats, squares of log z and ones over the targets."""
    nats_BxC, log_z_BxC = _nats(x_BxCxD, w_DxV, targets_BxC)
    counts_BxC = targets_BxC >= 0
    return (
      jnp.sum(nats_BxC, where=counts_BxC),
      jnp.sum(jnp.square(log_z_BxC), where=counts_BxC),
      jnp.sum(counts_BxC, dtype=jnp.int32),
    )

  _, each = jax.lax.scan(
    lambda _, slices: (None, sums(*slices)),
    None,
    _chunks(x_BxLxD, targets_BxL, chunk),
  )
  nats, squares, tokens = jax.tree.map(jnp.sum, each)
  divisor = jnp.maximum(tokens, 1).astype(jnp.float32)
  nats = nats / divisor
  total = nats + z_loss * (squares / divisor) if z_loss else nats
  return Loss(total, nats, tokens)


def _chunks(
  x_BxLxD: jax.Array, targets_BxL: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Returns both with a leading axis of chunks of positions, padded."""
  padding = -x_BxLxD.shape[1] % chunk
  x_BxLxD = jnp.pad(x_BxLxD, ((0, 0), (0, padding), (0, 0)))
  targets_BxL = jnp.pad(targets_BxL, ((0, 0), (0, padding)), constant_values=-1)

  def chunks(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return chunks(x_BxLxD), chunks(targets_BxL)


def _nats(
  x_BxCxD: jax.Array, w_DxV: jax.Array, targets_BxC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the nats of each target, and the log of the sum of exponentials."""
  along = sharding.axes('fsdp')
  x_BxCxD = sharding.vary(sharding.gather(x_BxCxD, along, 0), 'vocab')
  logits_BxCxV = llama.product(x_BxCxD, w_DxV, dtype=jnp.float32)
  top_BxC = sharding.largest(
    jnp.max(jax.lax.stop_gradient(logits_BxCxV), axis=-1), 'vocab'
  )
  logits_BxCxV = logits_BxCxV - top_BxC[..., None]
  token_V = sharding.index('vocab') * w_DxV.shape[1] + jnp.arange(
    w_DxV.shape[1]
  )
  is_target_BxCxV = (
    token_V[None, None] == sharding.gather(targets_BxC, along, 0)[..., None]
  )
  # Parts of the sums of all sequences along 'fsdp', then sums of its own.
  z_BxC = jnp.sum(jnp.exp(logits_BxCxV), axis=-1)
  hit_BxC = jnp.sum(logits_BxCxV, axis=-1, where=is_target_BxCxV)
  log_z_BxC = jnp.log(
    sharding.total(sharding.scatter(z_BxC, along, 0), 'tensor')
  )
  hit_BxC = sharding.total(sharding.scatter(hit_BxC, along, 0), 'tensor')
  nats_BxC = log_z_BxC - hit_BxC
  return nats_BxC, log_z_BxC + sharding.own(top_BxC, along, 0)


def sequence_nats(
  model: config.Model,
  params: ct.Params,
  tokens_BxL1: jax.Array,
  parts: int = 1,
) -> jax.Array:
  """Computes the nats of the parts of each sequence, float32 [B, parts].

  Each is the sum over the targets of a part, relative to the mean number of
  targets in a part of this sequence. The mean over the parts is then the nats
  per token of the sequence. No more logits are held than those of a chunk.
  Inside `jax.shard_map` over a mesh they are those of this device's sequences.

  Args:
    model: the architecture.
    params: parameters of `llama.init`.
    tokens_BxL1: as in `next_token_loss`.
    parts: number of equal stretches of positions.
  """
  x_BxLxD, w_DxV = llama.hidden(model, params, llama.inputs(model, tokens_BxL1))
  targets_BxL = tokens_BxL1[:, 1:]
  length = targets_BxL.shape[1]
  chunk = model.loss_chunk or length
  if not sharding.is_cut('vocab') and chunk >= length:
    logits_BxLxV = llama.logits(model, x_BxLxD, w_DxV).astype(jnp.float32)
    index_BxLx1 = jnp.maximum(targets_BxL, 0)[..., None]
    hit_BxLx1 = jnp.take_along_axis(logits_BxLxV, index_BxLx1, axis=-1)
    nats_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1) - hit_BxLx1[..., 0]
  else:
    _, nats_NxBxC = jax.lax.scan(
      lambda _, slices: (None, _nats(slices[0], w_DxV, slices[1])[0]),
      None,
      _chunks(x_BxLxD, targets_BxL, chunk),
    )
    nats_BxL = jnp.moveaxis(nats_NxBxC, 0, 1).reshape(len(targets_BxL), -1)
    nats_BxL = nats_BxL[:, :length]
  counts_BxL = targets_BxL >= 0
  nats_BxL = jnp.where(counts_BxL, nats_BxL, 0.0)
  nats_BxL = jnp.pad(nats_BxL, ((0, 0), (0, -length % parts)))
  nats_BxPxK = nats_BxL.reshape(len(targets_BxL), parts, -1)
  tokens_Bx1 = jnp.sum(counts_BxL, axis=1, dtype=jnp.int32)[:, None]
  mean_Bx1 = jnp.maximum(tokens_Bx1, 1).astype(jnp.float32) / parts
  return jnp.sum(nats_BxPxK, axis=-1) / mean_Bx1


def next_token_gradient(
  model: config.Model,
  params: ct.Params,
  tokens_BxL1: jax.Array,
  microbatch: int | None = None,
  hidden: Hidden = llama.hidden,
) -> tuple[Loss, ct.Grads]:
  """Computes `next_token_loss` and the gradient of its total.

  Args:
    model: the architecture.
    params: parameters of `llama.init`.
    tokens_BxL1: negative tokens are padding.
    microbatch: sequences in flight at once, a divisor of B; None is all. The
      result is the same up to rounding. Activations take B / microbatch times
      less memory; on a CPU this is also faster once they fit its caches.
    hidden: as in `next_token_loss`.

  Returns:
    The loss over the whole batch, and its gradient, like `params`. Inside
    `jax.shard_map` over a miner's mesh the loss is over the batches of all
    devices. The gradient is the part of this device, not yet summed over the
    axes of the batch along which `params` are cast to each device's own.
  """
  batch = tokens_BxL1.shape[0]
  microbatch = microbatch or batch
  if batch % microbatch:
    raise ValueError(
      f'microbatch must divide the batch of {batch} sequences, got {microbatch}'
    )
  tokens = jnp.sum(tokens_BxL1[:, 1:] >= 0, dtype=jnp.int32)
  tokens = sharding.total(tokens, 'batch')
  divisor = jnp.maximum(tokens, 1).astype(jnp.float32)

  def share(loss):
    """Returns a slice's part of the means over the batch."""
    weight = loss.tokens.astype(jnp.float32) / divisor
    return loss.total * weight, loss.nats * weight

  @functools.partial(jax.value_and_grad, has_aux=True)
  def gradient(params, tokens_MxL1):
    return share(next_token_loss(model, params, tokens_MxL1, hidden))

  if microbatch == batch:
    sums, grads = gradient(params, tokens_BxL1)
    total, nats = sharding.total(sums, 'batch')
    return Loss(total, nats, tokens), grads

  def add(sums, tokens_MxL1):
    whole = hidden is llama.hidden
    if whole and model.scan_layers and model.remat == 'block':
      return _add_gradient(model, params, tokens_MxL1, share, sums)
    scalars, grads = gradient(params, tokens_MxL1)
    return jax.tree.map(jnp.add, sums, grads), scalars

  slices = tokens_BxL1.reshape(-1, microbatch, tokens_BxL1.shape[1])
  zeros = jax.tree.map(jnp.zeros_like, params)
  grads, each = jax.lax.scan(add, zeros, slices)
  total, nats = sharding.total(jax.tree.map(jnp.sum, each), 'batch')
  return Loss(total, nats, tokens), grads


def _add_gradient(
  model: config.Model,
  params: ct.Params,
  tokens_MxL1: jax.Array,
  share: Callable[[Loss], tuple[jax.Array, jax.Array]],
  sums: ct.Grads,
) -> tuple[ct.Grads, tuple[jax.Array, jax.Array]]:
  """Adds the gradient of `share` to sums, a layer at a time.

  It computes the same as `jax.grad` of stacked layers with full
  rematerialization. `jax.grad` would hold the whole gradient of a slice before
  adding it, which takes as much memory as the parameters.
  """
  inputs_MxL = llama.ids(model, tokens_MxL1[:, :-1])
  document_MxL = llama.documents(model, tokens_MxL1[:, :-1])
  layers, rest = params['layers'], {**params}
  del rest['layers']
  x_MxLxD, embed_backward = jax.vjp(
    lambda rest: llama.embed(model, rest, inputs_MxL), rest
  )
  x_MxLxD, x_NxMxLxD = jax.lax.scan(
    lambda x, layer: (llama.block(model, layer, x, document_MxL), x),
    x_MxLxD,
    layers,
  )

  def head(rest, x_MxLxD):
    x_MxLxD, w_DxV = llama.product_of(model, rest, x_MxLxD)
    return share(_of_product(model, x_MxLxD, w_DxV, tokens_MxL1[:, 1:]))

  total, head_backward, nats = jax.vjp(head, rest, x_MxLxD, has_aux=True)
  rest_grads, dx_MxLxD = head_backward(jnp.ones_like(total))

  def backward(carry, slices):
    dx_MxLxD, sums = carry
    i, layer, x_MxLxD = slices
    _, block_backward = jax.vjp(
      functools.partial(llama.block, model, document_BxL=document_MxL),
      layer,
      x_MxLxD,
    )
    grads, dx_MxLxD = block_backward(dx_MxLxD)
    sums = jax.tree.map(lambda s, g: s.at[i].add(g), sums, grads)
    return (dx_MxLxD, sums), None

  (dx_MxLxD, layer_sums), _ = jax.lax.scan(
    backward,
    (dx_MxLxD, sums['layers']),
    (jnp.arange(model.layers), layers, x_NxMxLxD),
    reverse=True,
  )
  (embed_grads,) = embed_backward(dx_MxLxD)
  grads = jax.tree.map(jnp.add, rest_grads, embed_grads)
  rest_sums = {**sums}
  del rest_sums['layers']
  rest_sums = jax.tree.map(jnp.add, rest_sums, grads)
  return {**rest_sums, 'layers': layer_sums}, (total, nats)
