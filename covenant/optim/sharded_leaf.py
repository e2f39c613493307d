"""A leaf of a large model: how it is sharded, and how it is cut into slices.

A leaf may be sharded over the devices of one miner. Its shards consist of whole
blocks of the compressor, and blocks are compressed independently: inside
`jax.shard_map` every device works on its own shard, slice by slice of whole
rows of blocks, and needs memory for a few slices. Only statistics of a whole
tensor cross devices. Messages have one form on every mesh: blocks in row-major
order of matrix in the stack, row and column.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import block_rows
from covenant.optim import blocks
from covenant.optim import compression as compression_lib
from covenant.optim import quantize

Mesh: TypeAlias = jax.sharding.Mesh | jax.sharding.AbstractMesh
_Axes: TypeAlias = str | tuple[str, ...] | None  # an entry of a spec
BUDGET = 1 << 26  # elements of a slice on one device


class SplitPacket(NamedTuple):
  """A packet taken apart into arrays with one row per block and the rest."""

  rows: ct.PyTree  # a tuple: indices, codes and a block's own scales, [N, ...]
  shared: ct.PyTree  # scales of all blocks


def split(
  packet: compression_lib.Packet, quantizer: quantize.Quantizer
) -> SplitPacket:
  """Takes a packet of NumPy or JAX arrays apart."""
  first = quantizer.scale_shape(0)[0]
  rows = (packet.indices, packet.codes)
  if quantizer.scale_shape(1)[0] > first:
    rows += (packet.scales[first:],)
  return SplitPacket(rows, packet.scales[:first])


def join(
  packet: SplitPacket, concatenate: Callable[..., ct.Array] = jnp.concatenate
) -> compression_lib.Packet:
  """Inverts `split`; `concatenate` is NumPy's for NumPy arrays."""
  indices, codes, *own = packet.rows
  scales = concatenate([packet.shared, *own]) if own else packet.shared
  return compression_lib.Packet(indices, codes, scales)


