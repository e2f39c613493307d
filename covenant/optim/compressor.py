"""The one compression with error feedback: from a round's delta to a message.

A leaf is compressed in three steps:

  e_t  = beta * e_{t-1} + delta_t     `offered` to the compressor
  s_t  = C(e_t)                       `Compression.compress`
  e_t <- e_t - s_t                    `residual`, for later rounds

(SparseLoCo, arXiv 2508.15706, eqs. 1 and 2.) The decay comes before the
addition and covers the whole residual; s_t is the dequantized value.

`compress` does so for a whole leaf. `Compressor` does so where the parameters
of a miner lie: groups of leaves one after another, slice by slice
(leaf_group.py).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import collectives
from covenant.optim import compression as compression_lib
from covenant.optim import host_copy
from covenant.optim import leaf_group
from covenant.optim import reduce
from covenant.optim import sharded_leaf

Compression = compression_lib.Compression
LeafGroup = leaf_group.LeafGroup


def difference(start: jax.Array, end: jax.Array) -> jax.Array:
  """Returns a leaf of the delta, `start - end` in float32."""
  return start.astype(jnp.float32) - end.astype(jnp.float32)


def offered(
  delta: jax.Array, error: jax.Array | None, decay: float | None
) -> jax.Array:
  """Returns the input of the compressor: the decayed residual plus the delta.

  Without a residual or a decay it is the delta.
  """
  if error is None or decay is None:
    return delta
  return decay * error + delta


def residual(offered: jax.Array, sent: jax.Array) -> jax.Array:
  """Returns the part of `offered` that was not sent."""
  return offered - sent


def compress(
  delta: jax.Array,
  error: jax.Array | None,
  compression: Compression,
  decay: float | None,
) -> tuple[ct.Message, jax.Array | None]:
  """Returns a leaf's part of the message and its new error feedback.

  Args:
    delta: a float32 leaf of the pseudo-gradient.
    error: the leaf's error feedback of the last round; None without.
    compression: the compressor.
    decay: beta, in [0, 1]; None where `error` is.
  """
  given = offered(delta, error, decay)
  part = compression.compress(given)
  if error is None or decay is None:
    return part, None
  return part, residual(given, compression.decompress(part, delta.shape))


class Compressed(NamedTuple):
  """The outcome of one miner's round."""

  message: ct.Message  # of NumPy arrays, the same whatever the mesh
  error: ct.PyTree  # new error feedback, sharded as it was; None without
  error_norm: float  # its L2 norm


