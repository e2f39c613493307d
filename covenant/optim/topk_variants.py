"""Variants of `TopK`: a random choice, and a choice of cosine coefficients.

`RandomK` is the ablation that measures the value of ranking. The code of
SparseLoCo (arXiv 2508.15706) has it as a switch, each worker with a generator
of its own. Here the choice is a function of the block's values: a compressor
has no state and a node can replay the choice of another one, yet peers, rounds
and blocks choose differently because their values differ.

`DCTTopK` selects coefficients of the discrete cosine transform of every block,
as DeMo (arXiv 2411.19870) does: elements that move together are then sent in a
few numbers. The transform is orthonormal, so norms are the same on both sides
and the largest coefficients are the best ones to keep.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from covenant.optim import blocks
from covenant.optim import compression
from covenant.optim import topk

_LARGEST = 2**15 - 1  # longest side: beyond it, k * (2 n + 1) leaves int32


@dataclasses.dataclass(frozen=True)
class RandomK(compression.TopK):
  """`TopK` that draws its k values of every block instead of ranking them.

  Attributes and messages are those of `TopK`. The values are not scaled up by
  L / k to be unbiased: with error feedback, the rest is sent later.
  """

  def select(self, blocks_NxL: jax.Array, k: int) -> jax.Array:
    return random_select(blocks_NxL, k)


@dataclasses.dataclass(frozen=True)
class DCTTopK(compression.TopK):
  """`TopK` of the DCT coefficients of every block, as DeMo sends them.

  Attributes and messages are those of `TopK`; indices mean frequencies. `Sums`
  hold coefficients: peers are averaged before the inverse, frequency by
  frequency over those who sent it (DeMo, arXiv 2411.19870).
  """

  def keep(self, x: jax.Array) -> tuple[compression.Kept, ...]:
    return super().keep(dct(x, self.block, self.layout))

  def decompress(
    self, part: tuple[compression.Packet, ...], shape: Sequence[int]
  ) -> jax.Array:
    # `TopK` writes straight into the leaf, not by way of `join`.
    return idct(super().decompress(part, shape), self.block, self.layout)

  def join(
    self, regions: Sequence[jax.Array], shape: Sequence[int]
  ) -> jax.Array:
    return idct(super().join(regions, shape), self.block, self.layout)


def random_select(blocks_NxL: jax.Array, k: int) -> jax.Array:
  """Draws k elements of each block without replacement.

  The key of a block is folded from its values, so that the draw does not depend
  on how the leaf is sharded. Equal blocks draw equal indices.

  Args:
    blocks_NxL: float32 blocks of L elements.
    k: elements kept of each block, 1 <= k <= L.

  Returns:
    int32 [N, k], strictly increasing along the last axis.

  >>> blocks_NxL = jnp.stack([jnp.arange(8.0), jnp.arange(8.0), jnp.ones(8)])
  >>> indices = random_select(blocks_NxL, 3)
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
  """Returns a hash of each block: uint32 [N]; one changed element changes it.

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


def dct(
  x: jax.Array, block: tuple[int, int], layout: str = 'tiles'
) -> jax.Array:
  """Returns the orthonormal DCT-II of each block of `x`, in its place.

  It is two-dimensional in the blocks of matrices, also in short ones at the
  edges, and one-dimensional in the runs of vectors (`blocks.regions`). It is
  computed as products with the cosine basis: 256 flops per element of a block
  of 64 x 64. A run of L elements of a vector needs a basis of L x L, 64 MiB at
  L = 4096.

  Args:
    x: a float32 leaf of any rank.
    block: height and width of the blocks of a matrix.
    layout: how leaves are cut, see `blocks.py`.

  Raises:
    ValueError: if a side of a block is longer than 32767.

  >>> print(dct(jnp.ones((2, 2)), (2, 2)).round(3) + 0.0)
  [[2. 0.]
   [0. 0.]]
  """
  return _each_block(x, block, layout, 'kh,nhw,lw->nkl')


def idct(
  x: jax.Array, block: tuple[int, int], layout: str = 'tiles'
) -> jax.Array:
  """Inverts `dct`; the inverse is also the transpose."""
  return _each_block(x, block, layout, 'kh,nkl,lw->nhw')


def basis(size: int) -> jax.Array:
  """Returns the orthonormal DCT-II: float32 [size, size], a frequency per row.

  basis[k, n] = sqrt((1 if k == 0 else 2) / size) cos(pi k (2 n + 1) / 2 size)

  >>> print(basis(2).round(4))
  [[ 0.7071  0.7071]
   [ 0.7071 -0.7071]]
  """
  if size > _LARGEST:
    raise ValueError(f'block: expected sides up to {_LARGEST}, got {size}')
  k_Kx1 = jnp.arange(size, dtype=jnp.int32)[:, None]
  n_1xN = jnp.arange(size, dtype=jnp.int32)[None]
  # Reduced to one turn as integers: float32 cosines of large angles are wrong.
  quarter_turns = k_Kx1 * (2 * n_1xN + 1) % (4 * size)
  angles = quarter_turns.astype(jnp.float32) * (math.pi / (2 * size))
  norms_Kx1 = jnp.where(k_Kx1 == 0, math.sqrt(1 / size), math.sqrt(2 / size))
  return norms_Kx1 * jnp.cos(angles)


def _each_block(
  x: jax.Array, block: tuple[int, int], layout: str, product: str
) -> jax.Array:
  """Returns the einsum `product` of bases and blocks, in the blocks' places."""

  def transform(part_NxL: jax.Array, r: blocks.Region) -> jax.Array:
    tiles_NxHxW = part_NxL.reshape(r.num_blocks, r.height, r.width)
    tiles_NxHxW = jnp.einsum(
      product,
      basis(r.height),
      tiles_NxHxW,
      basis(r.width),
      # The result is subtracted from the error: no bfloat16 products.
      precision=jax.lax.Precision.HIGHEST,
    )
    return tiles_NxHxW.reshape(part_NxL.shape)

  parts = blocks.cut(x, block, layout)
  corners = blocks.regions(x.shape, block, layout)
  parts = [transform(part, r) for part, r in zip(parts, corners, strict=True)]
  return blocks.join(parts, x.shape, block, layout)