@dataclasses.dataclass(frozen=True)
class ShardedLeaf:
  """The layout of a tensor on a mesh, and its slices.

  A local array is that of one shard, as seen in `jax.shard_map`.
  """

  shape: tuple[int, ...]  # of the whole tensor
  spec: jax.P  # one entry per dimension
  mesh: Mesh | None  # of one miner; None: one device
  # Sides of its blocks, (1, 1) if it is sent dense; None if blocks are of
  # several sizes. Then it is neither sharded nor sliced.
  block: tuple[int, int] | None
  slices: int = 1

  @property
  def axes(self) -> tuple[str, ...]:
    """The mesh axes of its shards: those of rows, then of columns."""
    return (*_names(self._sides[0]), *_names(self._sides[1]))

  @property
  def local_shape(self) -> tuple[int, ...]:
    down, across = self._shards
    _, rows, columns = blocks.matrices(self.shape)
    sides = (*self.shape[:-2], rows // down, columns // across)
    return sides[-len(self.shape) :] if self.shape else ()

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """The local shape of a slice."""
    if self.slices == 1:
      return self.local_shape
    stack, rows, columns = blocks.matrices(self.local_shape)
    return stack * rows // self.slices, columns

  @property
  def abstract_slice(self) -> jax.ShapeDtypeStruct:
    """A local slice without values."""
    return jax.ShapeDtypeStruct(self.slice_shape, jnp.float32)

  @property
  def abstract(self) -> jax.ShapeDtypeStruct:
    """The whole leaf in float32, without values."""
    sharding = self.mesh and jax.NamedSharding(self.mesh, self.spec)
    return jax.ShapeDtypeStruct(self.shape, jnp.float32, sharding=sharding)

  def abstract_stacked(
    self, x: ct.Array | jax.ShapeDtypeStruct
  ) -> jax.ShapeDtypeStruct:
    """Returns the array that local arrays like `x` form by `stacked`."""
    spec, shape = jax.P(), x.shape
    if self.axes and shape:
      spec = self.stacked
      shape = (math.prod(self._shards) * shape[0], *shape[1:])
    sharding = self.mesh and jax.NamedSharding(self.mesh, spec)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

  @property
  def stacked(self) -> jax.P:
    """The spec of arrays that concatenate those of the shards."""
    return jax.P(self.axes) if self.axes else jax.P()

  @property
  def slice_spec(self) -> jax.P:
    """The spec of a slice that is the whole leaf, or is `put` into it."""
    return self.spec if self.slices == 1 else self.stacked

  @property
  def grid_spec(self) -> jax.P:
    """The spec of the arrays that `grid` returns."""
    return jax.P(None, *self._sides, None) if self.axes else jax.P()

  @property
  def _sides(self) -> tuple[_Axes, _Axes]:
    """The entries of the spec for rows and for columns."""
    *_, rows, columns = (None, None, *self.spec)
    return rows, columns

  @property
  def _shards(self) -> tuple[int, int]:
    """The number of shards down and across."""
    if self.mesh is None:
      return 1, 1
    shards = self.mesh.shape
    down, across = (
      math.prod(shards[name] for name in _names(side)) for side in self._sides
    )
    return down, across

  @property
  def _local_grid(self) -> tuple[int, int, int]:
    """Matrices, and rows and columns of blocks."""
    assert self.block is not None
    stack, rows, columns = blocks.matrices(self.local_shape)
    return stack, rows // self.block[0], columns // self.block[1]

  def on_shards(
    self, f: Callable[..., ct.PyTree], in_specs: ct.PyTree, out_specs: ct.PyTree
  ) -> Callable[..., ct.PyTree]:
    """Returns `f`, a function of local arrays, as one of whole arrays."""
    if self.mesh is None:
      return f
    return jax.shard_map(
      f,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      # Types do not follow what comes of a `psum` through a concatenation.
      check_vma=False,
    )

  def take(self, x: jax.Array, index: ct.Scalar) -> jax.Array:
    """Returns slice `index` of a local array."""
    if self.slices == 1:
      return x
    x_RxC = x.reshape(-1, x.shape[-1])
    n = x_RxC.shape[0] // self.slices
    return jax.lax.dynamic_slice_in_dim(x_RxC, index * n, n)

  def replace(
    self, x: jax.Array, part: jax.Array, index: ct.Scalar
  ) -> jax.Array:
    """Returns a whole leaf with slice `index` replaced, in place if it can.

    Args:
      x: the leaf; consumed.
      part: the slices of all shards, by `slice_spec`.
      index: the index of the slice.
    """
    return part if self.slices == 1 else put(x, part, index, leaf=self)

  def each(
    self, body: Callable[[ct.Scalar, ct.PyTree], ct.PyTree], carry: ct.PyTree
  ) -> ct.PyTree:
    """Returns `carry` after `carry = body(index, carry)` for every slice."""
    if self.slices == 1:
      return body(0, carry)
    return jax.lax.fori_loop(0, self.slices, body, carry)

  def take_packet(self, packet: SplitPacket, index: ct.Scalar) -> SplitPacket:
    """Returns slice `index` of a local packet that `grid` returned."""
    rows = (x.reshape(-1, x.shape[-1]) for x in packet.rows)
    return packet._replace(rows=tuple(self.take(x, index) for x in rows))

  def put_rows(
    self, rows: ct.PyTree, part: ct.PyTree, index: ct.Scalar
  ) -> ct.PyTree:
    """Returns a tree of local arrays [N, ...] with slice `index` replaced."""
    if self.slices == 1:
      return part
    return jax.tree.map(lambda x, p: _put_rows(x, p, index), rows, part)

  def grid(self, packet: SplitPacket) -> SplitPacket:
    """Returns a local packet with its blocks in a grid [S, R, C, ...].

    The whole packet, flattened, is then in the order of messages.
    """
    if not self.axes:
      return packet
    grid = self._local_grid
    rows = tuple(x.reshape(*grid, x.shape[-1]) for x in packet.rows)
    return packet._replace(rows=rows)

  def scatter_slice(
    self, part: ct.Message, index: int, quantizer: quantize.Quantizer | None
  ) -> ct.PyTree:
    """Puts slice `index` of a received part of a message on the mesh.

    Args:
      part: the part of the whole leaf, NumPy arrays.
      index: the index of the slice.
      quantizer: the quantizer of the packets; None if the part is dense.

    Returns:
      A tuple of one packet per region, of arrays by the spec `stacked`; or an
      array.
    """
    if quantizer is None:
      return self._scatter(part, index, self.slice_shape)
    packets = []
    # Blocks of several sizes are copied as they are.
    number = math.prod(self._local_grid) // self.slices if self.block else 0
    for packet in part:
      whole = split(packet, quantizer)
      rows = tuple(
        self._scatter(x, index, (number, x.shape[-1])) for x in whole.rows
      )
      packets.append(SplitPacket(rows, self._copied(whole.shared)))
    return tuple(packets)

  def _scatter(
    self, x: ct.Array | block_rows.BlockRows, index: int, shape: tuple[int, ...]
  ) -> ct.Array:
    """Puts slice `index`, of a local shape, of an array of a message there."""
    if self.slices == 1 and not self.axes:
      return self._copied(x)
    stack, high, wide = self._local_grid
    down, across = self._shards
    n = stack * high // self.slices  # rows of blocks
    top, left = divmod(index * n, high)
    some = range(top, top + max(n // high, 1))
    rows = range(left, left + min(n, high))
    grid = stack, down, high, across, wide
    x_SxDxHxAxWxT = block_rows.take(x, grid, some, rows)

    def of_shard(number: int) -> np.ndarray:
      i, j = divmod(number, across)
      return x_SxDxHxAxWxT[:, i, :, j].reshape(shape)

    def at(where: tuple[slice, ...] | None) -> np.ndarray:
      assert where is not None
      return of_shard((where[0].start or 0) // shape[0])

    if self.mesh is None or not self.axes:
      return self._copied(of_shard(0))
    size = (down * across * shape[0], *shape[1:])
    where = jax.NamedSharding(self.mesh, self.stacked)
    return jax.make_array_from_callback(size, where, at)

  def _copied(self, x: ct.Array | block_rows.BlockRows) -> ct.Array:
    """Returns an array with a copy on every device."""
    x = np.asarray(x)
    if self.mesh is None:
      return x
    where = jax.NamedSharding(self.mesh, jax.P())
    return jax.make_array_from_callback(x.shape, where, lambda _: x)


@functools.partial(jax.jit, static_argnames=('leaf',), donate_argnames=('x',))
def put(
  x: jax.Array, part: jax.Array, index: ct.Scalar, leaf: ShardedLeaf
) -> jax.Array:
  """Puts a slice into a leaf in place, see `ShardedLeaf.replace`.

  It is a program of its own: XLA copies an array that one program both reads
  and writes.
  """

  def local(x: jax.Array, part: jax.Array, index: ct.Scalar) -> jax.Array:
    x_RxC = x.reshape(-1, x.shape[-1])
    return _put_rows(x_RxC, part, index).reshape(x.shape)

  in_specs = leaf.spec, leaf.stacked, jax.P()
  return leaf.on_shards(local, in_specs, leaf.spec)(x, part, index)


def leaves(
  abstract_params: ct.Params,
  compression: compression_lib.Compression,
  mesh: Mesh | None = None,
  specs: ct.PyTree = None,
  budget: int = BUDGET,
) -> list[ShardedLeaf]:
  """Returns the leaves of a tree with their slices, in leaf order.

  Args:
    abstract_params: the parameters or their shapes.
    compression: the compressor that makes the messages.
    mesh: that of one miner; None is one device.
    specs: how each leaf is sharded, a tree of `jax.P`.
    budget: elements of a slice of a shard. Slices are larger if one row of
      blocks has more, or if blocks are of several sizes.

  Raises:
    ValueError: a shard does not consist of whole blocks; names the leaf.
  """
  named = jax.tree_util.tree_leaves_with_path(abstract_params)
  if mesh is None:
    sharded = [jax.P()] * len(named)
  else:
    sharded = jax.tree.structure(abstract_params).flatten_up_to(specs)
  found = []
  for (path, x), spec in zip(named, sharded, strict=True):
    try:
      found.append(_leaf(tuple(x.shape), spec, mesh, compression, budget))
    except ValueError as e:
      name = jax.tree_util.keystr(path)
      raise ValueError(f'{name} of shape {tuple(x.shape)}: {e}') from e
  return found


def _leaf(
  shape: tuple[int, ...],
  spec: jax.P,
  mesh: Mesh | None,
  compression: compression_lib.Compression,
  budget: int,
) -> ShardedLeaf:
  spec = jax.P(*spec, *(None,) * (len(shape) - len(spec)))
  if any(spec[:-2]):
    raise ValueError(
      f'sharded as {spec}; expected stacked matrices to be sharded on their '
      'rows and columns only'
    )
  leaf = ShardedLeaf(shape, spec, mesh, _block(shape, compression))
  down, across = leaf._shards
  _, rows, columns = blocks.matrices(shape)
  fits = rows % down == 0 and columns % across == 0
  if leaf.axes and not (
    fits and leaf.block and _block(leaf.local_shape, compression) == leaf.block
  ):
    raise ValueError(
      f'cannot be sharded as {spec}, in {down} x {across}: every shard must '
      f'be of whole blocks of {leaf.block or getattr(compression, "block", 1)}'
    )
  if leaf.block is None or len(shape) < 2:
    return leaf
  stack, high, _ = leaf._local_grid
  total = stack * high
  row = math.prod(leaf.local_shape) // total  # elements in a row of blocks
  for n in range(min(max(budget // row, 1), total), 0, -1):
    if total % n or (n % high if n > high else high % n):
      continue
    sliced = dataclasses.replace(leaf, slices=total // n)
    if _block(sliced.slice_shape, compression) == leaf.block:
      return sliced
  return leaf


def _block(
  shape: tuple[int, ...], compression: compression_lib.Compression
) -> tuple[int, int] | None:
  """Returns the sides of all blocks of a tensor; None if they differ."""
  if not isinstance(compression, compression_lib.TopK):
    return 1, 1
  regions = compression.regions(shape)
  if len(regions) != 1:
    return None
  return regions[0].height, regions[0].width


def _names(entry: _Axes) -> tuple[str, ...]:
  """Returns the mesh axes in an entry of a spec."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _put_rows(x: jax.Array, part: jax.Array, index: ct.Scalar) -> jax.Array:
  n = part.shape[0]
  return jax.lax.dynamic_update_slice_in_dim(x, part, index * n, 0)
