"""The fit of a boundary between two stages to the tokens of a round.

The sender fits its activations: X0 is a linear function of a token's embedding
at the start of the round, and U spans the main directions of what X0 leaves.
Both sides know the embedding, so that the map and U are all that is sent.

Shapes: V vocabulary, D width, E = D + 1 features, K numbers per position, B
batch, L length; L1 = L + 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from covenant import config as config_lib
from covenant.models import llama
from covenant.train.pipeline import quantized

BITS = 8  # bits per number of the map as it is sent
_HIGHEST = jax.lax.Precision.HIGHEST
_RIDGE = 1e-2  # regularization, relative to each feature's sum of squares


class Seen(NamedTuple):
  """The tokens that a round's boundaries are fitted to."""

  tokens_BxL: jax.Array  # ids
  document_BxL: jax.Array | None
  real_BxLx1: jax.Array  # False where the target is padding
  features_BxLxE: jax.Array  # embeddings and ones, 0 where not real
  gram_ExE: jax.Array


class Sent(NamedTuple):
  """A fit as it is sent."""

  map_ExD: quantized.Quantized
  basis_DxK: jax.Array  # bfloat16


def see(
  model: config_lib.Model, table_VxD: jax.Array, tokens_BxL1: jax.Array
) -> Seen:
  """Returns what all fits of a round need of its tokens.

  Args:
    model: the architecture.
    table_VxD: the embedding at the start of the round, float32.
    tokens_BxL1: tokens; negative ones are padding.
  """
  tokens_BxL = llama.ids(model, tokens_BxL1[:, :-1])
  document_BxL = llama.documents(model, tokens_BxL1[:, :-1])
  real_BxLx1 = (tokens_BxL1[:, 1:] >= 0)[..., None]
  f_BxLxE = jnp.where(real_BxLx1, _features(table_VxD)[tokens_BxL], 0)
  gram_ExE = _sum_of_products(f_BxLxE, f_BxLxE)
  own_E = jnp.maximum(jnp.diag(gram_ExE), 1e-6)  # of features always 0
  gram_ExE += _RIDGE * jnp.diag(own_E)
  return Seen(tokens_BxL, document_BxL, real_BxLx1, f_BxLxE, gram_ExE)


def fit(
  seen: Seen, table_VxD: jax.Array, x_BxLxD: jax.Array, rank: int
) -> Sent:
  """Fits a boundary to the activations that will cross it."""
  tokens_BxL = seen.tokens_BxL
  added_BxLxD = x_BxLxD.astype(jnp.float32) - table_VxD[tokens_BxL]
  map_ExD = jax.scipy.linalg.solve(
    seen.gram_ExE,
    _sum_of_products(seen.features_BxLxE, added_BxLxD),
    assume_a='pos',
  )
  packed = quantized.pack(map_ExD, BITS)
  x0_BxLxD = _known(table_VxD, packed)[tokens_BxL]
  left_BxLxD = x_BxLxD.astype(jnp.float32) - x0_BxLxD
  left_BxLxD = jnp.where(seen.real_BxLx1, left_BxLxD, 0)
  _, vectors_DxD = jnp.linalg.eigh(_sum_of_products(left_BxLxD, left_BxLxD))
  basis_DxK = vectors_DxD[:, -rank:]  # eigenvalues ascend
  return Sent(packed, basis_DxK.astype(jnp.bfloat16))


def constants(table_VxD: jax.Array, sent: Sent) -> tuple[jax.Array, jax.Array]:
  """Returns X0 of each token, [V, D], and U, [D, K], of a fit."""
  return _known(table_VxD, sent.map_ExD), sent.basis_DxK.astype(jnp.float32)


def _features(table_VxD: jax.Array) -> jax.Array:
  return jnp.pad(table_VxD, ((0, 0), (0, 1)), constant_values=1)


def _known(table_VxD: jax.Array, map_ExD: quantized.Quantized) -> jax.Array:
  return table_VxD + jnp.matmul(
    _features(table_VxD),
    quantized.unpack(map_ExD, jnp.float32),
    precision=_HIGHEST,
  )


def _sum_of_products(x_BxLxE: jax.Array, y_BxLxD: jax.Array) -> jax.Array:
  return jnp.einsum('ble,bld->ed', x_BxLxE, y_BxLxD, precision=_HIGHEST)
