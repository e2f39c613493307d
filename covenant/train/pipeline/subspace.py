"""What crosses the boundaries of a pipeline, in a fixed subspace.

Between two stages of a pipeline pass activations, and their gradient back. Of
the width D of a position only k numbers do, (X - X0) U, its coordinates along
the columns of an orthonormal U [D, k], fixed for a round (reference/papers.md
4.2). X0 is known on both sides, as it depends on the token alone. Nothing is
lost if what the layers have added to the residual stream lies in the span of U
but for X0. The weights are free, so as a rule some is; but what a pipeline
sends of its weights is only what they have learned to write there (`learned`).

X0 is what the activations of a token are on average: linear in its embedding,
fitted anew each round, as is U, to what X0 leaves. In Protocol Models it is
what the embedding has outside the span, and the weights that write are
projected on it: of a model of width 64 trained on Shakespeare, cut in two with
3 numbers a position, that makes 4.42 nats a byte of 1.69, this X0 2.25.

Shapes: V vocabulary, D width, K numbers a position, S stages, B batch, L
length; L1 = L + 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.train import island as island_lib
from covenant.train.pipeline import activation_quantization
from covenant.train.pipeline import stage as stage_lib

_HIGHEST = jax.lax.Precision.HIGHEST  # of what is fitted
_WRITERS = (('attention', 'output'), ('ffn', 'down'))  # of a layer, [..., D]
_RIDGE = 1e-2  # of a feature's own square; of few tokens little is told
FITTED = 32  # sequences, at most, that a round's fit is to
_FIT_BITS = 8  # of its numbers, as they are sent; U is sent in bfloat16


class Fixed(NamedTuple):
  """What does not change within a round: of the boundary into each stage.

  The first stage's is that from the table to it, with tied embeddings.
  """

  tokens_SxVxD: jax.Array  # X0 of each token
  basis_SxDxK: jax.Array  # U


def fix(
  model: config_lib.Model,
  params: Any,
  tokens_BxL1: jax.Array,
  island: island_lib.Island,
) -> Fixed:
  """What is fixed for a round, from its parameters and some of its tokens.

  Stage after stage: each fits what it gives and tells the next, and lets the
  tokens pass on as compressed as they will be (`round_bytes`).

  Args:
    model: the architecture.
    params: the shared parameters.
    tokens_BxL1: negative tokens are padding.
    island: a pipeline with a rank, K.
  """
  tokens_BxL = jnp.maximum(tokens_BxL1[:, :-1], 0)
  real_BxLx1 = (tokens_BxL1[:, 1:] >= 0)[..., None]
  table_VxD = params['embedding'].astype(jnp.float32)
  features_VxE = jnp.pad(table_VxD, ((0, 0), (0, 1)), constant_values=1)
  f_BxLxE = jnp.where(real_BxLx1, features_VxE[tokens_BxL], 0)
  gram_ExE = _sum_of_products(f_BxLxE, f_BxLxE)
  own_E = jnp.maximum(jnp.diag(gram_ExE), 1e-6)  # of a feature that is nothing
  gram_ExE += _RIDGE * jnp.diag(own_E)
  x_BxLxD = table_VxD[tokens_BxL].astype(model.compute_dtype)
  found = []
  depth = model.layers // island.stages
  for first in range(0, model.layers - depth, depth):
    layers = stage_lib.layers(model, params, first, depth)
    x_BxLxD = stage_lib.apply(model, layers, x_BxLxD)
    added_BxLxD = x_BxLxD.astype(jnp.float32) - table_VxD[tokens_BxL]
    map_ExD = jax.scipy.linalg.solve(
      gram_ExE, _sum_of_products(f_BxLxE, added_BxLxD), assume_a='pos'
    )
    map_ExD = activation_quantization.passed(map_ExD, _FIT_BITS)
    known_VxD = table_VxD + jnp.matmul(
      features_VxE, map_ExD, precision=_HIGHEST
    )
    x0_BxLxD = known_VxD[tokens_BxL]
    left_BxLxD = x_BxLxD.astype(jnp.float32) - x0_BxLxD
    left_BxLxD = jnp.where(real_BxLx1, left_BxLxD, 0)
    _, vectors_DxD = jnp.linalg.eigh(_sum_of_products(left_BxLxD, left_BxLxD))
    basis_DxK = vectors_DxD[:, -island.rank :]  # eigenvalues ascend
    basis_DxK = basis_DxK.astype(jnp.bfloat16).astype(jnp.float32)
    found.append((known_VxD, basis_DxK))
    x_BxLxD = cross(x_BxLxD, x0_BxLxD, basis_DxK, island.bits)
  # The table's own lies where what it leads to does.
  found = [(table_VxD, found[0][1]), *found]
  tokens, bases = zip(*found, strict=True)
  return Fixed(jnp.stack(tokens), jnp.stack(bases))


def learned(
  model: config_lib.Model,
  start: Any,
  end: Any,
  island: island_lib.Island,
  fixed: Fixed,
) -> Any:
  """The parameters that a round led to, as far as a pipeline can tell.

  What weights before the last stage write outside the span did not arrive, so
  no gradient said how to change it, and AdamW, which divides each number by
  its own size, changes it all the same. It stays as it was: of four such
  pipelines beside four full replicas (experiments/islands.py, `mixed`) 1.759
  and 1.785 nats a byte against 1.779 and 1.886, on two seeds.

  Args:
    model: the architecture.
    start: the parameters at the start of the round.
    end: those at its end.
    island: a pipeline with a rank.
    fixed: of the round.
  """
  depth = model.layers // island.stages
  confined = model.layers - depth
  basis_NxDxK = jnp.repeat(fixed.basis_SxDxK[1:], depth, 0)

  def layers(start: Any, end: Any, change: Any) -> Any:
    """Of a layer or a stack, at the end, the writers changed."""
    end = {**end}
    for part, name in _WRITERS:
      changed = change(start[part][name], end[part][name])
      end[part] = {**end[part], name: changed}
    return end

  if model.scan_layers:

    def stacked(start: jax.Array, end: jax.Array) -> jax.Array:
      n = slice(confined)
      return end.at[n].set(jax.vmap(_within)(start[n], end[n], basis_NxDxK))

    return {**end, 'layers': layers(start['layers'], end['layers'], stacked)}
  end = {**end}
  for i in range(confined):
    name = f'layers_{i}'
    change = functools.partial(_within, basis_DxK=basis_NxDxK[i])
    end[name] = layers(start[name], end[name], change)
  return end


def _within(
  start: jax.Array, end: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """A weight [..., D] that has changed in the span alone."""
  moved = jnp.matmul(end - start, basis_DxK, precision=_HIGHEST)
  return start + jnp.matmul(moved, basis_DxK.T, precision=_HIGHEST)


def _sum_of_products(x_BxLxE: jax.Array, y_BxLxD: jax.Array) -> jax.Array:
  return jnp.einsum('ble,bld->ed', x_BxLxE, y_BxLxD, precision=_HIGHEST)


def cross(
  x_BxLxD: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array, bits: int
) -> jax.Array:
  """What is received of activations that are sent, and of their gradient."""
  c_BxLxK = activation_quantization.passed(
    send(x_BxLxD, x0_BxLxD, basis_DxK), bits
  )
  return receive(c_BxLxK, x0_BxLxD, basis_DxK)


def send(
  x_BxLxD: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """What is sent of activations: [B, L, K], in their dtype.

  Its gradient is what is sent back, in full: of the activations' own gradient
  the receiver's `receive` has kept only what lies in the span.
  """
  dtype = x_BxLxD.dtype
  return jnp.matmul(x_BxLxD - x0_BxLxD.astype(dtype), basis_DxK.astype(dtype))


def receive(
  c_BxLxK: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """The activations that `send` was of."""
  dtype = c_BxLxK.dtype
  return jnp.matmul(c_BxLxK, basis_DxK.T.astype(dtype)) + x0_BxLxD.astype(dtype)


def hidden(
  model: config_lib.Model,
  params: Any,
  tokens_BxL: jax.Array,
  island: island_lib.Island,
  fixed: Fixed,
) -> tuple[jax.Array, jax.Array]:
  """`llama.hidden` as a pipeline computes it, on one device.

  The tokens' embedding enters the first stage as from another with tied
  embeddings: the last stage has the table.
  """
  x_BxLxD = llama.embed(model, params, tokens_BxL)
  depth = model.layers // island.stages
  for s in range(island.stages):
    if s or model.tie_embeddings:
      x0_BxLxD = fixed.tokens_SxVxD[s][tokens_BxL]
      basis_DxK = fixed.basis_SxDxK[s]
      x_BxLxD = cross(x_BxLxD, x0_BxLxD, basis_DxK, island.bits)
    layers = stage_lib.layers(model, params, s * depth, depth)
    x_BxLxD = stage_lib.apply(model, layers, x_BxLxD)
  return llama.product_of(model, params, x_BxLxD)


def next_token_gradient(
  model: config_lib.Model,
  params: Any,
  tokens_BxL1: jax.Array,
  island: island_lib.Island,
  fixed: Fixed,
  microbatch: int | None = None,
) -> tuple[loss_lib.Loss, Any]:
  """As `loss.next_token_gradient`, of a pipeline."""
  return loss_lib.next_token_gradient(
    model,
    params,
    tokens_BxL1,
    microbatch,
    functools.partial(hidden, island=island, fixed=fixed),
  )


def round_bytes(
  model: config_lib.Model,
  island: island_lib.Island,
  sequences: int,
  context: int,
) -> int:
  """What passes between the stages of an island in a round, all boundaries.

  Activations forward and gradients back; with tied embeddings the last stage
  has the table, and from it to the first is one boundary more. With a rank
  also what is fixed for the round (`fix`), and on all boundaries but the last
  the tokens that it is fitted to. Stages draw the ids of tokens themselves,
  and learn the embedding as all miners do, so neither is sent.

  Args:
    model: the architecture.
    island: whose.
    sequences: that it trained on.
    context: positions of each.

  >>> model = config_lib.Model(width=64)
  >>> round_bytes(model, island_lib.Island(stages=2), 45, 64)
  2949120
  >>> round_bytes(model, island_lib.Island(stages=2, rank=20, bits=4), 45, 64)
  145090
  """
  stages = island.stages
  if stages == 1:
    return 0
  boundaries = stages - (not model.tie_embeddings)
  one_way = activation_quantization.position_bytes(
    island.rank or model.width, island.bits, model.compute_dtype
  )
  total = sequences * context * 2 * boundaries * one_way
  if island.rank:
    row = activation_quantization.position_bytes(
      model.width, _FIT_BITS, jnp.float32
    )
    fit = (model.width + 1) * row + model.width * island.rank * 2
    passing = min(FITTED, sequences) * context * one_way
    total += (stages - 1) * fit + (stages - 2) * passing
  return total
