"""The discrete cosine transform of every block, and top-k of what it gives.

DeMo (arXiv 2411.19870) selects coefficients instead of elements: what moves
together in a block is then sent in a few numbers. The transform is orthonormal,
so norms are the same on both sides and the largest coefficients are the best
ones to keep.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from covenant.optim import blocks
from covenant.optim import compression

_LARGEST = 2**15 - 1  # beyond it, k * (2 n + 1) leaves int32


def dct(
  x: jax.Array, block: tuple[int, int], layout: str = 'tiles'
) -> jax.Array:
  """Orthonormal DCT-II of each block of `x`, in the place of the block.

  Two-dimensional in the blocks of matrices, short ones at the edges included;
  one-dimensional in the runs that vectors are cut in (`blocks.regions`). Done
  as products with the cosine basis: of a block of 64 x 64 that is 256 flops
  an element. A vector's run of L elements needs a basis of L x L, 64 MiB at
  L = 4096, while it is transformed.

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
  """The inverse of `dct`, which is also its transpose."""
  return _each_block(x, block, layout, 'kh,nkl,lw->nhw')


def basis(size: int) -> jax.Array:
  """The orthonormal DCT-II: float32 [size, size], one frequency a row.

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


@dataclasses.dataclass(frozen=True)
class DCTTopK(compression.TopK):
  """`TopK` of the DCT coefficients of every block, as DeMo sends them.

  Attributes and messages are those of `TopK`; indices mean frequencies. `Sums`
  hold coefficients: peers are averaged before the inverse, frequency by
  frequency over those who sent it (DeMo, arXiv 2411.19870).
  """

  def keep(self, x: jax.Array) -> tuple[compression.Kept, ...]:
    return super().keep(dct(x, self.block, self.layout))

  def decompress(self, part: Any, shape: Sequence[int]) -> jax.Array:
    # `TopK` writes straight into the leaf, not by way of `join`.
    return idct(super().decompress(part, shape), self.block, self.layout)

  def join(
    self, regions: Sequence[jax.Array], shape: Sequence[int]
  ) -> jax.Array:
    return idct(super().join(regions, shape), self.block, self.layout)


def _each_block(
  x: jax.Array, block: tuple[int, int], layout: str, product: str
) -> jax.Array:
  """`product` of (basis of the height, the blocks, basis of the width)."""

  def transform(part_NxL: jax.Array, r: blocks.Region) -> jax.Array:
    tiles_NxHxW = part_NxL.reshape(r.num_blocks, r.height, r.width)
    tiles_NxHxW = jnp.einsum(
      product,
      basis(r.height),
      tiles_NxHxW,
      basis(r.width),
      # What was sent is subtracted from the error: no bfloat16 products.
      precision=jax.lax.Precision.HIGHEST,
    )
    return tiles_NxHxW.reshape(part_NxL.shape)

  parts = blocks.cut(x, block, layout)
  corners = blocks.regions(x.shape, block, layout)
  parts = [transform(part, r) for part, r in zip(parts, corners, strict=True)]
  return blocks.join(parts, x.shape, block, layout)
