"""The step of one message alone, made in place and taken back.

A validator asks what the message of one peer does to the loss. A copy of the
parameters per message would take as much memory as the model. Here the values
that a message touches are read, replaced and put back, slice by slice, where
the parameters lie: beside them there are the touched values of one message and
one slice. The arithmetic is that of `reduce.py`, with the bits of an outer step
of one message by plain SGD.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import blocks
from covenant.optim import compression as compression_lib
from covenant.optim import leaf_group
from covenant.optim import reduce
from covenant.optim import sharded_leaf
from covenant.optim import weight as weight_lib

LeafGroup = leaf_group.LeafGroup
# The values that a message replaced, of each slice of each group, where they
# were.
Touched: TypeAlias = list[list[ct.PyTree]]


class TrialStep:
  """Makes the step of one message in place, and takes it back.

  Args:
    abstract_params: the parameters or their shapes.
    compression: the compressor that makes the messages.
    learning_rate: that of the step.
    mesh: the devices of the parameters; None is one device.
    specs: how each leaf is sharded on it, a tree of `jax.P`.
    budget: elements of a slice, see `leaf_group.Groups`.
  """

  def __init__(
    self,
    abstract_params: ct.Params,
    compression: compression_lib.Compression,
    learning_rate: float,
    mesh: jax.sharding.Mesh | None = None,
    specs: ct.PyTree = None,
    budget: int = sharded_leaf.BUDGET,
  ):
    self._compression = compression
    # None: every value of a leaf is touched.
    self._topk = (
      compression if isinstance(compression, compression_lib.TopK) else None
    )
    self._outer = reduce.nesterov(learning_rate)
    self._groups = leaf_group.Groups(
      abstract_params, compression, mesh, specs, budget
    )
    static = ('group',)
    # A slice that is the whole leaf takes its place; others are `put` there.
    self._move = {
      is_whole: jax.jit(
        self._move_group,
        static_argnames=static,
        donate_argnames=('params',) if is_whole else (),
      )
      for is_whole in (True, False)
    }
    self._restore = {
      is_whole: jax.jit(
        self._restore_group,
        static_argnames=static,
        donate_argnames=('params',) if is_whole else (),
      )
      for is_whole in (True, False)
    }

  def norms(self, message: ct.Message) -> np.ndarray:
    """Returns the exact norm of each tensor of a message: float32 [P]."""
    parts = self._groups.treedef.flatten_up_to(message)
    batches = [parts] if self._groups.is_small else [[x] for x in parts]
    found = [reduce.part_norms(x, self._compression) for x in batches]
    return np.concatenate([*jax.device_get(found), np.zeros(0, np.float32)])

  def apply(
    self, params: ct.Params, message: ct.Message, factors_P: ct.Array
  ) -> tuple[ct.Params, Touched]:
    """Returns the parameters after the step, and the values that it replaced.

    Args:
      params: the parameters; consumed.
      message: one peer's.
      factors_P: the clip factor of each tensor, in leaf order.
    """
    touched: Touched = []
    first = 0

    def move(
      group: LeafGroup, x: ct.PyTree, part: ct.PyTree, index: int
    ) -> ct.PyTree:
      if not index:
        touched.append([])
      factors = np.asarray(factors_P[first : first + len(group.leaves)])
      new, old = self._move[group.slices == 1](
        x, part, factors, np.int32(index), group=group
      )
      touched[-1].append(old)
      return new

    groups = []
    for group, x, part in self._each(params, message):
      groups.append(self._slice_by_slice(group, x, part, move))
      first += len(group.leaves)
    return self._groups.merge(groups), touched

  def undo(
    self, params: ct.Params, message: ct.Message, touched: Touched
  ) -> ct.Params:
    """Returns the parameters before `apply`, bit for bit.

    Args:
      params: what `apply` returned; consumed.
      message: the message that was applied.
      touched: the values that it replaced.
    """
    groups = []
    for g, (group, x, part) in enumerate(self._each(params, message)):

      def restore(
        group: LeafGroup, x: ct.PyTree, part: ct.PyTree, index: int, g: int = g
      ) -> ct.PyTree:
        return self._restore[group.slices == 1](
          x, part, touched[g][index], np.int32(index), group=group
        )

      groups.append(self._slice_by_slice(group, x, part, restore))
    return self._groups.merge(groups)

  def lower(self) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Lowers the programs of the largest group; they take no arrays."""
    group = self._groups.largest
    params = group.map(lambda leaf: leaf.abstract)
    part = group.map(
      lambda leaf: leaf_group.abstract_part(leaf, self._compression)
    )
    factors = jax.ShapeDtypeStruct((len(group.leaves),), jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    is_whole = group.slices == 1
    move = self._move[is_whole].lower(params, part, factors, index, group=group)
    old = group.map(
      lambda leaf, x: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=leaf.mesh and self._where_old(leaf)
        ),
        x,
      ),
      move.out_info[1],
    )
    restore = self._restore[is_whole].lower(
      params, part, old, index, group=group
    )
    return move, restore

  @property
  def _quantizer(self) -> Any:
    return getattr(self._compression, 'quantizer', None)

  def _each(
    self, params: ct.Params, message: ct.Message
  ) -> list[tuple[LeafGroup, ct.PyTree, ct.PyTree]]:
    split = self._groups.split
    return list(zip(self._groups, split(params), split(message), strict=True))

  def _slice_by_slice(
    self,
    group: LeafGroup,
    params: ct.PyTree,
    message: ct.PyTree,
    change: Callable[[LeafGroup, ct.PyTree, ct.PyTree, int], ct.PyTree],
  ) -> ct.PyTree:
    """Returns the parameters of a group, changed in place."""
    for i in range(group.slices):
      part = group.map(
        lambda leaf, x, i=i: leaf.scatter_slice(x, i, self._quantizer), message
      )
      new = change(group, params, part, i)
      params = group.map(
        lambda leaf, x, y, i=i: leaf.replace(x, y, np.int32(i)), params, new
      )
      # Slices of the message, which take memory, do not queue up.
      jax.block_until_ready(params)
    return params

  def _move_group(
    self,
    params: ct.PyTree,
    part: ct.PyTree,
    factors_P: jax.Array,
    index: jax.Array,
    group: LeafGroup,
  ) -> tuple[ct.PyTree, ct.PyTree]:
    """Returns a slice after the step, and the values that were replaced."""

    def local(
      params: ct.PyTree, part: ct.PyTree, factors_P: Any, index: Any
    ) -> tuple[ct.PyTree, ct.PyTree]:
      factors = group.treedef.unflatten(
        [factors_P[p] for p in range(len(group.leaves))]
      )
      pairs = [
        self._move_leaf(leaf, leaf.take(x, index), _joined(some), factor)
        for leaf, x, some, factor in zip(
          group.leaves,
          group.treedef.flatten_up_to(params),
          group.treedef.flatten_up_to(part),
          group.treedef.flatten_up_to(factors),
          strict=True,
        )
      ]
      new, old = zip(*pairs, strict=True) if pairs else ((), ())
      unflatten = group.treedef.unflatten
      return unflatten(new), unflatten(old)

    out_specs = group.map(lambda leaf: leaf.slice_spec), self._old_specs(group)
    in_specs = (
      group.map(lambda leaf: leaf.spec),
      self._part_specs(group, part),
      jax.P(),
      jax.P(),
    )
    return group.on_shards(local, in_specs, out_specs)(
      params, part, factors_P, index
    )

  def _move_leaf(
    self,
    leaf: sharded_leaf.ShardedLeaf,
    x: jax.Array,
    part: ct.Message,
    factor: jax.Array,
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns a local slice after the step, and its values that changed."""
    whole = np.full(1, weight_lib.WHOLE, np.uint16)
    totals = weight_lib.totals(whole, weight_lib.WHOLE + 1)
    reduced = functools.partial(
      reduce.reduce, factors_R=factor[None], parts_R=whole, totals=totals
    )
    if self._topk is None:
      delta = reduced(
        [part], shape=leaf.slice_shape, compression=self._compression
      )
      return self._stepped(x, delta), (x,)
    places = self._places(leaf, part)
    x_SxRxC = x.reshape(blocks.matrices(x.shape))
    old = tuple(x_SxRxC[place] for place in places)
    for place, before, values in zip(
      places, old, self._compression.values(part), strict=True
    ):
      delta = reduced(
        [values], shape=values.shape, compression=compression_lib.Dense()
      )
      x_SxRxC = x_SxRxC.at[place].set(self._stepped(before, delta))
    return x_SxRxC.reshape(x.shape), old

  def _stepped(self, x: jax.Array, delta: jax.Array) -> jax.Array:
    state = self._outer.init(x)
    new, _ = reduce.outer_update(self._outer, delta, state, x)
    return new

  def _restore_group(
    self,
    params: ct.PyTree,
    part: ct.PyTree,
    old: ct.PyTree,
    index: jax.Array,
    group: LeafGroup,
  ) -> ct.PyTree:
    """Returns a slice with the values that the step replaced."""

    def restore(
      index: ct.Scalar,
      leaf: sharded_leaf.ShardedLeaf,
      x: Any,
      part: Any,
      old: Any,
    ) -> jax.Array:
      x = leaf.take(x, index)
      if self._topk is None:
        return old[0]
      x_SxRxC = x.reshape(blocks.matrices(x.shape))
      places = self._places(leaf, _joined(part))
      for place, values in zip(places, old, strict=True):
        x_SxRxC = x_SxRxC.at[place].set(values)
      return x_SxRxC.reshape(x.shape)

    def local(params: Any, part: Any, old: Any, index: Any) -> ct.PyTree:
      return group.map(functools.partial(restore, index), params, part, old)

    in_specs = (
      group.map(lambda leaf: leaf.spec),
      self._part_specs(group, part),
      self._old_specs(group),
      jax.P(),
    )
    out_specs = group.map(lambda leaf: leaf.slice_spec)
    return group.on_shards(local, in_specs, out_specs)(params, part, old, index)

  def _places(
    self, leaf: sharded_leaf.ShardedLeaf, part: ct.Message
  ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns matrix, row and column of the values of each region."""
    assert self._topk is not None
    regions = self._topk.regions(leaf.slice_shape)
    return [
      compression_lib.locate(r, p.indices)
      for r, p in zip(regions, part, strict=True)
    ]

  def _where_old(self, leaf: sharded_leaf.ShardedLeaf) -> jax.NamedSharding:
    assert leaf.mesh is not None
    spec = leaf.slice_spec if self._topk is None else leaf.stacked
    return jax.NamedSharding(leaf.mesh, spec)

  def _old_specs(self, group: LeafGroup) -> ct.PyTree:
    def spec(leaf: sharded_leaf.ShardedLeaf) -> tuple[jax.P, ...]:
      if self._topk is None:
        return (leaf.slice_spec,)
      return (leaf.stacked,) * len(self._topk.regions(leaf.shape))

    return group.map(spec)

  def _part_specs(self, group: LeafGroup, part: ct.PyTree) -> ct.PyTree:
    def spec(leaf: sharded_leaf.ShardedLeaf, part: Any) -> ct.PyTree:
      if not isinstance(part, tuple):
        return leaf.stacked
      return (sharded_leaf.SplitPacket(leaf.stacked, jax.P()),) * len(part)

    return group.map(spec, part)


def _joined(part: ct.Message) -> ct.Message:
  """Returns a local part with its packets in one piece each."""
  if not isinstance(part, tuple):
    return part
  return tuple(sharded_leaf.join(packet) for packet in part)
