"""Random-k: the ablation that measures the value of top-k's choice.

The code of SparseLoCo (arXiv 2508.15706) has it as a switch, each worker with a
generator of its own. Here the choice is a function of the block's values: a
compressor has no state and a node can replay what another one sent, yet peers,
rounds and blocks choose differently because their values differ.
"""

import dataclasses

import jax
import jax.numpy as jnp

from covenant.optim import compression
from covenant.optim import topk


@dataclasses.dataclass(frozen=True)
class RandomK(compression.TopK):
  """`TopK` that draws its k values of every block instead of ranking them.

  Attributes and messages are those of `TopK`. The values are not scaled up by
  L / k to be unbiased: with error feedback, the rest is sent later.
  """

  def select(self, blocks_NxL: jax.Array, k: int) -> jax.Array:
    return select(blocks_NxL, k)


def select(blocks_NxL: jax.Array, k: int) -> jax.Array:
  """Indices of k elements of each block, drawn without replacement, ascending.

  Each block's key is folded from its own values, so that a block is drawn
  alike wherever it is sharded. Equal blocks draw equal indices.

  Args:
    blocks_NxL: float32 blocks of L elements.
    k: elements kept of each block, 1 <= k <= L.

  Returns:
    int32 [N, k], strictly increasing along the last axis.

  >>> blocks_NxL = jnp.stack([jnp.arange(8.0), jnp.arange(8.0), jnp.ones(8)])
  >>> indices = select(blocks_NxL, 3)
  >>> bool((indices[0] == indices[1]).all())
  True
  >>> bool((indices[0] == indices[2]).all())
  False
  """
  key = jax.random.key(0)

  def scores(fingerprint: jax.Array) -> jax.Array:
    key_of_block = jax.random.fold_in(key, fingerprint)
    return jax.random.uniform(key_of_block, (blocks_NxL.shape[1],))

  return topk.select(jax.vmap(scores)(_fingerprints(blocks_NxL)), k)


def _fingerprints(blocks_NxL: jax.Array) -> jax.Array:
  """A hash of each block: uint32 [N]. One changed element changes it.

  Every element is mixed with its position by the finalizer of MurmurHash3, a
  bijection, and summed as an integer, which no order of summation changes.
  """
  positions_1xL = jnp.arange(blocks_NxL.shape[1], dtype=jnp.uint32)[None]
  bits_NxL = jax.lax.bitcast_convert_type(blocks_NxL, jnp.uint32)
  mixed_NxL = bits_NxL ^ (positions_1xL * jnp.uint32(0x9E3779B1))
  mixed_NxL = (mixed_NxL ^ (mixed_NxL >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed_NxL = (mixed_NxL ^ (mixed_NxL >> 13)) * jnp.uint32(0xC2B2AE35)
  mixed_NxL ^= mixed_NxL >> 16
  return jnp.sum(mixed_NxL, axis=1, dtype=jnp.uint32)
