"""Many peers' messages become one delta.

Per tensor, each peer is scaled down to the median norm of all peers; then an
element is the mean of those who sent it (reference/templar.md 3.9) or, as the
paper writes it, of all peers. Peers are added one at a time and in the order
given: memory does not grow with their number, and every node that applies the
same list gets the same bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from covenant.optim import compression as compression_lib

Compression = compression_lib.Compression
Sums = compression_lib.Sums


class Defence(NamedTuple):
  """What keeps few peers from moving an element far. By default nothing.

  With the mean over senders, an element that one peer alone sends moves as
  far as one on which all agree: `least_senders` = m divides by at least m.
  """

  least_senders: int = 1
  # Of an element that three or more send, the largest and the smallest value
  # do not count. One peer more or less; more would have to be held at once.
  trim: bool = False
  # No value of a peer counts for more than so many times the mean magnitude
  # of what it sends of the tensor; 0: any.
  cap: float = 0.0


NO_DEFENCE = Defence()


def aggregate(
  messages: Sequence[Any],
  like: Any,
  compression: Compression,
  mean_over: str = 'senders',
  clip: str = 'median',
  shards: Any = None,
  defence: Defence = NO_DEFENCE,
) -> Any:
  """The mean delta of `messages`, a float32 pytree shaped like `like`.

  One tensor after another, so that only one is ever being summed up.

  Args:
    messages: one message a peer, in uid order. None at all gives zeros.
    like: the parameters, or their shapes.
    compression: what made the messages.
    mean_over: 'senders' divides each element by how many sent it, 'all' by
      the number of messages.
    clip: 'median' scales each peer's tensor down to the (lower) median norm.
    shards: where `messages` and `like` are of one shard, in `jax.shard_map`:
      for each tensor the axes it is sharded on, a pytree of tuples. Norms are
      those of whole tensors.
    defence: against few who would move much.
  """
  if shards is None:
    shards = jax.tree.map(lambda _: (), like)

  def norms(_: Any, axes: tuple[str, ...], *parts: Any) -> jax.Array:
    norms_R = jnp.stack([compression.norm(part) for part in parts])
    if not axes:
      return norms_R
    return jnp.sqrt(over_shards(jnp.square(norms_R), axes))

  def leaf(x: Any, factors_R: Any, *parts: Any) -> jax.Array:
    sums = start(x, compression, defence)
    for part, factor in zip(parts, factors_R, strict=True):
      limit = limits(part, x, compression, defence)
      sums = add(sums, part, factor[None], x, compression, limit)
    return mean(sums, len(parts), x, compression, mean_over, defence)

  treedef = jax.tree.structure(like)
  factors = [()] * treedef.num_leaves
  if messages and factors:
    norms_P = jax.tree.leaves(jax.tree.map(norms, like, shards, *messages))
    factors = list(clip_factors(jnp.stack(norms_P, axis=1), clip).T)
  return jax.tree.map(leaf, like, treedef.unflatten(factors), *messages)


def over_shards(tree: Any, axes: tuple[str, ...]) -> Any:
  """The sum of every leaf over the shards along `axes`, if there are any."""
  return jax.lax.psum(tree, axes) if axes else tree


def message_norms(
  message: Any, like: Any, compression: Compression
) -> jax.Array:
  """L2 norm of each tensor of a message: float32 [P], in leaf order."""
  parts = jax.tree.structure(like).flatten_up_to(message)
  return jnp.stack([compression.norm(part) for part in parts])


def limits(
  message: Any, like: Any, compression: Compression, defence: Defence
) -> jax.Array | None:
  """How large a value of a message counts at most, for `defence.cap`.

  Returns:
    float32 [P], of each tensor, in leaf order; None if there is no cap.
  """
  if not defence.cap:
    return None
  parts = jax.tree.structure(like).flatten_up_to(message)
  return jnp.stack([compression.limit(part, defence.cap) for part in parts])


def clip_factors(norms_RxP: jax.Array, clip: str = 'median') -> jax.Array:
  """How much of each peer's tensor counts: min(1, median / norm).

  Args:
    norms_RxP: L2 norms of R peers' P tensors.
    clip: 'none' lets everything count whole.

  Returns:
    float32 [R, P] in [0, 1]. One-sided: small contributions are not grown.
    Of an even number of peers the lower of the two middle norms is the
    median, as deployed (reference/templar.md 11.2).

  >>> clip_factors(jnp.array([[1.0], [2.0], [4.0], [8.0]]))[:, 0]
  Array([1.  , 1.  , 0.5 , 0.25], dtype=float32)
  """
  if clip == 'none':
    return jnp.ones_like(norms_RxP)
  if clip != 'median':
    raise ValueError(f"clip: expected 'median' or 'none', got {clip!r}")
  middle = (norms_RxP.shape[0] - 1) // 2
  median_1xP = jnp.sort(norms_RxP, axis=0)[middle : middle + 1]
  return jnp.minimum(1.0, median_1xP / (norms_RxP + 1e-8))


def start(
  like: Any, compression: Compression, defence: Defence = NO_DEFENCE
) -> Any:
  """The aggregate of no peer: a `Sums` for each leaf of `like`."""
  return jax.tree.map(lambda x: compression.start(x.shape, defence.trim), like)


def add(
  sums: Any,
  message: Any,
  factors_P: jax.Array,
  like: Any,
  compression: Compression,
  limits_P: jax.Array | None = None,
) -> Any:
  """The aggregate with one more peer's message, tensor p times factor p.

  No value of tensor p counts for more than limit p, before scaling.
  """
  treedef = jax.tree.structure(like)
  leaves = [
    compression.add(
      s, part, factors_P[p], None if limits_P is None else limits_P[p]
    )
    for p, (s, part) in enumerate(
      zip(
        treedef.flatten_up_to(sums),
        treedef.flatten_up_to(message),
        strict=True,
      )
    )
  ]
  return treedef.unflatten(leaves)


def mean(
  sums: Any,
  peers: int | jax.Array,
  like: Any,
  compression: Compression,
  over: str = 'senders',
  defence: Defence = NO_DEFENCE,
) -> Any:
  """The aggregated delta of `peers` added messages; zeros if there are none."""
  if over not in ('senders', 'all'):
    raise ValueError(f"mean over: expected 'senders' or 'all', got {over!r}")

  def divisor(count: Any) -> jax.Array:
    return jnp.maximum(jnp.asarray(count, jnp.float32), defence.least_senders)

  def region(i: int, s: Sums) -> jax.Array:
    total, senders, count = s.total[i], s.senders[i], peers
    if defence.trim:
      many = jnp.broadcast_to(senders >= 3, total.shape)
      # Where nobody sent, the extremes are infinite.
      total -= jnp.where(many, s.highest[i], 0) + jnp.where(
        many, s.lowest[i], 0
      )
      senders = senders - jnp.where(senders >= 3, 2, 0).astype(senders.dtype)
      count = peers - jnp.where(many, 2, 0)
    return total / divisor(senders if over == 'senders' else count)

  def leaf(x: Any, s: Sums) -> jax.Array:
    parts = [region(i, s) for i in range(len(s.total))]
    return compression.join(parts, x.shape)

  return jax.tree.map(leaf, like, sums)
