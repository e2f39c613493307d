"""The one sum of messages: from many peers' messages to a delta and a step.

A leaf, or a slice of one, is reduced in three steps: `Compression.start` gives
empty sums, `add` adds one peer's part of a message times its factor, `finish`
divides by the senders of each element. `outer_update` moves the parameters by
the result. Peers are added one at a time and in the order given: memory does
not grow with their number, and every node that adds the same list gets the same
bits.

Per tensor, each peer is scaled down to the median norm of all peers; then an
element is the mean over the peers that sent it or, as in SparseLoCo (arXiv
2508.15706), over all peers, by their weights (weight.py).

All arithmetic of the mean is in this module: products, sums, norms, clip
factors and the outer step. `outer_step.py` runs it where parameters lie.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import typing as ct
from covenant.optim import arguments
from covenant.optim import compression as compression_lib
from covenant.optim import exact
from covenant.optim import quantize
from covenant.optim import weight as weight_lib

Compression = compression_lib.Compression
Sums = compression_lib.Sums
Weight = weight_lib.Weight


def add(
  sums: Sums,
  part: ct.Message,
  factor: ct.Scalar,
  compression: Compression,
  parts: ct.Scalar = weight_lib.WHOLE,
) -> Sums:
  """Returns the sums of a leaf with one more peer.

  Args:
    sums: those of the peers before.
    part: the leaf's part of the peer's message.
    factor: the peer's clip factor times its weight.
    compression: the compressor that made the message.
    parts: the peer's weight as a sender, in parts of a whole (weight.py).
  """
  values = compression.values(part)
  return add_values(sums, part, values, factor, compression, parts)


def add_values(
  sums: Sums,
  part: ct.Message,
  values: Sequence[jax.Array],
  factor: ct.Scalar,
  compression: Compression,
  parts: ct.Scalar,
) -> Sums:
  """Returns `add` of a part whose values are known.

  Args:
    sums: those of the peers before.
    part: the leaf's part of the peer's message.
    values: the values of `part`.
    factor: see `add`, or a factor of each row of the values.
    compression: the compressor that made the message.
    parts: see `add`.
  """
  products = [exact.product(factor, v) for v in values]
  return Sums(
    compression.scatter_add(sums.total, part, products),
    compression.count(sums.senders, part, parts),
  )


def finish(
  sums: Sums,
  totals: weight_lib.Totals,
  shape: Sequence[int],
  compression: Compression,
  mean_over: str = 'senders',
) -> jax.Array:
  """Returns the mean delta of a leaf, float32; zeros if nothing was added.

  An element whose senders together weigh less than the average peer moves by
  proportionally less. Otherwise weights would have no effect on elements that
  one peer alone sends, which are most of them.

  Args:
    sums: those of all peers.
    totals: the divisors by the weights of all peers (weight.py).
    shape: that of the leaf.
    compression: the compressor that made the messages.
    mean_over: 'senders' divides each element by the weight of the peers that
      sent it, 'all' by the weight of all peers.
  """
  check_mean_over(mean_over)

  def region(total: jax.Array, senders: jax.Array) -> jax.Array:
    factor = jnp.asarray(totals.of_all, jnp.float32)
    if mean_over == 'senders':
      table = jnp.asarray(totals.of_senders)
      factor = table.at[senders.astype(jnp.int32)].get(mode='promise_in_bounds')
    return exact.product(total, factor)

  regions = [region(*x) for x in zip(sums.total, sums.senders, strict=True)]
  return compression.join(regions, shape)


def check_mean_over(mean_over: str) -> None:
  """Raises ValueError unless `finish` knows the mean."""
  if mean_over not in ('senders', 'all'):
    raise ValueError(
      f"mean_over: expected 'senders' or 'all', got {mean_over!r}"
    )


def check_clip(clip: str) -> None:
  """Raises ValueError unless `clip_factors` knows the rule."""
  if clip not in ('median', 'none'):
    raise ValueError(f"clip: expected 'median' or 'none', got {clip!r}")


def reduce(
  parts: Sequence[ct.Message],
  factors_R: ct.Array,
  parts_R: np.ndarray,
  totals: weight_lib.Totals,
  shape: Sequence[int],
  compression: Compression,
  mean_over: str = 'senders',
) -> jax.Array:
  """Returns the mean delta of a leaf from its parts of R messages."""
  sums = compression.start(shape)
  for part, factor, weight in zip(parts, factors_R, parts_R, strict=True):
    sums = add(sums, part, factor, compression, weight)
  return finish(sums, totals, shape, compression, mean_over)


def aggregate(
  messages: Sequence[ct.Message],
  abstract_params: ct.Params,
  compression: Compression,
  mean_over: str = 'senders',
  clip: str = 'median',
  shards: ct.PyTree = None,
  weights: Sequence[Weight | float] | None = None,
) -> ct.Delta:
  """Returns the mean delta of messages, float32 shaped like the parameters.

  One tensor is reduced after another, so that the sums of only one exist.

  Args:
    messages: one message per peer, in uid order; none give zeros.
    abstract_params: the parameters or their shapes.
    compression: the compressor that made the messages.
    mean_over: see `finish`.
    clip: see `clip_factors`.
    shards: the mesh axes of each tensor, a pytree of tuples, where `messages`
      and `abstract_params` are of one shard in `jax.shard_map`. Norms are those
      of whole tensors.
    weights: one per message, a `Weight` or a number from 0 to 1; None: all
      count alike.

  Raises:
    ValueError: more messages than the sums can count, or as many weights.
    TypeError: `compression` is no compressor.
  """
  compression_lib.check_one(compression)
  check_mean_over(mean_over)
  check_clip(clip)
  parts_R, sizes_R = weight_lib.columns(weights, len(messages))
  if shards is None:
    shards = jax.tree.map(lambda _: (), abstract_params)

  def norms(_: Any, axes: tuple[str, ...], *parts: ct.Message) -> jax.Array:
    return exact.norms([compression.values(x) for x in parts], axes)

  treedef = jax.tree.structure(abstract_params)
  factors = [()] * treedef.num_leaves
  if messages and factors:
    norms_P = jax.tree.leaves(
      jax.tree.map(norms, abstract_params, shards, *messages)
    )
    norms_RxP = jnp.stack(norms_P, axis=1)
    if not parts_R.all():  # a peer without weight sets no limit
      norms_RxP = jnp.where(parts_R[:, None] > 0, norms_RxP, 0)
    factors_RxP = clip_factors(norms_RxP, clip, sizes_R)
    wholes_Rx1 = weight_lib.wholes(parts_R)[:, None]
    factors = list(exact.product(factors_RxP, wholes_Rx1).T)

  # One table in the program, not one per leaf.
  totals = jax.tree.map(jnp.asarray, weight_lib.totals(parts_R))

  def leaf(x: Any, factors_R: Any, *parts: ct.Message) -> jax.Array:
    return reduce(
      parts, factors_R, parts_R, totals, x.shape, compression, mean_over
    )

  return jax.tree.map(
    leaf, abstract_params, treedef.unflatten(factors), *messages
  )


def norm(part: ct.Message, compression: Compression) -> jax.Array:
  """Returns the L2 norm of the values in a leaf's part of a message."""
  return exact.norms([compression.values(part)])[0]


