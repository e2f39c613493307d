"""The outer step of a round: messages move the parameters where these lie.

The arithmetic is that of `reduce.py`. The norm of a whole tensor is computed
from the message alone, in integers; all else is done element by element. So
nodes reach the same bits, whatever their meshes and processors.

Groups of leaves are moved one after another, slice by slice and in place
(leaf_group.py): memory beside the model is a slice of the sums, and that slice
of the messages.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import typing as ct
from covenant.optim import collectives
from covenant.optim import compression as compression_lib
from covenant.optim import exact
from covenant.optim import leaf_group
from covenant.optim import reduce
from covenant.optim import sharded_leaf
from covenant.optim import weight as weight_lib

LeafGroup = leaf_group.LeafGroup


class NewState(NamedTuple):
  """The shared state after an outer step."""

  params: ct.Params
  outer: ct.OptState
  delta_norm: float  # L2 norm of the aggregated delta


class OuterStep:
  """Moves the shared state by the messages of a round; holds no state itself.

  Args:
    abstract_params: the parameters or their shapes.
    compression: the compressor that makes the messages.
    outer: the outer optimizer.
    mean_over: see `reduce.finish`.
    clip: see `reduce.clip_factors`.
    mesh: that of the node; None is one device.
    specs: how each leaf is sharded on it, a tree of `jax.P`.
    budget: elements of a slice, see `leaf_group.Groups`.
    per_leaf: whether `outer` may see leaves alone. False if it depends on all
      leaves at once; then there can be no mesh.

  Raises:
    ValueError: a shard does not consist of whole blocks; names the leaf.
  """

  def __init__(
    self,
    abstract_params: ct.Params,
    compression: compression_lib.Compression,
    outer: optax.GradientTransformation,
    mean_over: str = 'senders',
    clip: str = 'median',
    mesh: jax.sharding.Mesh | None = None,
    specs: ct.PyTree = None,
    budget: int = sharded_leaf.BUDGET,
    per_leaf: bool = True,
  ):
    if mesh is not None and not per_leaf:
      raise ValueError(
        'the outer optimizer looks at all tensors at once, which it cannot on '
        'a mesh of several devices'
      )
    self._abstract_params = abstract_params
    self._compression = compression
    self._outer = outer
    self._mean_over = mean_over
    self._clip = clip
    self._groups = leaf_group.Groups(
      abstract_params, compression, mesh, specs, budget, per_leaf
    )
    states, self._state_def = self._flatten(
      jax.eval_shape(outer.init, abstract_params)
    )
    self._is_trace = [self._is_like_params(x) for x in states]
    self._start = jax.jit(self._start_group, static_argnames=('group',))
    self._add = jax.jit(
      self._add_group, static_argnames=('group',), donate_argnames=('sums',)
    )
    self._step = jax.jit(self._step_group, static_argnames=('group',))

  def apply(
    self,
    params: ct.Params,
    outer: ct.OptState,
    messages: Sequence[ct.Message],
    consume: bool = False,
    weights: Sequence[weight_lib.Weight] | None = None,
  ) -> NewState:
    """Returns the state after a round.

    Args:
      params: the shared parameters.
      outer: the state of the outer optimizer.
      messages: those of all peers that count, at least one, in uid order.
      consume: whether `params` and `outer` may be changed in place, after which
        they are deleted. Otherwise two of each exist in the end.
      weights: one per message; None: all count alike.
    """
    parts_R, sizes_R = weight_lib.columns(
      weights or [weight_lib.Weight()] * len(messages)
    )
    factors_RxP = reduce.clip_factors(self.norms(messages), self._clip, sizes_R)
    wholes_Rx1 = weight_lib.wholes(parts_R)[:, None]
    factors_RxP = exact.product(factors_RxP, wholes_Rx1)
    totals = weight_lib.totals(parts_R)
    return self.apply_sum(
      params, outer, messages, factors_RxP, parts_R, totals, consume
    )

  def apply_sum(
    self,
    params: ct.Params,
    outer: ct.OptState,
    messages: Sequence[ct.Message],
    factors_RxP: ct.Array,
    parts_R: np.ndarray,
    totals: weight_lib.Totals,
    consume: bool = False,
    keep_params: bool = False,
  ) -> NewState:
    """Returns the state after a round whose factors are given; see `apply`.

    Args:
      params: the shared parameters.
      outer: the state of the outer optimizer.
      messages: one per peer.
      factors_RxP: the factor of each tensor of each message.
      parts_R: the weights of the messages, see `reduce.add`.
      totals: the weights of all messages, see `reduce.finish`.
      consume: whether `params` and `outer` may be changed in place.
      keep_params: whether `params` stay as they are even so.
    """
    split = self._groups.split
    messages_RxG = [split(message) for message in messages]
    traces, old = self._sorted(self._flatten(outer)[0])
    # The parameters and their traces in the optimizer's state, by group.
    trees = [split(tree) for tree in (params, *traces)]
    others, square_sum, first = old, np.float32(0), 0
    for g, group in enumerate(self._groups):
      arrays = [tree[g] for tree in trees]
      if group.slices > 1:
        copied = 1 if keep_params else 0
        copied = copied if consume else len(arrays)
        arrays[:copied] = jax.tree.map(jnp.copy, arrays[:copied])
      last = first + len(group.leaves)
      squares = []
      for i in range(group.slices):
        sums, index = self._start(group=group), np.int32(i)
        for r, message_G in enumerate(messages_RxG):
          part = self._scatter_slice(message_G[g], i, group)
          factors = factors_RxP[r, first:last]
          sums = self._add(sums, part, factors, parts_R[r], group=group)
        new, others, square = self._step(
          arrays, old, sums, totals, index, group=group
        )
        arrays = [
          group.map(lambda leaf, x, y, i=index: leaf.replace(x, y, i), *pair)
          for pair in zip(arrays, new, strict=True)
        ]
        # Slices of messages, which take memory, wait for the step before last.
        jax.block_until_ready(squares[-1:])
        squares.append(square)
      for tree, x in zip(trees, arrays, strict=True):
        tree[g] = x
      square_sum += np.sum(jax.device_get(squares), dtype=np.float32)
      first = last
    params, *traces = map(self._groups.merge, trees)
    norm = float(np.sqrt(square_sum))
    return NewState(params, self._state(traces, others), norm)

  def norms(self, messages: Iterable[ct.Message]) -> np.ndarray:
    """Returns the L2 norm of each tensor of R messages: float32 [R, P].

    They are exact (exact.py), the same whatever the mesh of the node. Of an
    iterator, one message after another is held.
    """
    rows = []
    for message in messages:
      parts = self._groups.treedef.flatten_up_to(message)
      batches = [parts] if self._groups.is_small else [[x] for x in parts]
      rows.append([reduce.part_norms(x, self._compression) for x in batches])
    return np.stack([np.concatenate(row) for row in jax.device_get(rows)])

  def lower(self) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Lowers the programs that add a message and that move the parameters.

    They are those of the largest group, and take no arrays.
    """
    group = self._groups.largest

    def sums(leaf: sharded_leaf.ShardedLeaf) -> Any:
      start = jax.eval_shape(lambda: self._start_leaf(leaf))
      return jax.tree.map(leaf.abstract_stacked, start)

    factors = jax.ShapeDtypeStruct((len(group.leaves),), jnp.float32)
    parts = jax.ShapeDtypeStruct((), jnp.uint16)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    params = group.map(lambda leaf: leaf.abstract)
    arrays = [params] * (1 + sum(self._is_trace))
    states, _ = self._flatten(
      jax.eval_shape(self._outer.init, self._abstract_params)
    )
    _, others = self._sorted(states)
    totals = jax.eval_shape(lambda: weight_lib.totals(np.zeros(0, int)))
    sum_tree = group.map(sums)
    message = group.map(
      lambda leaf: leaf_group.abstract_part(leaf, self._compression)
    )
    return (
      self._add.lower(sum_tree, message, factors, parts, group=group),
      self._step.lower(arrays, others, sum_tree, totals, index, group=group),
    )

  @property
  def _quantizer(self) -> Any:
    return getattr(self._compression, 'quantizer', None)

  def _scatter_slice(
    self, message: ct.Message, index: int, group: LeafGroup
  ) -> ct.PyTree:
    """Returns a slice of a message, each shard's blocks on its device."""
    quantizer = self._quantizer
    return group.map(
      lambda leaf, part: leaf.scatter_slice(part, index, quantizer), message
    )

  def _start_leaf(self, leaf: sharded_leaf.ShardedLeaf) -> reduce.Sums:
    return self._compression.start(leaf.slice_shape)

  def _start_group(self, group: LeafGroup) -> ct.PyTree:
    """Returns the sums of no peers, for one slice of each leaf."""
    start = lambda: group.map(self._start_leaf)  # noqa: E731
    return group.on_shards(start, (), self._sums_spec(group))()

  def _sums_spec(self, group: LeafGroup) -> ct.PyTree:
    def spec(leaf: sharded_leaf.ShardedLeaf) -> Any:
      sums = jax.eval_shape(lambda: self._start_leaf(leaf))
      return jax.tree.map(lambda x: leaf.stacked if x.ndim else jax.P(), sums)

    return group.map(spec)

  def _add_group(
    self,
    sums: ct.PyTree,
    message: ct.PyTree,
    factors_P: jax.Array,
    parts: jax.Array,
    group: LeafGroup,
  ) -> ct.PyTree:
    """Returns the sums of a slice with one more message."""

    def leaf_spec(leaf: sharded_leaf.ShardedLeaf, part: Any) -> Any:
      if not isinstance(part, tuple):
        return leaf.stacked
      return (sharded_leaf.SplitPacket(leaf.stacked, jax.P()),) * len(part)

    def local(sums: Any, message: Any, factors_P: Any, parts: Any) -> Any:
      factors = [factors_P[p] for p in range(len(group.leaves))]

      def add(
        _: sharded_leaf.ShardedLeaf, sums: Any, part: Any, factor: Any
      ) -> Any:
        if isinstance(part, tuple):
          part = tuple(sharded_leaf.join(packet) for packet in part)
        return reduce.add(sums, part, factor, self._compression, parts)

      return group.map(add, sums, message, group.treedef.unflatten(factors))

    spec = self._sums_spec(group)
    in_specs = spec, group.map(leaf_spec, message), jax.P(), jax.P()
    return group.on_shards(local, in_specs, spec)(
      sums, message, factors_P, parts
    )

  def _step_group(
    self,
    arrays: list[ct.PyTree],
    others: list[Any],
    sums: ct.PyTree,
    totals: weight_lib.Totals,
    index: jax.Array,
    group: LeafGroup,
  ) -> tuple[list[ct.PyTree], list[Any], jax.Array]:
    """Moves a slice of a group.

    Args:
      arrays: the parameters, and their traces in the outer optimizer's state.
      others: the other parts of that state.
      sums: those of the slice.
      totals: the weights of the messages that were added.
      index: the number of the slice.
      group: the group.

    Returns:
      The slice of each array and the others after the step, and the sum of the
      squares of the aggregated delta.
    """

    def local(
      arrays: Any, others: Any, sums: Any, totals: Any, index: Any
    ) -> Any:
      delta = group.map(
        lambda leaf, s: reduce.finish(
          s, totals, leaf.slice_shape, self._compression, self._mean_over
        ),
        sums,
      )
      params, *traces = (
        group.map(lambda leaf, x: leaf.take(x, index), tree) for tree in arrays
      )
      state = self._state(traces, others)
      new, state = reduce.outer_update(self._outer, delta, state, params)
      traces, others = self._sorted(self._state_def.flatten_up_to(state))
      squares = collectives.sum_over(reduce.square_sum(delta), group.axes)
      return [new, *traces], others, squares

    same = jax.P()
    specs = [group.map(lambda leaf: leaf.spec)] * len(arrays)
    in_specs = specs, same, self._sums_spec(group), same, same
    slice_specs = [group.map(lambda leaf: leaf.slice_spec)] * len(arrays)
    return group.on_shards(local, in_specs, (slice_specs, same, same))(
      arrays, others, sums, totals, index
    )

  def _flatten(self, state: ct.OptState) -> tuple[list[Any], Any]:
    """Returns the parts of a state: trees like the parameters, and others."""
    return jax.tree.flatten(state, is_leaf=self._is_like_params)

  def _is_like_params(self, x: ct.PyTree) -> bool:
    return jax.tree.structure(x) == self._groups.treedef

  def _sorted(self, states: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Returns the trees like the parameters, and the others, of a state."""
    pairs = list(zip(states, self._is_trace, strict=True))
    return [x for x, is_one in pairs if is_one], [
      x for x, is_one in pairs if not is_one
    ]

  def _state(
    self, traces: Iterable[ct.PyTree], others: Iterable[Any]
  ) -> ct.OptState:
    """Returns the outer optimizer's state of these parts, in order."""
    traces, others = iter(traces), iter(others)
    return self._state_def.unflatten(
      next(traces if is_trace else others) for is_trace in self._is_trace
    )
