"""SparseLoCo: local steps, then a sparse exchange with error feedback.

One round of peer r (SparseLoCo, arXiv 2508.15706; Covenant-72B, arXiv
2603.08163, eqs. 1 and 2), with beta = `error_decay`:

  delta_r = theta - theta_r            after `inner_steps` inner updates
  e_r     = beta * e_r + delta_r
  sent_r  = Q(TopK(e_r));  e_r <- e_r - sent_r
  theta   = outer(theta, mean_r sent_r)

The pieces (`pseudo_gradient`, `compress`, `decompress`, `aggregate`,
`outer_update`) are pure functions; the emulator, the nodes and `sparseloco`,
the optax transformation below, all call these.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import typing as ct
from covenant.optim import arguments
from covenant.optim import collectives
from covenant.optim import compression as compression_lib
from covenant.optim import compressor
from covenant.optim import exchange as exchange_lib
from covenant.optim import finite
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import topk_variants
from covenant.optim import weight as weight_lib

__all__ = (
  'Compression', 'DCTTopK', 'Dense', 'Exact', 'Linear', 'RandomK', 'Sign',
  'SignMagnitude', 'SparseLoCoState', 'Statistical', 'Stats', 'TopK', 'Weight',
  'aggregate', 'compress', 'decompress', 'flush', 'init_error', 'nesterov',
  'outer_update', 'pseudo_gradient', 'sparseloco', 'state_axes',
)  # fmt: skip

aggregate = reduce.aggregate
Compression = compression_lib.Compression
DCTTopK = topk_variants.DCTTopK
Dense = compression_lib.Dense
Exact = quantize.Exact
Linear = quantize.Linear
nesterov = reduce.nesterov
outer_update = reduce.outer_update
RandomK = topk_variants.RandomK
Sign = quantize.Sign
SignMagnitude = quantize.SignMagnitude
Statistical = quantize.Statistical
Stats = exchange_lib.Stats
TopK = compression_lib.TopK
Weight = weight_lib.Weight


def pseudo_gradient(start: ct.Params, end: ct.Params) -> ct.Delta:
  """Returns `start - end` in float32, the direction to descend."""
  return jax.tree.map(compressor.difference, start, end)


def init_error(params: ct.Params) -> ct.PyTree:
  """Returns empty error feedback: float32 zeros, sharded like `params`."""
  return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)


def compress(
  delta: ct.Delta,
  error: ct.PyTree,
  compression: Compression,
  error_decay: float | None,
) -> tuple[ct.Message, ct.PyTree]:
  """Returns the message of `delta`, and the new error feedback.

  Args:
    delta: pseudo-gradient, a float32 pytree.
    error: error feedback of the last round, shaped like `delta`; `None`
      sends what it can and forgets the rest.
    compression: a compressor such as `TopK()` or `Dense()`.
    error_decay: beta, in [0, 1]; None where `error` is.

  Returns:
    The message, and the new error feedback (`None` if none came).

  Raises:
    ValueError, TypeError: `compression` or `error_decay` is of another kind.
  """
  compression_lib.check_one(compression)
  if error is None or error_decay is None:
    return jax.tree.map(compression.compress, delta), None
  arguments.check_number('error_decay', error_decay, 0, 1)
  treedef = jax.tree.structure(delta)
  pairs = [
    compressor.compress(d, e, compression, error_decay)
    for d, e in zip(
      jax.tree.leaves(delta), treedef.flatten_up_to(error), strict=True
    )
  ]
  message, error = zip(*pairs, strict=True) if pairs else ((), ())
  return treedef.unflatten(message), treedef.unflatten(error)


def abstract_message(
  abstract_params: ct.Params, compression: Compression
) -> ct.Message:
  """Returns the shapes of a message."""
  return jax.eval_shape(
    lambda like: compress(like, None, compression, None)[0], abstract_params
  )


def decompress(
  message: ct.Message, abstract_params: ct.Params, compression: Compression
) -> ct.Delta:
  """Returns the float32 pytree that `message` stands for."""
  compression_lib.check_one(compression)
  return jax.tree.map(
    lambda x, part: compression.decompress(part, x.shape),
    abstract_params,
    message,
  )


class SparseLoCoState(NamedTuple):
  """The state of one peer; `anchor`, `outer` and `count` are equal on all."""

  count: jax.Array  # shape=(), dtype=jnp.int32: inner updates so far
  exchanged: jax.Array  # shape=(), dtype=jnp.int32: `count` when it exchanged
  anchor: ct.Params  # the parameters at which the round started, exactly
  error: ct.PyTree  # float32, shaped like the parameters; None without feedback
  inner: optax.OptState
  outer: optax.OptState
  lost: jax.Array  # shape=(), dtype=bool: a step of this round was not finite
  stats: Stats  # of the last exchange; zeros before the first
  SHARED = 'count', 'exchanged', 'anchor', 'outer'  # see `state_axes`


def sparseloco(
  inner: optax.GradientTransformation,
  *,
  outer: optax.GradientTransformation | None = None,
  inner_steps: int = 30,
  compression: compression_lib.Compressions = None,
  error_decay: float | None = 0.95,
  axis_name: ct.AxisName = None,
  mean_over: str = 'senders',
  clip: str = 'median',
  anchor_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns SparseLoCo as an optax transformation.

  Every update applies `inner`; every `inner_steps`-th one also exchanges the
  compressed delta along `axis_name` and moves all peers to the same new
  parameters. Only the packed message crosses the axis, in one all-gather.

  optax hands back differences, and `params + (new - params)` may round: the
  exact shared parameters are `state.anchor`. A peer's next delta is measured
  against that anchor, so rounding cannot add up and peers cannot drift.

  `update` takes two more arguments:

  - `weight`, a number from 0 to 1, the peer's weight in an exchange. A peer of
    weight 0 takes no part: it is nobody's sender, keeps its error feedback and
    moves with the others.
  - `flush=True` exchanges now, without an inner step: at the end of training,
    or before an evaluation (`flush`).

  A step that is not finite is not taken, and the peer's round is lost: it has
  weight 0 in the next exchange, its error feedback is emptied, and it goes on
  from the shared parameters. To skip such steps and keep the round, wrap
  `inner` in `optax.apply_if_finite`. What the clip takes off a message is
  lost: error feedback keeps what was not sent.

  Where the types of a peer's parameters say how they are sharded (explicit
  mesh axes, such as 'fsdp'; with peers, leave these axes out of `axis_names`
  of their `jax.shard_map`), every shard compresses itself: its blocks are cut
  of the shard, a quantizer's statistics of a tensor are those of the shard,
  and no more than norms and `Stats`, which are of whole tensors, crosses the
  other axes. Inside a `jax.shard_map` that has made them manual, all axes but
  `axis_name` along which the parameters vary are taken for such axes. Types
  say nothing of automatic axes: there XLA decides what to gather.

  Args:
    inner: the local optimizer, such as `optax.adamw(3e-4)`.
    outer: descends the aggregated delta; `nesterov(1.0)` if omitted, the
      published recipe (plain SGD).
    inner_steps: H, the number of local updates per round.
    compression: `TopK()` if omitted; a compressor for all leaves, a pytree of
      compressors like the parameters or a prefix of it, or a function of a
      leaf's path and value that returns its compressor.
    error_decay: beta of the error feedback; None turns the feedback off.
    axis_name: the named axis of `jax.shard_map` or `jax.vmap` along which the
      peers live, or a tuple of axes; None for a single peer.
    mean_over: 'senders' or 'all', see `aggregate`.
    clip: 'median' or 'none', see `aggregate`.
    anchor_dtype: the type in which the shared parameters are kept, such as
      'float32' for bfloat16 parameters; theirs if omitted.

  Returns:
    A transformation whose `update` needs `params`.

  Example:
    >>> tx = sparseloco(optax.sgd(0.5), inner_steps=2)
    >>> params = {'w': jnp.ones(4)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...   updates, state = tx.update({'w': jnp.ones(4)}, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params['w'])  # one value of four is sent: the first, by 1.0
    [0. 1. 1. 1.]
    >>> print(state.error['w'])  # the others wait in the error feedback
    [0. 1. 1. 1.]

  Raises:
    ValueError, TypeError: an argument is not what it should be.
  """
  arguments.check(inner, outer, inner_steps, error_decay, axis_name)
  reduce.check_mean_over(mean_over)
  reduce.check_clip(clip)
  compression_lib.check(compression)
  kept_as = arguments.float_type('anchor_dtype', anchor_dtype)
  inner = optax.with_extra_args_support(inner)
  outer = outer if outer is not None else nesterov(1.0)
  rules = exchange_lib.Rules(axis_name, error_decay, mean_over, clip)

  def init(params: ct.Params) -> ct.PyTree:
    arguments.check_params(params)
    anchor = jax.tree.map(lambda x: _copy(x, kept_as), params)
    state = SparseLoCoState(
      count=jnp.zeros((), jnp.int32),
      exchanged=jnp.zeros((), jnp.int32),
      anchor=anchor,
      error=None
      if error_decay is None
      else collectives.placed_like(init_error(params), params),
      inner=collectives.placed_like(inner.init(params), params),
      outer=collectives.placed_like(outer.init(anchor), params),
      lost=jnp.zeros((), bool),
      stats=exchange_lib.no_stats(
        compression_lib.each_leaf(compression, params)
      ),
    )
    error, inner_state, lost, stats = collectives.varying(
      (state.error, state.inner, state.lost, state.stats), axis_name
    )
    return state._replace(
      error=error, inner=inner_state, lost=lost, stats=stats
    )

  def synchronize(
    params: ct.Params,
    updates: ct.Params,
    state: SparseLoCoState,
    parts: jax.Array,
  ) -> tuple[ct.Params, SparseLoCoState]:
    local = optax.apply_updates(params, updates)
    delta = pseudo_gradient(state.anchor, local)
    shards = [
      collectives.shard_axes(x, axis_name) for x in jax.tree.leaves(delta)
    ]
    leaves = compression_lib.each_leaf(compression, delta)
    step = reduce.elementwise_step(outer, state.anchor)

    def transmit(
      delta: ct.Delta, error: ct.PyTree, parts: jax.Array, lost: jax.Array
    ) -> tuple[ct.PyTree, ...]:
      done = exchange_lib.exchange(
        delta, error, parts, leaves, rules, shards, lost, step
      )
      return tuple(done)

    mean, error, stats = collectives.on_shards(
      transmit, (delta, state.error), axis_name, (parts, state.lost)
    )
    rest = outer if step is None else optax.identity()
    anchor, outer_state = outer_update(rest, mean, state.outer, state.anchor)
    moved = state._replace(
      exchanged=state.count,
      anchor=anchor,
      error=error,
      outer=outer_state,
      lost=jnp.zeros_like(state.lost),
      stats=stats,
    )
    updates = jax.tree.map(
      lambda a, p, u: (a.astype(p.dtype) - p).astype(u.dtype),
      anchor, params, updates,
    )  # fmt: skip
    return collectives.typed_as((updates, moved), (local, state))

  def update(
    updates: ct.Grads,
    state: ct.PyTree,
    params: ct.Params | None = None,
    weight: ct.Scalar = None,
    flush: bool = False,
    **extra_args: object,
  ) -> tuple[ct.Grads, ct.PyTree]:
    if params is None:
      raise ValueError('sparseloco: update needs params, got None')
    arguments.check_state(state, SparseLoCoState)
    params = arguments.where_given(updates, params)
    arguments.check_trees(params, updates=updates, state=state.anchor)
    if not isinstance(flush, bool):
      raise TypeError(f'flush: expected True or False, got {flush!r}')
    arguments.check_axes(params, axis_name)
    parts = weight_lib.parts_of(weight)
    state = collectives.sharded_like(state, params)
    if flush:
      updates = jax.tree.map(jnp.zeros_like, params)
    else:
      updates, inner_state = inner.update(
        updates, state.inner, params, **extra_args
      )
      updates, inner_state, lost = finite.step(
        updates, params, inner_state, state.inner
      )
      state = state._replace(
        count=state.count + 1,
        inner=inner_state,
        lost=state.lost | collectives.on_any_shard(lost, axis_name),
      )
    params, updates, parts, lost = collectives.varying(
      (params, updates, parts, state.lost), axis_name
    )
    state = state._replace(lost=lost)
    if flush:
      return synchronize(params, updates, state, parts)
    # The branches do not touch the inner state.
    updates, moved = jax.lax.cond(
      state.count - state.exchanged >= inner_steps,
      synchronize,
      lambda params, updates, state, parts: (updates, state),
      params,
      updates,
      state._replace(inner=()),
      parts,
    )
    return updates, moved._replace(inner=state.inner)

  return optax.GradientTransformationExtraArgs(init, update)


