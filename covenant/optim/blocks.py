"""The blocks of a tensor, which are compressed independently.

Both layouts cut a stack of matrices (layers under scan) per matrix.

'tiles', the layout of the paper, cuts a matrix into blocks of
`block = (height, width)` and a vector into runs of height * width elements. If
a side does not divide, the rest is a region of smaller blocks: a leaf has up to
four regions, each a plain `[N, L]` array. All blocks have one density.

'divisors', the layout of the deployed system (Templar), cuts a side by its
largest divisor up to the block's, a vector by its largest divisor up to the
block's width, and keeps the same k of blocks of any size. A leaf has one
region, and a vector is in effect sent dense.

Nothing is padded, so padding can neither be selected nor sent.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LAYOUTS = ('tiles', 'divisors')


class Region(NamedTuple):
  """A part of a leaf that blocks of one size tile; static integers."""

  stack: int  # matrices stacked in front: product of the leading dimensions
  rows: tuple[int, int]  # start and stop
  columns: tuple[int, int]
  height: int  # of one block
  width: int

  @property
  def num_blocks(self) -> int:
    down = (self.rows[1] - self.rows[0]) // self.height
    across = (self.columns[1] - self.columns[0]) // self.width
    return self.stack * down * across

  @property
  def block_size(self) -> int:
    return self.height * self.width


def regions(
  shape: Sequence[int], block: tuple[int, int], layout: str = 'tiles'
) -> tuple[Region, ...]:
  """Returns the regions of a leaf, in row-major order of their corners.

  >>> def sizes(*args):
  ...   return [(r.num_blocks, r.block_size) for r in regions(*args)]
  >>> sizes((128, 192), (64, 64))
  [(6, 4096)]
  >>> sizes((2, 100, 64), (64, 64)), sizes((2, 100, 64), (64, 64), 'divisors')
  ([(2, 4096), (2, 2304)], [(4, 3200)])
  >>> sizes((5000,), (64, 64)), sizes((5000,), (64, 64), 'divisors')
  ([(1, 4096), (1, 904)], [(100, 50)])

  Raises:
    ValueError: if 'divisors' leaves blocks of one element, of which the
      reference would take two.
  """
  if 0 in shape:
    return ()
  stack, rows, columns = matrices(shape)
  if layout == 'divisors':
    height, width = _divisor(rows, block[0]), _divisor(columns, block[1])
    if height * width == 1:
      raise ValueError(
        f"layout 'divisors': a leaf of shape {tuple(shape)} has no divisor "
        f'from 2 to {block[1]} to cut it by, and at least two values are sent '
        "of a block; resize the leaf or use layout 'tiles'"
      )
  elif len(shape) > 1:
    height, width = block
  else:
    height, width = 1, block[0] * block[1]
  return tuple(
    Region(stack, (top, bottom), (left, right), h, w)
    for (top, bottom, h), (left, right, w) in itertools.product(
      _spans(rows, height), _spans(columns, width)
    )
  )


def block_k(
  k: int, block: tuple[int, int], block_size: int, layout: str = 'tiles'
) -> int:
  """Returns the number of elements kept of a block of `block_size`.

  'tiles' keeps the density of a full block; 'divisors' keeps k, or all of a
  shorter block, but at least two and an even number, for 12-bit index pairs.

  >>> block_k(64, (64, 64), 4096), block_k(64, (64, 64), 64)
  (64, 1)
  >>> [block_k(64, (64, 64), size, 'divisors') for size in (4096, 64, 13)]
  [64, 64, 12]
  """
  if layout == 'divisors':
    k = max(2, min(k, block_size))
    return k - k % 2
  return max(1, math.floor(k * block_size / (block[0] * block[1]) + 0.5))


def index_dtype(block_size: int) -> np.dtype:
  """Returns the type of indices in a block: two bytes where they suffice.

  >>> index_dtype(64 * 64)
  dtype('uint16')
  """
  return np.dtype(np.uint16 if block_size <= 2**16 else np.int32)


def cut(
  x: jax.Array, block: tuple[int, int], layout: str = 'tiles'
) -> tuple[jax.Array, ...]:
  """Returns the blocks of each region of `x`, as `[N, L]` arrays."""
  corners = regions(x.shape, block, layout)
  if len(corners) == 1 and _is_in_order(corners[0]):
    return (x.reshape(corners[0].num_blocks, corners[0].block_size),)
  x_SxRxC = x.reshape(matrices(x.shape))
  return tuple(_cut(x_SxRxC, r) for r in corners)


def join(
  parts: Sequence[jax.Array],
  shape: Sequence[int],
  block: tuple[int, int],
  layout: str = 'tiles',
) -> jax.Array:
  """Returns the leaf of `shape` that `cut` took apart."""
  corners = regions(shape, block, layout)
  if len(corners) == 1 and _is_in_order(corners[0]):
    return parts[0].reshape(tuple(shape))
  joined = [_join(p, r) for p, r in zip(parts, corners, strict=True)]
  across = len({r.columns for r in corners}) or 1
  bands = [
    jnp.concatenate(joined[i : i + across], axis=2) if across > 1 else joined[i]
    for i in range(0, len(joined), across)
  ]
  if not bands:
    return jnp.zeros(tuple(shape), jnp.float32)
  x_SxRxC = jnp.concatenate(bands, axis=1) if len(bands) > 1 else bands[0]
  return x_SxRxC.reshape(tuple(shape))


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
  """Returns the matrices in a leaf's stack, their rows and their columns."""
  rows, columns = (1, 1, *shape)[-2:]
  return math.prod(shape[:-2]), rows, columns


def _divisor(size: int, largest: int) -> int:
  """Returns the largest divisor of `size` that is at most `largest`."""
  return next(d for d in range(largest, 0, -1) if size % d == 0)


def _spans(size: int, side: int) -> list[tuple[int, int, int]]:
  """Returns (start, stop, block side) of the whole blocks, and of the rest."""
  whole = size // side * side
  spans = [(0, whole, side), (whole, size, size - whole)]
  return [span for span in spans if span[1] > span[0]]


def _cut(x_SxRxC: jax.Array, r: Region) -> jax.Array:
  part = x_SxRxC[:, r.rows[0] : r.rows[1], r.columns[0] : r.columns[1]]
  s, height, width = part.shape
  if _is_in_order(r):
    return part.reshape(r.num_blocks, r.block_size)
  tiles = part.reshape(
    s, height // r.height, r.height, width // r.width, r.width
  )
  return tiles.transpose(0, 1, 3, 2, 4).reshape(r.num_blocks, r.block_size)


def _join(blocks_NxL: jax.Array, r: Region) -> jax.Array:
  height = r.rows[1] - r.rows[0]
  width = r.columns[1] - r.columns[0]
  if _is_in_order(r):
    return blocks_NxL.reshape(r.stack, height, width)
  tiles = blocks_NxL.reshape(
    r.stack, height // r.height, width // r.width, r.height, r.width
  )
  return tiles.transpose(0, 1, 3, 2, 4).reshape(r.stack, height, width)


def _is_in_order(r: Region) -> bool:
  """Returns whether blocks follow each other as their elements do."""
  return r.height == 1 or r.columns[1] - r.columns[0] == r.width
