"""Copies of sharded arrays on the host.

The devices of an array may belong to several processes. Then all of them call
these functions alike, and each gets the whole: the devices gather it piece by
piece, so that none holds much more of the array than its shard.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct

_PIECE = 1 << 26  # elements of a piece that devices gather


def whole(x: ct.Array) -> np.ndarray:
  """Returns an array on the host."""
  if _is_here(x):
    return np.asarray(x)
  filled, first = np.empty(x.shape, x.dtype), 0
  for part in stream(x, _PIECE):
    filled[first : first + len(part)] = part
    first += len(part)
  return filled


def stream(x: ct.Array, budget: int) -> Iterator[np.ndarray]:
  """Yields an array on the host piece by piece, in row-major order.

  A piece has up to `budget` elements, or one index of the first axis. Each
  piece is gathered on the host if this process has all shards.
  """
  is_here = _is_here(x)
  if not isinstance(x, jax.Array) or (is_here and x.size <= budget):
    yield np.asarray(x)
    return
  n = min(max(budget * x.shape[0] // x.size, 1), x.shape[0])
  for first in range(0, x.shape[0], n):
    last = min(first + n, x.shape[0])
    if is_here:
      yield _rows_here(x, first, last)
    else:
      where = x.sharding
      assert isinstance(where, jax.NamedSharding)
      yield np.asarray(_rows(x, np.int32(first), where, last - first))


def _is_here(x: ct.Array) -> bool:
  """Returns True if this process has all of an array."""
  if not isinstance(x, jax.Array):
    return True
  return x.is_fully_addressable or x.is_fully_replicated


def _rows_here(x: jax.Array, first: int, last: int) -> np.ndarray:
  """Returns rows of an array whose shards are on devices of this process."""
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0)[first:last])
  piece = np.empty((last - first, *x.shape[1:]), x.dtype)
  for shard in x.addressable_shards:
    start, stop, _ = shard.index[0].indices(x.shape[0])
    low, high = max(start, first), min(stop, last)
    if shard.replica_id == 0 and low < high:
      here = jax.lax.dynamic_slice_in_dim(shard.data, low - start, high - low)
      piece[low - first : high - first, *shard.index[1:]] = here
  return piece


@functools.partial(jax.jit, static_argnames=('where', 'n'))
def _rows(
  x: jax.Array, first: ct.Scalar, where: jax.NamedSharding, n: int
) -> jax.Array:
  """Returns rows of an array on every device of its mesh."""
  spec = (*where.spec, *(None,) * (x.ndim - len(where.spec)))
  down, *across = map(_names, spec)

  def local(x: jax.Array, first: ct.Scalar) -> jax.Array:
    index = first + jnp.arange(n)
    if down:
      index -= jax.lax.axis_index(down) * x.shape[0]
    rows = jnp.take(x, jnp.clip(index, 0, x.shape[0] - 1), axis=0)
    for axis, names in enumerate(across, start=1):
      for name in reversed(names):
        rows = jax.lax.all_gather(rows, name, axis=axis, tiled=True)
    if not down:
      return rows
    # Of each row one shard has the bits, and all others add zeros.
    bits = rows.view(f'uint{8 * rows.dtype.itemsize}')
    is_mine = ((index >= 0) & (index < x.shape[0])).reshape(
      -1, *(1,) * (x.ndim - 1)
    )
    bits = jax.lax.psum(jnp.where(is_mine, bits, 0), down)
    return bits.view(rows.dtype)

  return jax.shard_map(
    local,
    mesh=where.mesh,
    in_specs=(jax.P(*spec), jax.P()),
    out_specs=jax.P(),
    check_vma=False,
  )(x, first)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)