def flush(
  tx: optax.GradientTransformationExtraArgs,
  state: ct.OptState,
  params: ct.Params,
  **extra_args: object,
) -> tuple[ct.Params, ct.OptState]:
  """Returns the updates and state of an exchange before H steps are done.

  Without it, the steps since the last exchange are in nobody's `state.anchor`.
  The next round begins here. `extra_args`, such as `weight`, go to `tx.update`.

  Raises:
    TypeError: `state` has no rounds, as that of `sparseloco` and `diloco` has.
  """
  is_round = lambda x: isinstance(x, SparseLoCoState)  # noqa: E731
  if not any(map(is_round, jax.tree.leaves(state, is_leaf=is_round))):
    raise TypeError(
      'flush: expected a state of sparseloco or diloco, which have rounds, '
      f'got {jax.tree.structure(state)}'
    )
  zeros = jax.tree.map(jnp.zeros_like, params)
  return tx.update(zeros, state, params, flush=True, **extra_args)


def state_axes(state: ct.OptState, shared: Any, own: Any) -> ct.PyTree:
  """Returns the axes of an optimizer state over peers, a prefix tree.

  Counters, anchors and `outer` of `sparseloco`, `diloco` and `streaming_diloco`
  are equal on all peers, all else is each peer's own:

    jax.vmap:       axes = state_axes(state, None, 0), for in_axes and out_axes
    jax.shard_map:  specs = state_axes(state, P(), P('peers'))

  With these axes a step under `jax.vmap` computes the exchange only when it is
  due, as everywhere else: whether it is due does not depend on the peer. And
  `state.anchor` is one tree, not one per peer.
  """

  def axes(x: Any) -> Any:
    if not hasattr(x, 'SHARED'):
      return own
    return type(x)(*(shared if f in x.SHARED else own for f in x._fields))

  return jax.tree.map(axes, state, is_leaf=lambda x: hasattr(x, 'SHARED'))


def _copy(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns a copy, since callers donate params and state together."""
  if dtype is None or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    return jnp.copy(x)
  return jnp.array(x, dtype)
