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

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import typing as ct
from covenant.optim import collectives
from covenant.optim import compression as compression_lib
from covenant.optim import compressor
from covenant.optim import quantize
from covenant.optim import reduce

aggregate = reduce.aggregate
Compression = compression_lib.Compression
Dense = compression_lib.Dense
Exact = quantize.Exact
Linear = quantize.Linear
nesterov = reduce.nesterov
outer_update = reduce.outer_update
Sign = quantize.Sign
SignMagnitude = quantize.SignMagnitude
Statistical = quantize.Statistical
TopK = compression_lib.TopK


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
  """
  if error is None or error_decay is None:
    return jax.tree.map(compression.compress, delta), None
  treedef = jax.tree.structure(delta)
  pairs = [
    compressor.compress(d, e, compression, error_decay)
    for d, e in zip(
      jax.tree.leaves(delta), treedef.flatten_up_to(error), strict=True
    )
  ]
  message, error = zip(*pairs, strict=True) if pairs else ((), ())
  return treedef.unflatten(message), treedef.unflatten(error)


def decompress(
  message: ct.Message, abstract_params: ct.Params, compression: Compression
) -> ct.Delta:
  """Returns the float32 pytree that `message` stands for."""
  return jax.tree.map(
    lambda x, part: compression.decompress(part, x.shape),
    abstract_params,
    message,
  )


class Stats(NamedTuple):
  """Statistics of the last exchange of one peer, over all its tensors.

  With x what was offered to the compressor and s what was sent of it:
  """

  relative_error: jax.Array  # |x - s| / |x|
  # <x, s>^2 / (|x|^2 |s|^2); of exact top-k |s|^2 / |x|^2
  energy_kept: jax.Array
  error_norm: jax.Array  # |x - s|, the norm of the error feedback left behind
  code_counts: jax.Array  # int32 [2**bits]: how often each code was sent


def measure(
  message: ct.Message,
  residual: ct.PyTree,
  compression: Compression,
  shards: ct.PyTree = None,
) -> Stats:
  """Returns the statistics of `message`, which left `residual` behind.

  Args:
    message: this peer's.
    residual: float32, the part of the compressor's input that was not sent.
    compression: the compressor that made the message.
    shards: see `aggregate`.
  """
  if shards is None:
    shards = jax.tree.map(lambda _: (), residual)

  def leaf(
    left: jax.Array, part: ct.Message, axes: tuple[str, ...]
  ) -> tuple[jax.Array, jax.Array]:
    sent = compression.decompress(part, left.shape)
    offered = sent + left
    products = (left * left, offered * offered, sent * sent, offered * sent)
    sums_4 = jnp.stack([jnp.sum(x) for x in products])
    counts = compression.code_counts(part)
    return collectives.sum_over((sums_4, counts), axes)

  sums_4 = jnp.zeros(4, jnp.float32)
  counts = jnp.zeros(compression.num_codes, jnp.int32)
  measured = jax.tree.map(leaf, residual, message, shards)
  for one in jax.tree.structure(residual).flatten_up_to(measured):
    sums_4, counts = sums_4 + one[0], counts + one[1]
  tiny = jnp.finfo(jnp.float32).tiny
  norm = jnp.sqrt(sums_4[0])
  whole = jnp.maximum(jnp.sqrt(sums_4[1]), tiny)
  along = sums_4[3] / jnp.maximum(jnp.sqrt(sums_4[2]), tiny)
  return Stats(
    relative_error=norm / whole,
    energy_kept=jnp.square(along / whole),
    error_norm=norm,
    code_counts=counts,
  )


class SparseLoCoState(NamedTuple):
  """The state of one peer; `anchor` and `outer` are equal on every peer."""

  count: jax.Array  # shape=(), dtype=jnp.int32: inner updates so far
  anchor: ct.Params  # the parameters at which the round started, exactly
  error: ct.PyTree  # float32, shaped like the parameters; None without feedback
  inner: optax.OptState
  outer: optax.OptState
  stats: Stats  # of the last exchange; zeros before the first


def sparseloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation | None = None,
  inner_steps: int = 30,
  compression: Compression | None = None,
  error_decay: float | None = 0.95,
  axis_name: str | None = None,
  mean_over: str = 'senders',
  clip: str = 'median',
) -> optax.GradientTransformationExtraArgs:
  """Returns SparseLoCo as an optax transformation.

  Every update applies `inner`; every `inner_steps`-th one also exchanges the
  compressed delta along `axis_name` and moves all peers to the same new
  parameters. Only the message crosses the axis (an all-gather).

  optax hands back differences, and `params + (new - params)` may round: the
  exact shared parameters are `state.anchor`. A peer's next delta is measured
  against that anchor, so rounding cannot add up and peers cannot drift.

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
    compression: `TopK()` if omitted.
    error_decay: beta of the error feedback; None turns the feedback off.
    axis_name: the named axis of `jax.shard_map` or `jax.vmap` along which the
      peers live; None for a single peer.
    mean_over: see `aggregate`.
    clip: see `aggregate`.

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
    ValueError: if `inner_steps` < 1 or `error_decay` is outside [0, 1].
  """
  if inner_steps < 1:
    raise ValueError(f'inner_steps: expected at least 1, got {inner_steps}')
  # `optax.inject_hyperparams` gives an array instead.
  if isinstance(error_decay, int | float) and not 0 <= error_decay <= 1:
    raise ValueError(f'error_decay: expected 0 to 1, got {error_decay}')
  inner = optax.with_extra_args_support(inner)
  outer = outer if outer is not None else nesterov(1.0)
  compression = compression if compression is not None else TopK()

  def init(params: ct.Params) -> SparseLoCoState:
    state = SparseLoCoState(
      count=jnp.zeros((), jnp.int32),
      # A copy: callers donate params and state together.
      anchor=jax.tree.map(jnp.copy, params),
      error=None if error_decay is None else init_error(params),
      inner=inner.init(params),
      outer=outer.init(params),
      stats=Stats(
        relative_error=jnp.zeros((), jnp.float32),
        energy_kept=jnp.zeros((), jnp.float32),
        error_norm=jnp.zeros((), jnp.float32),
        code_counts=jnp.zeros(compression.num_codes, jnp.int32),
      ),
    )
    return collectives.varying(state, axis_name)

  def transmit(
    delta: ct.Delta, error: ct.PyTree, shards: ct.PyTree
  ) -> tuple[ct.Delta, ct.PyTree, Stats]:
    message, error = compress(delta, error, compression, error_decay)
    messages = collectives.gather(message, axis_name)
    aggregated = aggregate(
      messages, delta, compression, mean_over, clip, shards
    )
    residual = error
    if residual is None:
      sent = decompress(message, delta, compression)
      residual = jax.tree.map(compressor.residual, delta, sent)
    return aggregated, error, measure(message, residual, compression, shards)

  def synchronize(
    local: ct.Params, state: SparseLoCoState
  ) -> tuple[ct.Params, SparseLoCoState]:
    delta = pseudo_gradient(state.anchor, local)
    shards = jax.tree.map(lambda x: collectives.shard_axes(x, axis_name), delta)
    aggregated, error, stats = collectives.on_shards(
      functools.partial(transmit, shards=shards),
      (delta, state.error),
      axis_name,
    )
    anchor, outer_state = outer_update(
      outer, aggregated, state.outer, state.anchor
    )
    state = state._replace(
      anchor=anchor, error=error, outer=outer_state, stats=stats
    )
    return collectives.varying((anchor, state), axis_name)

  def update(
    updates: ct.Grads,
    state: ct.PyTree,
    params: ct.Params | None = None,
    **extra_args: object,
  ) -> tuple[ct.Grads, SparseLoCoState]:
    if params is None:
      raise ValueError('sparseloco: update needs params, got None')
    updates, inner_state = inner.update(
      updates, state.inner, params, **extra_args
    )
    state = state._replace(count=state.count + 1, inner=inner_state)
    local = optax.apply_updates(params, updates)
    new, state = jax.lax.cond(
      state.count % inner_steps == 0,
      synchronize,
      lambda local, state: (local, state),
      *collectives.varying((local, state), axis_name),
    )
    return jax.tree.map(lambda n, p: n - p, new, params), state

  return optax.GradientTransformationExtraArgs(init, update)
