"""Which elements of a block are sent: the k of largest magnitude."""

import jax
import jax.numpy as jnp


def select(blocks_NxL: jax.Array, k: int) -> jax.Array:
  """Indices of the k largest magnitudes of each block, ascending.

  Exact. Of equal magnitudes the one with the lowest index is taken, so that a
  block has one answer on every machine.

  Args:
    blocks_NxL: blocks of L elements, any float dtype.
    k: elements kept of each block, 1 <= k <= L.

  Returns:
    int32 [N, k], strictly increasing along the last axis.

  >>> select(jnp.array([[1.0, -3.0, 3.0, 0.5]]), 2)
  Array([[1, 2]], dtype=int32)
  """
  _, indices_NxK = jax.lax.top_k(jnp.abs(blocks_NxL), k)
  return jnp.sort(indices_NxK, axis=-1)
