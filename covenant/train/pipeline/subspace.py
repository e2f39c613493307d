"""Activations between the stages of a pipeline, in a subspace fixed per round.

Stages pass activations X forward and their gradient back. For every position
only K of its D numbers pass: the coordinates (X - X0) U along the columns of an
orthonormal U [D, K], which is fixed for a round, as in Protocol Models (arXiv
2506.01260). X0 depends on the token alone, so that both sides know it. Nothing
is lost if X - X0 lies in the span of U. The weights are not constrained to it,
so that some of X is lost as a rule, but the delta of a pipeline contains only
what its weights learned to write into the span (`learned`).

X0 is the mean activation of a token, a linear function of its embedding. It is
fitted every round, and U to what X0 leaves. Protocol Models instead takes the
part of the embedding outside the span as X0, and projects the weights that
write to the residual stream onto the span.

The K numbers may be quantized (quantized.py): a position sends integer
multiples of a step, of which the largest is 7 or 127, and the step in bfloat16.
Gradients return in the same form. Few bits of many directions tell more than
all bits of few directions.

Shapes: V vocabulary, D width, E = D + 1 features, K numbers per position, S
stages, N layers, B batch, L length; L1 = L + 1.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.train.pipeline import fit as fit_lib
from covenant.train.pipeline import quantized

BITS = (4, 8)  # bits per number of quantized activations
_HIGHEST = jax.lax.Precision.HIGHEST  # precision of the fit
# The weights of a layer that write to the residual stream, [..., D].
_WRITERS = (('attention', 'output'), ('ffn', 'down'))
FITTED = 32  # most sequences that a round's subspace is fitted to


class Fixed(NamedTuple):
  """The constants of a round for the boundary into each stage.

  With tied embeddings the first boundary is that from the table.
  """

  tokens_SxVxD: jax.Array  # X0 of each token
  basis_SxDxK: jax.Array  # U


def spans(
  model: config_lib.Model, island: config_lib.Island
) -> tuple[range, ...]:
  """Returns the layers of each stage.

  >>> spans(config_lib.Model(layers=4), config_lib.Island(stages=2))
  (range(0, 2), range(2, 4))
  """
  equal = (model.layers // island.stages,) * island.stages
  ends = [0, *itertools.accumulate(island.layers or equal)]
  return tuple(itertools.starmap(range, itertools.pairwise(ends)))


def fix(
  model: config_lib.Model,
  params: ct.Params,
  tokens_BxL1: jax.Array,
  island: config_lib.Island,
) -> Fixed:
  """Fits the constants of a round to its parameters and some of its tokens.

  Stage by stage, each fits its output, sends the fit to the next, and passes
  the tokens on as compressed as in training (`boundary_bytes.round_bytes`).

  Args:
    model: the architecture.
    params: the shared parameters.
    tokens_BxL1: tokens of the round; negative ones are padding.
    island: a pipeline with a rank, K.
  """
  table_VxD = params['embedding'].astype(jnp.float32)
  seen = fit_lib.see(model, table_VxD, tokens_BxL1)
  x_BxLxD = table_VxD[seen.tokens_BxL].astype(model.compute_dtype)
  found = []
  for span in spans(model, island)[:-1]:
    layers = stage_layers(model, params, span.start, len(span))
    x_BxLxD = apply_layers(model, layers, x_BxLxD, seen.document_BxL)
    sent = fit_lib.fit(seen, table_VxD, x_BxLxD, island.rank)
    known_VxD, basis_DxK = fit_lib.constants(table_VxD, sent)
    found.append((known_VxD, basis_DxK))
    x0_BxLxD = known_VxD[seen.tokens_BxL]
    x_BxLxD = cross(x_BxLxD, x0_BxLxD, basis_DxK, island.bits)
  # The boundary from the table has the basis of the one after it.
  found = [(table_VxD, found[0][1]), *found]
  tokens, bases = zip(*found, strict=True)
  return Fixed(jnp.stack(tokens), jnp.stack(bases))


def learned(
  model: config_lib.Model,
  start: ct.Params,
  end: ct.Params,
  island: config_lib.Island,
  fixed: Fixed,
) -> ct.Params:
  """Reverts changes of a round that no gradient reached.

  Before the last stage, what weights write outside the span is not passed on
  and so has no gradient beyond noise. AdamW, which normalizes every number,
  changes it nevertheless; it is set back to what it was at the start.

  Args:
    model: the architecture.
    start: the parameters at the start of the round.
    end: the parameters at its end.
    island: a pipeline with a rank.
    fixed: the constants of the round.
  """
  counts = [len(span) for span in spans(model, island)[:-1]]
  confined = sum(counts)
  basis_NxDxK = jnp.repeat(
    fixed.basis_SxDxK[1:],
    np.array(counts),
    0,
    total_repeat_length=confined,
  )

  if model.scan_layers:

    def stacked(start: jax.Array, end: jax.Array) -> jax.Array:
      n = slice(confined)
      return end.at[n].set(jax.vmap(_within)(start[n], end[n], basis_NxDxK))

    changed = _change_writers(start['layers'], end['layers'], stacked)
    return {**end, 'layers': changed}
  end = {**end}
  for i in range(confined):
    name = f'layers_{i}'
    end[name] = confine(start[name], end[name], basis_NxDxK[i])
  return end


def confine(
  start: ct.Params, end: ct.Params, basis_DxK: jax.Array
) -> ct.Params:
  """Returns a layer whose writers have changed within the span only."""
  change = functools.partial(_within, basis_DxK=basis_DxK)
  return _change_writers(start, end, change)


def _change_writers(
  start: ct.Params, end: ct.Params, change: Callable[..., jax.Array]
) -> ct.Params:
  """Replaces the writers of a layer or of a stack of layers."""
  end = {**end}
  for part, name in _WRITERS:
    changed = change(start[part][name], end[part][name])
    end[part] = {**end[part], name: changed}
  return end


def _within(
  start: jax.Array, end: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """Returns a weight [..., D] with its change projected onto the span."""
  moved = jnp.matmul(end - start, basis_DxK, precision=_HIGHEST)
  return start + jnp.matmul(moved, basis_DxK.T, precision=_HIGHEST)


def cross(
  x_BxLxD: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array, bits: int
) -> jax.Array:
  """Returns activations as they arrive; their gradient passes likewise."""
  c_BxLxK = quantized.passed(send(x_BxLxD, x0_BxLxD, basis_DxK), bits)
  return receive(c_BxLxK, x0_BxLxD, basis_DxK)


def send(
  x_BxLxD: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """Returns the coordinates of activations, [B, L, K], in their dtype.

  The gradient of the coordinates is sent back in full: `receive` reduces the
  gradient of the activations to the span.
  """
  dtype = x_BxLxD.dtype
  return jnp.matmul(x_BxLxD - x0_BxLxD.astype(dtype), basis_DxK.astype(dtype))


def receive(
  c_BxLxK: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """Returns the activations with the given coordinates."""
  dtype = c_BxLxK.dtype
  return jnp.matmul(c_BxLxK, basis_DxK.T.astype(dtype)) + x0_BxLxD.astype(dtype)


def hidden(
  model: config_lib.Model,
  params: ct.Params,
  tokens_BxL: jax.Array,
  island: config_lib.Island,
  fixed: Fixed,
  bypassed: frozenset[int] = frozenset(),
) -> tuple[jax.Array, jax.Array]:
  """Computes `llama.hidden` as a pipeline does, on one device.

  With tied embeddings the last stage has the table, and embeddings cross a
  boundary to the first stage. What crosses the boundary before a bypassed stage
  goes to the stage after it.
  """
  document_BxL = llama.documents(model, tokens_BxL)
  if model.packed:
    tokens_BxL = llama.ids(model, tokens_BxL)
  x_BxLxD = llama.embed(model, params, tokens_BxL)
  boundary = 0
  for s, span in enumerate(spans(model, island)):
    if s in bypassed:
      continue
    if s or model.tie_embeddings:
      x0_BxLxD = fixed.tokens_SxVxD[boundary][tokens_BxL]
      basis_DxK = fixed.basis_SxDxK[boundary]
      x_BxLxD = cross(x_BxLxD, x0_BxLxD, basis_DxK, island.bits)
    layers = stage_layers(model, params, span.start, len(span))
    x_BxLxD = apply_layers(model, layers, x_BxLxD, document_BxL)
    boundary = s + 1
  return llama.product_of(model, params, x_BxLxD)


def next_token_gradient(
  model: config_lib.Model,
  params: ct.Params,
  tokens_BxL1: jax.Array,
  island: config_lib.Island,
  fixed: Fixed,
  microbatch: int | None = None,
  bypassed: frozenset[int] = frozenset(),
) -> tuple[loss_lib.Loss, ct.Grads]:
  """Computes `loss.next_token_gradient` of a pipeline, on one device."""
  return loss_lib.next_token_gradient(
    model,
    params,
    tokens_BxL1,
    microbatch,
    functools.partial(hidden, island=island, fixed=fixed, bypassed=bypassed),
  )


def stage_layers(
  model: config_lib.Model, params: ct.Params, first: int, count: int
) -> ct.Params:
  """Returns the parameters of `count` layers from `first` on.

  They are stacked with `scan_layers`, otherwise a tuple.
  """
  if model.scan_layers:
    return jax.tree.map(lambda x: x[first : first + count], params['layers'])
  return tuple(params[f'layers_{i}'] for i in range(first, first + count))


def apply_layers(
  model: config_lib.Model,
  layers: ct.Params,
  x_BxLxD: jax.Array,
  document_BxL: jax.Array | None = None,
) -> jax.Array:
  """Applies the layers of a stage."""
  block = functools.partial(llama.block, model, document_BxL=document_BxL)
  if model.remat != 'none':
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = jax.checkpoint(
      block,
      prevent_cse=isinstance(layers, tuple),
      policy=dots if model.remat == 'dots' else None,
    )
  if isinstance(layers, tuple):
    for layer in layers:
      x_BxLxD = block(layer, x_BxLxD)
    return x_BxLxD
  x_BxLxD, _ = jax.lax.scan(
    lambda x, layer: (block(layer, x), None), x_BxLxD, layers
  )
  return x_BxLxD
