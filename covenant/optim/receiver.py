"""What the messages of a round do to the parameters, where these lie.

The maths is that of `aggregate.py` and `outer.py`. What is of a whole tensor,
its norm and how large a value may be, is computed from the message alone, by
the same program on every node; all else is done element by element. So nodes
reach the same bits, whatever their meshes.

A model of one device that is small is moved by one program. Of any other each
leaf is moved alone, slice by slice (slices.py), in place: beside it there are a
slice of the sums, and of the messages those slices.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant.optim import aggregate
from covenant.optim import compression as compression_lib
from covenant.optim import method as method_lib
from covenant.optim import outer as outer_lib
from covenant.optim import sharded_leaf


class Moved(NamedTuple):
  params: Any
  outer: optax.OptState
  delta_norm: float  # L2 norm of the aggregated delta


class Receiver:
  """Applies rounds; holds no state.

  Args:
    like: the parameters or their shapes.
    method: of the run.
    mesh: of the node; None is one device.
    specs: how each leaf is sharded on it, a tree of `jax.P`.
    budget: see `slices.leaves`.
    per_leaf: whether leaves may be moved alone. Not where the outer optimizer
      looks at all at once; then there can be no mesh.

  Raises:
    ValueError: a shard is not of whole blocks; names the leaf.
  """

  def __init__(
    self,
    like: Any,
    method: method_lib.Method,
    mesh: Any = None,
    specs: Any = None,
    budget: int = sharded_leaf.BUDGET,
    per_leaf: bool = True,
  ):
    if mesh is not None and not per_leaf:
      raise ValueError(
        'the outer optimizer looks at all tensors at once, which it cannot on '
        'a mesh of several devices'
      )
    self._like = like
    self._treedef = jax.tree.structure(like)
    self._method = method
    self._leaves = sharded_leaf.leaves(
      like, method.compression, mesh, specs, budget
    )
    # Not by the mesh: the same program must weigh a message on all nodes.
    self._is_small = sharded_leaf.size(like) <= budget
    self._moves_all = mesh is None and (self._is_small or not per_leaf)
    states, self._state_def = self._flatten(
      jax.eval_shape(method.outer.init, like)
    )
    self._is_trace = [self._is_like(x) for x in states]
    rules = {'like': like, 'compression': method.compression}
    self._weigh_all = jax.jit(functools.partial(self._weigh, like=like))
    self._weigh_leaf = jax.jit(functools.partial(self._weigh, like=0))
    self._add_all = jax.jit(
      functools.partial(aggregate.add, **rules), donate_argnames=('sums',)
    )
    self._step_all = jax.jit(self._outer_step)
    self._start = jax.jit(self._start_slice, static_argnames=('leaf',))
    self._add = jax.jit(
      self._add_slice, static_argnames=('leaf',), donate_argnames=('sums',)
    )
    self._step = jax.jit(self._step_slice, static_argnames=('leaf',))

  def advance(
    self,
    params: Any,
    outer: optax.OptState,
    messages: Sequence[Any],
    consume: bool = False,
    weights: Sequence[aggregate.Weight] | None = None,
  ) -> Moved:
    """The state after a round.

    Args:
      params: the shared parameters.
      outer: the state of the outer optimizer.
      messages: of all who count, at least one, in uid order.
      consume: whether `params` and `outer` may be changed in place, and be of
        no more use. Else there are two of each in the end.
      weights: of each message; None: all count alike.
    """
    weights = weights or [aggregate.Weight()] * len(messages)
    parts_R, sizes_R = aggregate.columns(weights)
    factors_RxP = self._factors(messages, sizes_R)
    factors_RxP = aggregate.weighted(factors_RxP, parts_R)
    if self._moves_all:
      return self._advance_all(params, outer, messages, factors_RxP, parts_R)
    factors_RxP = jax.device_get(factors_RxP)
    flat = self._treedef.flatten_up_to
    messages_RxP = [flat(message) for message in messages]
    traces, old = self._sorted(self._flatten(outer)[0])
    # Of each leaf the parameter and its traces.
    trees, others = [flat(tree) for tree in (params, *traces)], old
    squares = np.float32(0)
    for p, leaf in enumerate(self._leaves):
      arrays = [tree[p] for tree in trees]
      if not consume and leaf.slices > 1:
        arrays = [jnp.copy(x) for x in arrays]
      parts = [message_P[p] for message_P in messages_RxP]
      arrays, others, square = self._advance_leaf(
        leaf, arrays, old, parts, factors_RxP[:, p], parts_R
      )
      for tree, x in zip(trees, arrays, strict=True):
        tree[p] = x
      squares += square
    params, *traces = map(self._treedef.unflatten, trees)
    return Moved(params, self._state(traces, others), float(np.sqrt(squares)))

  def lower(self) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """The programs that add a message to the largest slice, and that move it.

    Lowered without arrays.
    """
    compression, outer = self._method.compression, self._method.outer
    factor = jax.ShapeDtypeStruct((), jnp.float32)
    peers = aggregate.Peers(factor, factor)
    parts = jax.ShapeDtypeStruct((), jnp.uint16)
    if self._moves_all:
      message = jax.eval_shape(
        lambda x: jax.tree.map(compression.compress, x), self._like
      )
      factors_P = jax.ShapeDtypeStruct((len(self._leaves),), jnp.float32)
      sums = jax.eval_shape(self._start_all)
      state = jax.eval_shape(outer.init, self._like)
      return (
        self._add_all.lower(sums, message, factors_P, parts=parts),
        self._step_all.lower(self._like, state, sums, peers),
      )
    leaf = sharded_leaf.largest(self._leaves)
    sums = jax.eval_shape(functools.partial(self._start_of, leaf))
    sums = jax.tree.map(leaf.abstract_stacked, sums)
    part = jax.eval_shape(compression.compress, leaf.like)
    if isinstance(compression, compression_lib.TopK):
      part = jax.eval_shape(
        lambda part: tuple(
          sharded_leaf.split(packet, compression.quantizer) for packet in part
        ),
        part,
      )
      part = tuple(
        sheet._replace(rows=tuple(map(leaf.abstract_stacked, sheet.rows)))
        for sheet in part
      )
    else:
      part = leaf.abstract_stacked(part)
    arrays = [leaf.abstract] * (1 + sum(self._is_trace))
    states, _ = self._flatten(jax.eval_shape(outer.init, self._like))
    _, others = self._sorted(states)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    return (
      self._add.lower(sums, part, factor, parts, leaf=leaf),
      self._step.lower(arrays, others, sums, peers, index, leaf=leaf),
    )

  def _factors(self, messages: Sequence[Any], sizes_R: np.ndarray) -> jax.Array:
    """The clip factor of each tensor of each peer: float32 [R, P]."""
    if self._is_small:
      norms = [self._weigh_all(message) for message in messages]
    else:
      flat = self._treedef.flatten_up_to
      norms = [
        jnp.concatenate([self._weigh_leaf(part) for part in flat(message)])
        for message in messages
      ]
    clip = self._method.clip
    return aggregate.clip_factors(jnp.stack(norms), clip, sizes_R)

  def _weigh(self, message: Any, like: Any) -> jax.Array:
    return aggregate.message_norms(message, like, self._method.compression)

  def _flatten(self, state: optax.OptState) -> tuple[list[Any], Any]:
    """Its parts: trees like the parameters, and others."""
    return jax.tree.flatten(state, is_leaf=self._is_like)

  def _is_like(self, x: Any) -> bool:
    return jax.tree.structure(x) == self._treedef

  def _sorted(self, states: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Of `_flatten`, the trees like the parameters, and the others."""
    pairs = list(zip(states, self._is_trace, strict=True))
    return [x for x, is_one in pairs if is_one], [
      x for x, is_one in pairs if not is_one
    ]

  def _state(self, traces: Iterable[Any], others: Iterable[Any]) -> Any:
    """The outer optimizer's state of these parts, in order."""
    traces, others = iter(traces), iter(others)
    return self._state_def.unflatten(
      next(traces if is_trace else others) for is_trace in self._is_trace
    )

  def _advance_all(
    self,
    params: Any,
    outer: optax.OptState,
    messages: Sequence[Any],
    factors_RxP: jax.Array,
    parts_R: np.ndarray,
  ) -> Moved:
    sums = self._start_all()
    for r, message in enumerate(messages):
      sums = self._add_all(sums, message, factors_RxP[r], parts=parts_R[r])
    params, outer, norm = self._step_all(
      params, outer, sums, aggregate.peers(parts_R)
    )
    return Moved(params, outer, float(norm))

  def _start_all(self) -> Any:
    method = self._method
    return aggregate.start(self._like, method.compression)

  def _outer_step(
    self, params: Any, outer: optax.OptState, sums: Any, peers: aggregate.Peers
  ) -> tuple[Any, optax.OptState, jax.Array]:
    delta = self._mean(sums, peers, self._like)
    params, outer = outer_lib.outer_update(
      self._method.outer, delta, outer, params
    )
    return params, outer, optax.tree.norm(delta)

  def _mean(self, sums: Any, peers: aggregate.Peers, like: Any) -> Any:
    method = self._method
    return aggregate.mean(
      sums, peers, like, method.compression, method.mean_over
    )

  def _advance_leaf(
    self,
    leaf: sharded_leaf.Leaf,
    arrays: list[jax.Array],
    others: list[Any],
    parts: Sequence[Any],
    factors_R: np.ndarray,
    parts_R: np.ndarray,
  ) -> tuple[list[jax.Array], list[Any], np.float32]:
    """As `_step_slice`, of a whole leaf; of several slices it is consumed."""
    compression = self._method.compression
    quantizer = getattr(compression, 'quantizer', None)
    peers, squares, found = aggregate.peers(parts_R), [], others
    for i in range(leaf.slices):
      sums, index = self._start(leaf=leaf), np.int32(i)
      for r, part in enumerate(parts):
        dealt = leaf.deal(part, i, quantizer)
        sums = self._add(sums, dealt, factors_R[r], parts_R[r], leaf=leaf)
      new, found, square = self._step(
        arrays, others, sums, peers, index, leaf=leaf
      )
      arrays = [
        leaf.replace(x, part, index)
        for x, part in zip(arrays, new, strict=True)
      ]
      # Messages are dealt no further ahead than this: they take memory.
      jax.block_until_ready(squares[-1:])
      squares.append(square)
    return arrays, found, np.sum(jax.device_get(squares))

  def _start_slice(self, leaf: sharded_leaf.Leaf) -> compression_lib.Sums:
    start = functools.partial(self._start_of, leaf)
    return leaf.on_shards(start, (), self._sums_spec(leaf))()

  def _start_of(self, leaf: sharded_leaf.Leaf) -> compression_lib.Sums:
    """The aggregate of no peer, of one slice, local."""
    return self._method.compression.start(leaf.slice_shape)

  def _sums_spec(self, leaf: sharded_leaf.Leaf) -> Any:
    sums = jax.eval_shape(functools.partial(self._start_of, leaf))
    return jax.tree.map(lambda x: leaf.stacked if x.ndim else jax.P(), sums)

  def _add_slice(
    self,
    sums: compression_lib.Sums,
    part: Any,
    factor: jax.Array,
    of_whole: jax.Array,
    leaf: sharded_leaf.Leaf,
  ) -> compression_lib.Sums:
    compression = self._method.compression
    part_spec = leaf.stacked
    if isinstance(part, tuple):
      part_spec = (sharded_leaf.Sheet(leaf.stacked, jax.P()),) * len(part)

    def local(sums: Any, part: Any, factor: Any, of_whole: Any) -> Any:
      if isinstance(part, tuple):
        part = tuple(sharded_leaf.join(sheet) for sheet in part)
      return compression.add(sums, part, factor, of_whole)

    spec = self._sums_spec(leaf)
    in_specs = spec, part_spec, jax.P(), jax.P()
    return leaf.on_shards(local, in_specs, spec)(sums, part, factor, of_whole)

  def _step_slice(
    self,
    arrays: list[jax.Array],
    others: list[Any],
    sums: compression_lib.Sums,
    peers: aggregate.Peers,
    index: jax.Array,
    leaf: sharded_leaf.Leaf,
  ) -> tuple[list[jax.Array], list[Any], jax.Array]:
    """The outer step of a slice.

    Args:
      arrays: the parameter, and its traces in the outer optimizer's state.
      others: what else that state has.
      sums: of the slice.
      peers: those whose messages were added.
      index: which slice.
      leaf: the parameter's.

    Returns:
      The slice of each array and the others after the step, and the sum of the
      squares of the aggregated delta.
    """

    def local(
      arrays: Any, others: Any, sums: Any, peers: Any, index: Any
    ) -> Any:
      delta = self._mean(sums, peers, leaf.like)
      param, *traces = (leaf.take(x, index) for x in arrays)
      state = self._state(traces, others)
      new, state = outer_lib.outer_update(
        self._method.outer, delta, state, param
      )
      traces, others = self._sorted(self._state_def.flatten_up_to(state))
      squares = jnp.sum(delta * delta)
      if leaf.axes:
        squares = jax.lax.psum(squares, leaf.axes)
      return [new, *traces], others, squares

    same = jax.P()
    in_specs = leaf.spec, same, self._sums_spec(leaf), same, same
    out_specs = leaf.slice_spec, same, same
    return leaf.on_shards(local, in_specs, out_specs)(
      arrays, others, sums, peers, index
    )
