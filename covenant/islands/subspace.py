"""What crosses the boundaries of a pipeline, in a fixed subspace.

Between two stages of a pipeline pass activations, and their gradient back. Of
the width D of a position only k numbers do, its coordinates along the columns
of an orthonormal U [D, k], fixed for a round (reference/papers.md 4.2). Nothing
is lost if what the layers have added to the residual stream lies in the span of
U, so an island trains copies of the weights that write there, projected on that
span; the weights that the run shares stay free. What a token brings with it
need not lie there: its part outside the span, `Fixed.tokens`, is known on both
sides of a boundary and stays as it was at the start of a round.

The writers are the outputs of attention and of the feed-forward network in all
stages but the last, after which nothing is sent, and the embedding. Where that
is the unembedding too (`model.tie_embeddings`), only its use as input is
confined to the span: as output it is a reader, and is trained whole.

Shapes: V vocabulary, D width, K numbers a position, B batch, L length; F what
is read by a writer.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from covenant import config as config_lib
from covenant.islands import island as island_lib
from covenant.islands import stage as stage_lib
from covenant.models import llama
from covenant.models import loss as loss_lib

_HIGHEST = jax.lax.Precision.HIGHEST  # of weights; activations have their own
_WRITERS = (('attention', 'output'), ('ffn', 'down'))  # of a layer, [in, D]


class Fixed(NamedTuple):
  """What does not change within a round, alike on all stages. float32"""

  basis_DxK: jax.Array  # U
  tokens_VxD: jax.Array  # of the embedding, what lies outside the span


def basis(
  model: config_lib.Model, params: Any, stages: int, rank: int
) -> jax.Array:
  """The U of a round: orthonormal, float32 [D, rank], from its parameters.

  The directions along which the writers of the stages but the last write most,
  the leading eigenvectors of the sum of their W^T W: projecting on any other
  span takes away more. It follows the run from round to round. One drawn once
  and kept, as in Protocol Models, lost more: eight pipelines of 3 of 64 numbers
  on Shakespeare (experiments/islands.py) 2.547 nats a byte against 2.036, four
  of them beside four full replicas 1.969 against 1.910; of what passes in a
  batch, in place of the weights, 1.905.
  """
  gram_DxD = jnp.zeros((model.width, model.width))
  for w in _confined(model, params, stages):
    w_FxD = w.reshape(-1, model.width)
    gram_DxD += jnp.matmul(w_FxD.T, w_FxD, precision=_HIGHEST)
  _, vectors_DxD = jnp.linalg.eigh(gram_DxD)  # ascending
  return vectors_DxD[:, -rank:]


def _confined(
  model: config_lib.Model, params: Any, stages: int
) -> Iterator[jax.Array]:
  """Yields the writers that are projected, those of a stack together."""
  confined = model.layers - model.layers // stages
  for part, name in _WRITERS:
    if model.scan_layers:
      yield params['layers'][part][name][:confined]
    else:
      for i in range(confined):
        yield params[f'layers_{i}'][part][name]


def start(
  model: config_lib.Model, params: Any, stages: int, basis_DxK: Any
) -> tuple[Any, Fixed]:
  """What an island's round begins with: its own parameters, what is fixed.

  The tokens' part outside the span takes up whatever the other miners pushed
  there in the rounds before (reference/papers.md 4.3).
  """
  table_VxD = params['embedding']
  fixed = Fixed(basis_DxK, table_VxD - _onto(table_VxD, basis_DxK))
  return project(model, params, stages, fixed), fixed


def project(
  model: config_lib.Model, params: Any, stages: int, fixed: Fixed
) -> Any:
  """The parameters with all writers in the span: after every inner step."""
  params = _writers(model, params, stages, fixed.basis_DxK)
  if not model.tie_embeddings:
    table_VxD = project_table(params['embedding'], fixed)
    params = {**params, 'embedding': table_VxD}
  return params


def _writers(
  model: config_lib.Model, params: Any, stages: int, basis_DxK: Any
) -> Any:
  """A tree like the parameters, the writers in layers projected."""
  confined = model.layers - model.layers // stages
  params = {**params}
  if model.scan_layers:
    params['layers'] = _of_layers(
      params['layers'],
      lambda w: w.at[:confined].set(_onto(w[:confined], basis_DxK)),
    )
    return params
  for i in range(confined):
    name = f'layers_{i}'
    params[name] = project_layers(params[name], basis_DxK)
  return params


def project_layers(layers: Any, basis_DxK: jax.Array) -> Any:
  """The parameters of a layer, or of a stack, its writers in the span."""
  return _of_layers(layers, lambda w: _onto(w, basis_DxK))


def _of_layers(layers: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
  layers = {**layers}
  for part, name in _WRITERS:
    layers[part] = {**layers[part], name: change(layers[part][name])}
  return layers


def project_table(table_VxD: jax.Array, fixed: Fixed) -> jax.Array:
  """An embedding of which only what lies in the span has moved."""
  return _onto(table_VxD, fixed.basis_DxK) + fixed.tokens_VxD


def _onto(x: jax.Array, basis_DxK: jax.Array) -> jax.Array:
  """What of each row of `x` [..., D] lies in the span."""
  c = jnp.matmul(x, basis_DxK, precision=_HIGHEST)
  return jnp.matmul(c, basis_DxK.T, precision=_HIGHEST)


def send(
  x_BxLxD: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """What is sent of activations: [B, L, K], in their dtype.

  Its gradient is what is sent back, in full: of the activations' own gradient
  the receiver's `receive` has kept only what lies in the span.
  """
  basis_DxK = basis_DxK.astype(x_BxLxD.dtype)
  return jnp.matmul(x_BxLxD - x0_BxLxD, basis_DxK)


def receive(
  c_BxLxK: jax.Array, x0_BxLxD: jax.Array, basis_DxK: jax.Array
) -> jax.Array:
  """The activations that `send` was of."""
  return jnp.matmul(c_BxLxK, basis_DxK.T.astype(c_BxLxK.dtype)) + x0_BxLxD


def hidden(
  model: config_lib.Model,
  params: Any,
  tokens_BxL: jax.Array,
  stages: int,
  fixed: Fixed,
) -> tuple[jax.Array, jax.Array]:
  """`llama.hidden` as a pipeline computes it, on one device.

  The tokens' embedding enters the first stage as from another: with tied
  embeddings the last stage has the table and sends what lies in the span.
  """
  basis_DxK = fixed.basis_DxK

  def look_up(table_VxD: jax.Array) -> jax.Array:
    return llama.embed(model, {'embedding': table_VxD}, tokens_BxL)

  x0_BxLxD = look_up(fixed.tokens_VxD)
  x_BxLxD = look_up(params['embedding'])
  depth = model.layers // stages
  for first in range(0, model.layers, depth):
    c_BxLxK = send(x_BxLxD, x0_BxLxD, basis_DxK)
    x_BxLxD = receive(c_BxLxK, x0_BxLxD, basis_DxK)
    layers = stage_lib.layers(model, params, first, depth)
    x_BxLxD = stage_lib.apply(model, layers, x_BxLxD)
  return llama.product_of(model, params, x_BxLxD)


def next_token_gradient(
  model: config_lib.Model,
  params: Any,
  tokens_BxL1: jax.Array,
  stages: int,
  fixed: Fixed,
  microbatch: int | None = None,
) -> tuple[loss_lib.Loss, Any]:
  """As `loss.next_token_gradient`, of a pipeline.

  The gradient is with respect to what `project` leaves free to move.
  """
  loss, grads = loss_lib.next_token_gradient(
    model,
    params,
    tokens_BxL1,
    microbatch,
    functools.partial(hidden, stages=stages, fixed=fixed),
  )
  return loss, _writers(model, grads, stages, fixed.basis_DxK)


def position_bytes(model: config_lib.Model, island: island_lib.Island) -> int:
  """What passes between the stages of an island for each trained position.

  Forward and back, across all boundaries; with tied embeddings the last stage
  has the table, and from it to the first is one more. Stages draw the ids of
  the tokens themselves, and learn the embedding of a round as all miners do,
  so neither is sent.

  >>> model = config_lib.Model(width=64)
  >>> position_bytes(model, island_lib.Island(stages=2))
  1024
  >>> position_bytes(model, island_lib.Island(stages=2, rank=8))
  128
  """
  if island.stages == 1:
    return 0
  boundaries = island.stages - (not model.tie_embeddings)
  numbers = island.rank or model.width
  return 2 * boundaries * numbers * jnp.dtype(model.compute_dtype).itemsize
