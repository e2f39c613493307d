"""Leaves as few arrays, so that a program does not grow with their number.

Where the blocks of a leaf are compressed independently of each other, blocks of
all leaves become the rows of one array. Shorter blocks are padded, as long as
this does not double the array or cost milliseconds. Other leaves are stacked
with those of their shape.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import block_groups
from covenant.optim import blocks
from covenant.optim import collectives
from covenant.optim import compression as compression_lib
from covenant.optim import exact

Compression = compression_lib.Compression
_Members = list[tuple[int, int, int]]  # leaf, its region, number of blocks
_PADDING = 1 << 20  # elements of padding that one program less is worth


class Batch(NamedTuple):
  """G elements that are compressed alike: leaves, or one array of blocks."""

  compression: Compression  # of an element; `BlockGroups` of blocks
  shape: tuple[int, ...]  # of an element
  axes: tuple[str, ...]  # mesh axes of the leaves' shards
  groups: list[_Members]  # one of leaves, or one of each size of blocks

  @property
  def members(self) -> _Members:
    """All members, in order."""
    return list(itertools.chain(*self.groups))

  @property
  def of_blocks(self) -> bool:
    """True if its only element is an array of blocks."""
    return isinstance(self.compression, block_groups.BlockGroups)

  @property
  def elements(self) -> int:
    """G, the number of elements."""
    return 1 if self.of_blocks else len(self.members)

  @property
  def owners(self) -> np.ndarray:
    """The leaf of each element, or of each block of the only element."""
    leaves, _, counts = zip(*self.members, strict=True)
    return np.repeat(np.array(leaves, np.int32), counts)


class Batches:
  """The batches of the leaves of a tree.

  Args:
    leaves: arrays, or their shapes.
    compressions: the compressor of each leaf.
    shards: the mesh axes of each leaf's shards.
  """

  def __init__(
    self,
    leaves: Sequence[Any],
    compressions: Sequence[Compression],
    shards: Sequence[tuple[str, ...]],
  ):
    self._shapes = [tuple(x.shape) for x in leaves]
    self._compressions = list(compressions)
    stacks: dict[Any, _Members] = {}
    sizes: dict[Any, dict[tuple[int, int], _Members]] = {}
    for i, (shape, one, axes) in enumerate(
      zip(self._shapes, self._compressions, shards, strict=True)
    ):
      if not _is_cut(one):
        stacks.setdefault((one, shape, axes), []).append((i, 0, 1))
        continue
      for at, region in enumerate(one.regions(shape)):
        size, k = region.block_size, one.block_k(region.block_size)
        own = sizes.setdefault((one.quantizer, axes), {}).setdefault(
          (size, k), []
        )
        own.append((i, at, region.num_blocks))
    self._batches = [
      Batch(one, shape, axes, [members])
      for (one, shape, axes), members in stacks.items()
    ]
    for (quantizer, axes), of_sizes in sizes.items():
      for groups in _joined(of_sizes):
        one = block_groups.BlockGroups(tuple(groups), quantizer)
        members = [of_sizes[group.size, group.k] for group in groups]
        self._batches.append(Batch(one, one.shape, axes, members))

  def __iter__(self) -> Iterator[Batch]:
    return iter(self._batches)

  def split(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the elements of each batch: [G, *shape]."""
    parts = [
      blocks.cut(x, one.block, one.layout) if _is_cut(one) else (x,)
      for x, one in zip(leaves, self._compressions, strict=True)
    ]
    arrays = []
    for batch in self:
      groups = [[parts[i][at] for i, at, _ in own] for own in batch.groups]
      if batch.of_blocks:
        rows = [_padded(jnp.concatenate(x), batch.shape[-1]) for x in groups]
        groups = [[jnp.concatenate(rows).reshape(batch.shape)]]
      arrays.append(jnp.stack(groups[0]))
    return arrays

  def merge(self, *trees: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """Returns the leaves that `split` took apart, of each of its results."""
    starts = [
      start
      for batch in self
      for members in batch.groups
      for start in itertools.accumulate(
        [0, *(count for _, _, count in members[:-1])]
      )
    ]
    offsets = _opaque(starts)
    return [self._merge(arrays, offsets) for arrays in trees]

  def _merge(
    self, results: Sequence[jax.Array], starts: Sequence[jax.Array]
  ) -> list[jax.Array]:
    offsets = iter(starts)
    parts: list[dict[int, jax.Array]] = [{} for _ in self._shapes]
    for batch, x in zip(self, results, strict=True):
      arrays = [x]
      if isinstance(batch.compression, block_groups.BlockGroups):
        rows_NxL = x.reshape(-1, batch.shape[-1])
        arrays = [
          rows_NxL[rows, : g.size] for g, rows in batch.compression.rows()
        ]
      for array, members in zip(arrays, batch.groups, strict=True):
        for i, at, count in members:
          part = jax.lax.dynamic_slice_in_dim(
            array, next(offsets), count, allow_negative_indices=False
          )
          parts[i][at] = part if batch.of_blocks else part[0]
    leaves = []
    for shape, one, own in zip(
      self._shapes, self._compressions, parts, strict=True
    ):
      if _is_cut(one):
        regions = [own[at] for at in range(len(own))]
        leaves.append(blocks.join(regions, shape, one.block, one.layout))
      else:
        leaves.append(own[0])
    return leaves


def _joined(
  sizes: dict[tuple[int, int], _Members],
) -> Iterator[list[block_groups.Group]]:
  """Yields the groups that share an array, the longest blocks first.

  Args:
    sizes: the members with blocks of each size and k.
  """
  groups: list[block_groups.Group] = []
  values = padding = 0
  for (size, k), members in sorted(sizes.items(), reverse=True):
    group = block_groups.Group(sum(n for _, _, n in members), size, k)
    values += group.count * size
    if groups:
      padding += group.count * (groups[0].size - size)
    if padding > min(values, _PADDING):
      yield groups
      groups, values, padding = [], group.count * size, 0
    groups.append(group)
  if groups:
    yield groups


def _padded(rows: jax.Array, size: int) -> jax.Array:
  return jnp.pad(rows, ((0, 0), (0, size - rows.shape[1])))


def axes(batches: Batches) -> tuple[str, ...]:
  """Returns the mesh axes that any leaf is sharded along."""
  return tuple(sorted({axis for b in batches for axis in b.axes}))


def each(f: Callable[..., Any], xs: ct.PyTree) -> ct.PyTree:
  """Returns the results of `f(*x)` for each row of `xs`, stacked."""
  if jax.tree.leaves(xs)[0].shape[0] == 1:
    first = jax.tree.map(lambda x: x[0], xs)
    return jax.tree.map(lambda x: x[None], f(*first))
  return jax.lax.map(lambda row: f(*row), xs)


def mapped(f: Callable[..., Any], xs: tuple[ct.PyTree, ...]) -> ct.PyTree:
  """Returns `jax.vmap(f)(*xs)`; one row alone needs no slower scatter."""
  is_one = jax.tree.leaves(xs)[0].shape[0] == 1
  return each(f, xs) if is_one else jax.vmap(f)(*xs)


def rows(batch: Batch, values: list[jax.Array]) -> tuple[Any, np.ndarray]:
  """Returns values as rows of one tensor each, [T, R, W], and the tensors."""
  owners_T = batch.owners
  if batch.of_blocks:
    rows_TxRxV = values[0][0].transpose(1, 0, 2)
  else:
    g, r = values[0].shape[:2] if values else (batch.elements, 1)
    rows_TxRxV = jnp.concatenate([x.reshape(g, r, -1) for x in values], axis=2)
  t, r, size = rows_TxRxV.shape
  width = min(size, exact.ROW) or 1
  padded = jnp.pad(rows_TxRxV, ((0, 0), (0, 0), (0, -size % width)))
  rows = padded.reshape(t, r, -1, width).transpose(0, 2, 1, 3)
  return rows.reshape(-1, r, width), np.repeat(owners_T, rows.shape[1])


def once(f: Callable[..., ct.PyTree], *arrays: ct.PyTree) -> ct.PyTree:
  """Returns `f(*arrays)`, which XLA computes once, not in each of its uses."""
  like = jax.eval_shape(f, *arrays)

  def never(arrays: ct.PyTree) -> ct.PyTree:
    # One of `arrays` would be copied, and so would what `f` returns.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return collectives.typed_like(zeros, arrays)

  return jax.lax.cond(
    jax.lax.optimization_barrier(jnp.array(True)),
    lambda arrays: collectives.typed_like(f(*arrays), arrays),
    never,
    arrays,
  )


def _opaque(numbers: Sequence[int]) -> Sequence[jax.Array]:
  """Returns int32 scalars that XLA does not take for constants.

  Slices of one size at such offsets are one compiled function; at constant
  offsets XLA compiles each slice anew, for most of the time of a program.
  """

  def scalars(shift: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.array(n + shift, jnp.int32) for n in numbers)

  return jax.lax.cond(
    jax.lax.optimization_barrier(jnp.array(True)),
    lambda: scalars(0),
    lambda: scalars(1),
  )


def _is_cut(one: Any) -> TypeGuard[compression_lib.TopK]:
  """Returns whether blocks of different leaves may be compressed together."""
  return isinstance(one, compression_lib.TopK) and one.is_blockwise