def message_norms(
  message: ct.Message, abstract_params: ct.Params, compression: Compression
) -> jax.Array:
  """Returns the norm of each tensor of a message: float32 [P]."""
  parts = jax.tree.structure(abstract_params).flatten_up_to(message)
  return part_norms(parts, compression)


def part_norms(
  parts: Sequence[ct.Message], compression: Compression
) -> jax.Array:
  """Returns the norms of tensors, from their parts: float32 [P].

  Checks, scores and sums of one model share these two compiled programs. In a
  single one XLA would decode the values again for each product of the norm.
  """
  return exact.norms(_values(parts, compression))


@functools.partial(jax.jit, static_argnames=('compression',))
def _values(
  parts: Sequence[ct.Message], compression: Compression
) -> list[list[jax.Array | exact.Counted]]:
  if isinstance(compression, compression_lib.TopK):
    counted = functools.partial(quantize.counted, compression.quantizer)
    return [[counted(p.codes, p.scales) for p in part] for part in parts]
  return [[x.reshape(-1) for x in compression.values(p)] for p in parts]


def lower_median(x_Rx: Any) -> Any:
  """Returns the median along the first axis of the numbers above zero.

  It is the lower one of an even number of them, and 0 of none: peers without a
  delta of a tensor, such as an expert that they did not use, set no limit.
  """
  xp = x_Rx.__array_namespace__()
  above_Rx = x_Rx > 0
  sorted_Rx = xp.sort(xp.where(above_Rx, x_Rx, xp.inf), axis=0)
  count_1x = xp.sum(above_Rx, axis=0, keepdims=True)
  index_1x = xp.maximum(count_1x - 1, 0) // 2
  median_1x = xp.take_along_axis(sorted_Rx, index_1x, axis=0)
  return xp.where(count_1x > 0, median_1x, xp.zeros_like(median_1x))[0]