class Compressor:
  """Compresses one miner's rounds; holds no state.

  Messages of a mesh are those of one device, up to how statistics of a whole
  tensor are rounded: a sum over shards has another order.

  Args:
    abstract_params: the parameters or their shapes.
    compression: the compressor of each leaf.
    error_decay: beta of the error feedback; None without.
    mesh: that of the miner; None is one device.
    specs: how each leaf is sharded on it, a tree of `jax.P`.
    budget: elements of a slice, see `leaf_group.Groups`.

  Raises:
    ValueError: a shard does not consist of whole blocks; names the leaf.
  """

  def __init__(
    self,
    abstract_params: ct.Params,
    compression: Compression,
    error_decay: float | None,
    mesh: jax.sharding.Mesh | None = None,
    specs: ct.PyTree = None,
    budget: int = sharded_leaf.BUDGET,
  ):
    self._compression = compression
    self._error_decay = error_decay
    self._groups = leaf_group.Groups(
      abstract_params, compression, mesh, specs, budget
    )
    self._select = jax.jit(self._select_group, static_argnames=('group',))
    self._subtract = jax.jit(self._subtract_group, static_argnames=('group',))

  def compress(
    self, start: ct.Params | None, end: ct.Params, error: ct.PyTree
  ) -> Compressed:
    """Returns the message of a round and its new error feedback.

    Args:
      start: the parameters before the round; None if `end` is the delta.
      end: the parameters after it, or a gradient to send.
      error: the error feedback of the last round, consumed; None without.
    """
    trees = [self._groups.split(x) for x in (start, end, error)]
    parts, errors, squares = [], [], []
    for group, old, new, kept in zip(self._groups, *trees, strict=True):
      part = self._select(old, new, kept, group=group)
      for x in jax.tree.leaves(part):
        if x.is_fully_addressable:
          x.copy_to_host_async()
      for i in map(np.int32, range(group.slices if kept is not None else 0)):
        rest, square = self._subtract(old, new, kept, part, i, group=group)
        kept = group.map(
          lambda leaf, x, y, i=i: leaf.replace(x, y, i), kept, rest
        )
        squares.append(square)
      part = jax.tree.map(host_copy.whole, part)
      parts.append(group.map(lambda _, x: _on_host(x), part))
      errors.append(kept)
    square_sum = np.sum(jax.device_get(squares), dtype=np.float32)
    return Compressed(
      self._groups.merge(parts),
      None if error is None else self._groups.merge(errors),
      float(np.sqrt(square_sum)),
    )

  def lower(self, of_gradients: bool = False) -> list[jax.stages.Lowered]:
    """Lowers the programs of the largest group, without arrays.

    Args:
      of_gradients: whether gradients are sent, not deltas.
    """
    group = self._groups.largest
    tree = group.map(lambda leaf: leaf.abstract)
    start = None if of_gradients else tree
    if self._error_decay is None:
      return [self._select.lower(start, tree, None, group=group)]
    select = self._select.lower(start, tree, tree, group=group)
    part = jax.eval_shape(self._select, start, tree, tree, group=group)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    subtract = self._subtract.lower(start, tree, tree, part, index, group=group)
    return [select, subtract]

  def _select_group(
    self, start: ct.PyTree, end: ct.PyTree, error: ct.PyTree, group: LeafGroup
  ) -> ct.PyTree:
    """Returns a group's part of the message."""

    def local(*given: ct.PyTree) -> ct.PyTree:
      return group.map(self._select_leaf, *given)

    specs = group.map(lambda leaf: leaf.spec)
    part_specs = group.map(self._part_spec)
    return group.on_shards(local, (specs,) * 3, part_specs)(start, end, error)

  def _select_leaf(
    self, leaf: sharded_leaf.ShardedLeaf, *given: ct.PyTree
  ) -> ct.Message:
    """Returns a leaf's part of the message, local."""
    compression = self._compression
    if not isinstance(compression, compression_lib.TopK):
      return self._offered(dataclasses.replace(leaf, slices=1), 0, *given)

    def select(index: ct.Scalar, kept: ct.PyTree) -> ct.PyTree:
      some = compression.keep(self._offered(leaf, index, *given))
      return leaf.put_rows(kept, some, index)

    kept = jax.tree.map(
      lambda x: jnp.zeros((leaf.slices * x.shape[0], x.shape[1]), x.dtype),
      jax.eval_shape(compression.keep, leaf.abstract_slice),
    )
    kept = leaf.each(select, kept)
    packets = (
      sharded_leaf.split(
        compression.encode(k, leaf.axes), compression.quantizer
      )
      for k in kept
    )
    return tuple(leaf.grid(packet) for packet in packets)

  def _subtract_group(
    self,
    start: ct.PyTree,
    end: ct.PyTree,
    error: ct.PyTree,
    part: ct.PyTree,
    index: jax.Array,
    group: LeafGroup,
  ) -> tuple[ct.PyTree, jax.Array]:
    """Returns a slice of the new error, and the sum of its squares."""

    def subtract(
      index: ct.Scalar,
      leaf: sharded_leaf.ShardedLeaf,
      part: ct.Message,
      *given: ct.PyTree,
    ) -> jax.Array:
      if isinstance(part, tuple):
        packets = tuple(
          sharded_leaf.join(leaf.take_packet(x, index)) for x in part
        )
        sent = self._compression.decompress(packets, leaf.slice_shape)
      else:
        sent = leaf.take(part, index)
      return residual(self._offered(leaf, index, *given), sent)

    def local(
      part: ct.PyTree, index: ct.Scalar, *given: ct.PyTree
    ) -> tuple[ct.PyTree, jax.Array]:
      rest = group.map(functools.partial(subtract, index), part, *given)
      squares = reduce.square_sum(rest)
      return rest, collectives.sum_over(squares, group.axes)

    specs = group.map(lambda leaf: leaf.spec)
    in_specs = group.map(self._part_spec), jax.P(), *(specs,) * 3
    out_specs = group.map(lambda leaf: leaf.slice_spec), jax.P()
    return group.on_shards(local, in_specs, out_specs)(
      part, index, start, end, error
    )

  def _offered(
    self,
    leaf: sharded_leaf.ShardedLeaf,
    index: ct.Scalar,
    start: jax.Array | None,
    end: jax.Array,
    error: jax.Array | None,
  ) -> jax.Array:
    """Returns a slice of the compressor's input, local, float32."""
    end = leaf.take(end, index)
    start = start if start is None else leaf.take(start, index)
    error = error if error is None else leaf.take(error, index)
    delta = end if start is None else difference(start, end)
    return offered(delta, error, self._error_decay)

  def _part_spec(self, leaf: sharded_leaf.ShardedLeaf) -> ct.PyTree:
    if not isinstance(self._compression, compression_lib.TopK):
      return leaf.spec
    regions = len(self._compression.regions(leaf.shape))
    return (sharded_leaf.SplitPacket(leaf.grid_spec, jax.P()),) * regions


def _on_host(part: ct.Message) -> ct.Message:
  """Returns a leaf's part of a message, of NumPy arrays, in the one order."""
  if not isinstance(part, tuple):
    return part
  packets = (
    packet._replace(rows=tuple(x.reshape(-1, x.shape[-1]) for x in packet.rows))
    for packet in part
  )
  return tuple(sharded_leaf.join(packet, np.concatenate) for packet in packets)
