"""The selection of the k elements of largest magnitude of every block.

`lax.top_k` on the CPU keeps a heap, on one core. For large inputs a block is
first reduced to the maxima of groups of neighbors, and no element moves:
magnitudes are compared as the integers of their bits, the k-th largest is found
by bisection, and the chosen positions are read from a bitmap. This is plain
`lax` that vectorizes on every backend; benchmarks/compress.py measures it.
"""

import jax
import jax.numpy as jnp
from jax import lax

_GROUP = 8
_WORD = 32  # bits
# Elements below which the heap's milliseconds cost less than 0.5 s to compile.
_LARGE = 1 << 22


def select(blocks_NxL: jax.Array, k: int) -> jax.Array:
  """Returns the ascending indices of the k largest magnitudes of each block.

  The selection is exact. Of equal magnitudes the one with the lowest index is
  taken, so that a block has one answer on every machine.

  Args:
    blocks_NxL: blocks of L elements, any float dtype. A NaN is the largest.
    k: the number of elements kept of each block, 1 <= k <= L.

  Returns:
    int32 [N, k], strictly increasing along the last axis.

  >>> select(jnp.array([[1.0, -3.0, 3.0, 0.5]]), 2)
  Array([[1, 2]], dtype=int32)
  """
  if is_large(blocks_NxL, k):
    return select_by_groups(blocks_NxL, k)
  _, indices_NxK = lax.top_k(jnp.abs(blocks_NxL), k)
  return jnp.sort(indices_NxK, axis=1)


def is_large(blocks_NxL: jax.Array, k: int) -> bool:
  """Returns whether `select` searches by groups."""
  size = blocks_NxL.shape[1]
  # The groups must leave out half of the block to be worth their search.
  return (
    blocks_NxL.size >= _LARGE
    and size % _GROUP == 0
    and size >= 2 * _GROUP * k
    and jnp.finfo(blocks_NxL.dtype).bits <= 32
  )


def select_of_each(
  blocks_NxL: jax.Array, sizes_Nx1: jax.Array, ks_Nx1: jax.Array, most: int
) -> jax.Array:
  """Selects like `select`, from rows with blocks of their own size and k.

  Args:
    blocks_NxL: rows that begin with a block.
    sizes_Nx1: the size of the block of each row.
    ks_Nx1: how many elements are kept of it.
    most: K, the largest of `ks_Nx1`.

  Returns:
    int32 [N, K]; after the k indices of a row L, which is none.
  """
  size = blocks_NxL.shape[1]
  is_own_NxL = jnp.arange(size, dtype=jnp.int32)[None] < sizes_Nx1
  magnitude_NxL = jnp.where(is_own_NxL, jnp.abs(blocks_NxL), -1)
  _, indices_NxK = lax.top_k(magnitude_NxL, most)
  is_kept_NxK = jnp.arange(most, dtype=jnp.int32)[None] < ks_Nx1
  return jnp.sort(jnp.where(is_kept_NxK, indices_NxK, size), axis=1)