def clip_factors(
  norms_RxP: Any, clip: str = 'median', sizes_R: np.ndarray | None = None
) -> Any:
  """Returns the factor of each peer's tensor: min(1, reach * median / norm).

  The reach is 1, or more for peers that trained on more than the median peer:
  their deltas are longer, nearly in proportion. It is not less than 1 for peers
  that trained on less: their error feedback may come from fuller rounds.

  NumPy arrays are computed on the host, without a program per number of peers.

  Args:
    norms_RxP: L2 norms of R peers' P tensors.
    clip: 'median', or 'none', which gives ones.
    sizes_R: sequences that each peer trained on; None: equally many.

  Returns:
    float32 [R, P], in [0, 1].

  >>> clip_factors(np.array([[1], [2], [4], [8]], np.float32))[:, 0]
  array([1.  , 1.  , 0.5 , 0.25], dtype=float32)
  """
  check_clip(clip)
  if clip == 'none':
    return norms_RxP.__array_namespace__().ones_like(norms_RxP)
  limits_RxP = lower_median(norms_RxP)[None]
  if sizes_R is not None:
    reach_Rx1 = reach(sizes_R, lower_median(sizes_R))[:, None]
    longer_RxP = exact.product(limits_RxP, reach_Rx1)
    xp = norms_RxP.__array_namespace__()
    limits_RxP = xp.where(reach_Rx1 > 1, longer_RxP, limits_RxP)
  return limit_factors(norms_RxP, limits_RxP)


def reach(size: ct.Scalar, median: ct.Scalar) -> Any:
  """Returns the largest norm of a delta, in medians, by its sequences."""
  return np.maximum(np.float32(1), size / median)


def limit_factors(norms: Any, limits: Any) -> Any:
  """Returns the factors that bring norms down to their limits."""
  return exact.quotient(limits, norms)


def nesterov(
  learning_rate: float, momentum: float = 0.0
) -> optax.GradientTransformation:
  """Returns SGD with Nesterov momentum; 0 is plain SGD, without state.

  m <- momentum * m + delta;  theta <- theta - lr * (delta + momentum * m)

  DiLoCo uses (0.7, 0.9); SparseLoCo as published is (1.0, 0).
  """
  arguments.check_number('nesterov, learning_rate', learning_rate, 0)
  arguments.check_number('nesterov, momentum', momentum, 0, 1)
  plain = isinstance(momentum, int | float) and not momentum

  def init(params: ct.Params) -> ct.OptState:
    if plain:
      return optax.EmptyState()
    return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

  def update(
    updates: ct.Delta, state: Any, params: ct.Params | None = None
  ) -> tuple[ct.PyTree, ct.OptState]:
    del params
    if not plain:

      def add(d: jax.Array, m: jax.Array) -> jax.Array:
        wide = d.astype(jnp.float32) + exact.product(momentum, m)
        return wide.astype(m.dtype)

      trace = jax.tree.map(add, updates, state.trace)
      updates = jax.tree.map(add, updates, trace)
      state = optax.TraceState(trace)

    def step(u: jax.Array) -> jax.Array:
      return -exact.product(learning_rate, u).astype(u.dtype)

    return jax.tree.map(step, updates), state

  # A traced rate may not enter the `jax.shard_map` of an exchange.
  if plain and isinstance(learning_rate, int | float):
    return _Plain(init, update)
  return optax.GradientTransformation(init, update)


class _Plain(optax.GradientTransformation):
  """A stateless transformation that treats every element alike."""


def elementwise_step(
  outer: optax.GradientTransformation, params: ct.Params
) -> Callable[[jax.Array], ct.PyTree] | None:
  """Returns the step of `outer` as a function of any array of a delta.

  There is one if `outer` is plain SGD (`nesterov`) and `params` are float32;
  otherwise the result is None.
  """
  wide = all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  if not isinstance(outer, _Plain) or not wide:
    return None
  return lambda delta: outer.update(delta, optax.EmptyState())[0]


def outer_update(
  outer: optax.GradientTransformation,
  delta: ct.Delta,
  state: ct.OptState,
  params: ct.Params,
) -> tuple[ct.Params, ct.OptState]:
  """Returns parameters and optimizer state after one outer step.

  Args:
    outer: an optax transformation, such as `nesterov`.
    delta: the aggregated pseudo-gradient (start minus end), like `params`.
    state: the state of `outer`.
    params: the parameters at which the round started.

  Returns:
    The new parameters, in their own dtypes, and the new state.

  Raises:
    TypeError: `outer` is no optax transformation.
  """
  arguments.check_transformation('outer', outer)
  delta = jax.tree.map(lambda d, p: d.astype(p.dtype), delta, params)
  updates, state = outer.update(delta, state, params)
  return optax.apply_updates(params, updates), state


def square_sum(tree: ct.PyTree) -> jax.Array:
  """Returns the sum of the squares of all elements, leaf after leaf."""
  squares = (jnp.sum(x * x) for x in jax.tree.leaves(tree))
  return sum(squares, jnp.float32(0))