def select_by_groups(blocks_NxL: jax.Array, k: int) -> jax.Array:
  """Selects like `select`, faster for large inputs.

  It searches only the k groups of 8 neighbors that have the largest maxima;
  ties go to the lowest group. An element of any other group is preceded, by
  magnitude or at equal magnitude by index, by the maximum of each of those k
  groups; so it is not among the first k.

  Args:
    blocks_NxL: floats of at most 32 bits; L is a multiple of 8, at least 8 k.
    k: elements kept of each block.
  """
  n, size = blocks_NxL.shape
  groups_NxGx8 = blocks_NxL.reshape(n, size // _GROUP, _GROUP)
  # Without the barriers XLA repeats passes over the blocks in those over the
  # little that came of them: docs/benchmarks.md has the times.
  maxima_NxG = lax.optimization_barrier(
    jnp.max(_magnitude(groups_NxGx8), axis=2)
  )
  group_NxK = lax.optimization_barrier(_largest(maxima_NxG, k))
  candidates_NxKx8 = lax.optimization_barrier(
    _magnitude(jnp.take_along_axis(groups_NxGx8, group_NxK[:, :, None], axis=1))
  )
  candidate_NxK = _largest(candidates_NxKx8.reshape(n, k * _GROUP), k)
  candidate_NxK = lax.optimization_barrier(candidate_NxK)
  group_NxK = jnp.take_along_axis(group_NxK, candidate_NxK // _GROUP, axis=1)
  return group_NxK * _GROUP + candidate_NxK % _GROUP


def _magnitude(x: jax.Array) -> jax.Array:
  """Returns the bits of |x| as float32: int32 in the order of |x|."""
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  return bits & jnp.int32(0x7FFFFFFF)


def _largest(x_NxM: jax.Array, k: int) -> jax.Array:
  """Returns the ascending indices of the k largest of M >= k integers >= 0.

  Of equal integers the first are taken.
  """
  n, size = x_NxM.shape
  threshold_Nx1 = _threshold(x_NxM, k)[:, None]
  above_NxM = x_NxM > threshold_Nx1
  equal_NxM = x_NxM == threshold_Nx1
  wanted_Nx1 = k - jnp.sum(above_NxM, axis=1, keepdims=True, dtype=jnp.int32)
  last_Nx1 = nth_one(bitmap(equal_NxM), wanted_Nx1 - 1)
  index_1xM = jnp.arange(size, dtype=jnp.int32)[None]
  chosen_NxM = above_NxM | (equal_NxM & (index_1xM <= last_Nx1))
  rank_1xK = jnp.arange(k, dtype=jnp.int32)[None]
  return nth_one(bitmap(chosen_NxM), jnp.broadcast_to(rank_1xK, (n, k)))


def _threshold(x_NxM: jax.Array, k: int) -> jax.Array:
  """Returns the k-th largest, or any value that exactly k reach: int32 [N]."""
  n, size = x_NxM.shape
  # Counted by column first, which vectorizes, and the barrier keeps it so.
  columns_NxRx32 = jnp.pad(
    x_NxM, ((0, 0), (0, -size % _WORD)), constant_values=-1
  ).reshape(n, -1, _WORD)

  def is_open(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
    low_N, high_N = bounds
    return jnp.any(low_N < high_N)

  def halve(
    bounds: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, jax.Array]:
    low_N, high_N = bounds
    middle_N = high_N - (high_N - low_N) // 2  # rounds up, cannot overflow
    reached_NxRx32 = columns_NxRx32 >= middle_N[:, None, None]
    count_Nx32 = lax.optimization_barrier(
      jnp.sum(reached_NxRx32, axis=1, dtype=jnp.int32)
    )
    count_N = jnp.sum(count_Nx32, axis=1)
    high_N = jnp.where(count_N < k, middle_N - 1, high_N)
    return (
      jnp.where(count_N < k, low_N, middle_N),
      jnp.where(count_N == k, middle_N, high_N),
    )

  bounds = jnp.min(x_NxM, axis=1), jnp.max(x_NxM, axis=1)
  return lax.while_loop(is_open, halve, bounds)[0]


def bitmap(mask_NxM: jax.Array) -> jax.Array:
  """Returns uint32 [N, ceil(M / 32)], the first element in the lowest bit."""
  n, size = mask_NxM.shape
  padded = jnp.pad(mask_NxM, ((0, 0), (0, -size % _WORD)))
  bit = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)[None, None]
  return jnp.sum(
    jnp.where(padded.reshape(n, -1, _WORD), bit, jnp.uint32(0)),
    axis=2,
    dtype=jnp.uint32,
  )


def nth_one(words_NxW: jax.Array, n_NxK: jax.Array) -> jax.Array:
  """Returns the position of the n-th one, counting from zero: int32 [N, K].

  The result is arbitrary if there are fewer ones.
  """
  count_NxW = lax.population_count(words_NxW).astype(jnp.int32)
  total_NxW = jnp.cumsum(count_NxW, axis=1)
  word_NxK = jnp.sum(
    total_NxW[:, None, :] <= n_NxK[:, :, None], axis=2, dtype=jnp.int32
  )
  word_NxK = jnp.minimum(word_NxK, words_NxW.shape[1] - 1)
  left_NxK = n_NxK - jnp.take_along_axis(
    total_NxW - count_NxW, word_NxK, axis=1
  )
  bits_NxK = jnp.take_along_axis(words_NxW, word_NxK, axis=1)
  index_NxK = word_NxK * _WORD
  for half in (16, 8, 4, 2, 1):
    low_NxK = bits_NxK & jnp.uint32((1 << half) - 1)
    ones_NxK = lax.population_count(low_NxK).astype(jnp.int32)
    is_high = left_NxK >= ones_NxK
    index_NxK += jnp.where(is_high, half, 0)
    left_NxK -= jnp.where(is_high, ones_NxK, 0)
    bits_NxK = jnp.where(is_high, bits_NxK >> half, low_NxK)
  return index_NxK
