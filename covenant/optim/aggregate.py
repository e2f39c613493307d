"""Many peers' messages become one delta.

Per tensor, each peer is scaled down to the median norm of all peers; then an
element is the mean of those who sent it (reference/templar.md 3.9) or, as the
paper writes it, of all peers; by their weights, if they have any (weight.py).
Peers are added one at a time and in the order given: memory does not grow with
their number, and every node that applies the same list gets the same bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant.optim import compression as compression_lib
from covenant.optim import weight as weight_lib

Compression = compression_lib.Compression
Weight = weight_lib.Weight
Sums = compression_lib.Sums


def aggregate(
  messages: Sequence[Any],
  like: Any,
  compression: Compression,
  mean_over: str = 'senders',
  clip: str = 'median',
  shards: Any = None,
  weights: Sequence[Weight] | None = None,
) -> Any:
  """The mean delta of `messages`, a float32 pytree shaped like `like`.

  One tensor after another, so that only one is ever being summed up.

  Args:
    messages: one message a peer, in uid order. None at all gives zeros.
    like: the parameters, or their shapes.
    compression: what made the messages.
    mean_over: 'senders' divides each element by how many sent it, 'all' by
      the number of messages; where these have weights, by their sum.
    clip: see `clip_factors`.
    shards: where `messages` and `like` are of one shard, in `jax.shard_map`:
      for each tensor the axes it is sharded on, a pytree of tuples. Norms are
      those of whole tensors.
    weights: one a message; None: all count alike.

  Raises:
    ValueError: more messages than can be counted.
  """
  weights = weights or [Weight()] * len(messages)
  parts_R, sizes_R = columns(weights)
  if shards is None:
    shards = jax.tree.map(lambda _: (), like)

  def norms(_: Any, axes: tuple[str, ...], *parts: Any) -> jax.Array:
    norms_R = jnp.stack([compression.norm(part) for part in parts])
    if not axes:
      return norms_R
    return jnp.sqrt(over_shards(jnp.square(norms_R), axes))

  def leaf(x: Any, factors_R: Any, *parts: Any) -> jax.Array:
    sums = start(x, compression)
    for part, factor, of_whole in zip(parts, factors_R, parts_R, strict=True):
      sums = add(sums, part, factor[None], x, compression, of_whole)
    return mean(sums, peers(parts_R), x, compression, mean_over)

  treedef = jax.tree.structure(like)
  factors = [()] * treedef.num_leaves
  if messages and factors:
    norms_P = jax.tree.leaves(jax.tree.map(norms, like, shards, *messages))
    factors_RxP = clip_factors(jnp.stack(norms_P, axis=1), clip, sizes_R)
    factors = list(weighted(factors_RxP, parts_R).T)
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


def columns(weights: Sequence[Weight]) -> tuple[np.ndarray, np.ndarray]:
  """The parts, uint16 [R], and the sizes, float32 [R], of R weights."""
  if len(weights) > weight_lib.MOST_PEERS:
    raise ValueError(
      f'expected at most {weight_lib.MOST_PEERS} messages, got {len(weights)}'
    )
  parts_R = np.array([w.parts for w in weights], np.uint16)
  return parts_R, np.array([w.size for w in weights], np.float32)


class Peers(NamedTuple):
  """Of the messages that were added; float32, a peer that counts whole is 1."""

  total: Any = np.float32(1)  # their weights together
  average: Any = np.float32(1)


def peers(parts_R: np.ndarray) -> Peers:
  """Of messages of these weights; of none, as of one."""
  total = parts_R.sum(dtype=np.int64) / weight_lib.WHOLE
  average = total / len(parts_R) if len(parts_R) else 1.0
  return Peers(np.float32(total), np.float32(average))


def weighted(factors_RxP: jax.Array, parts_R: np.ndarray) -> jax.Array:
  """`clip_factors`, each times its peer's weight."""
  wholes_R = parts_R.astype(np.float32) / np.float32(weight_lib.WHOLE)
  return factors_RxP * wholes_R[:, None]


def lower_median(x_Rx: Any) -> Any:
  """Of an even number the lower, as deployed (reference/templar.md 11.2)."""
  return jnp.sort(x_Rx, axis=0)[(x_Rx.shape[0] - 1) // 2]


def clip_factors(
  norms_RxP: jax.Array, clip: str = 'median', sizes_R: Any = None
) -> jax.Array:
  """How much of each peer's tensor counts: min(1, reach * median / norm).

  The reach is 1, but for who trained on more than the median peer: its delta
  is honestly longer, nearly in proportion (weight.py has numbers). Who trained
  on less keeps a reach of 1: its error feedback may be of fuller rounds.

  Args:
    norms_RxP: L2 norms of R peers' P tensors.
    clip: 'median', or 'none', which lets everything count whole.
    sizes_R: what each trained on; None: alike.

  Returns:
    float32 [R, P], in [0, 1].

  >>> clip_factors(jnp.array([[1.0], [2.0], [4.0], [8.0]]))[:, 0]
  Array([1.  , 1.  , 0.5 , 0.25], dtype=float32)
  """
  if clip == 'none':
    return jnp.ones_like(norms_RxP)
  if clip != 'median':
    raise ValueError(f"clip: expected 'median' or 'none', got {clip!r}")
  limit_RxP = lower_median(norms_RxP)[None]
  if sizes_R is not None:
    limit_RxP = limit_RxP * reach(sizes_R, lower_median(sizes_R))[:, None]
  return jnp.minimum(1.0, limit_RxP / (norms_RxP + 1e-8))


def reach(size: Any, median: Any) -> Any:
  """How many medians long a delta may be, of who trained on `size`."""
  return jnp.maximum(jnp.float32(1), size / median)


def start(like: Any, compression: Compression) -> Any:
  """The aggregate of no peer: a `Sums` for each leaf of `like`."""
  return jax.tree.map(lambda x: compression.start(x.shape), like)


def add(
  sums: Any,
  message: Any,
  factors_P: jax.Array,
  like: Any,
  compression: Compression,
  parts: int | jax.Array = weight_lib.WHOLE,
) -> Any:
  """The aggregate with one more peer's message, tensor p times factor p.

  The factors have its weight in them, `parts` says it (weight.py).
  """
  treedef = jax.tree.structure(like)
  leaves = [
    compression.add(s, part, factors_P[p], parts)
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
  of: Peers,
  like: Any,
  compression: Compression,
  over: str = 'senders',
) -> Any:
  """The aggregated delta of added messages, of peers `of`; zeros without any.

  An element whose senders weigh less than the average peer moves by as much
  less. Else weights would mean nothing where one peer alone sends, which over
  senders is nearly everywhere. Eight full replicas of 8, 4, 2 and 1 sequences a
  step, weighed by tokens (experiments/study.py's setting, one seed), had 1.778
  nats a byte without this, 1.735 with it; eight alike, 1.731.
  """
  if over not in ('senders', 'all'):
    raise ValueError(f"mean over: expected 'senders' or 'all', got {over!r}")

  def divisor(count: Any) -> jax.Array:
    return jnp.maximum(jnp.asarray(count, jnp.float32), of.average)

  def region(i: int, s: Sums) -> jax.Array:
    senders = s.senders[i].astype(jnp.float32) / weight_lib.WHOLE
    return s.total[i] / divisor(senders if over == 'senders' else of.total)

  def leaf(x: Any, s: Sums) -> jax.Array:
    parts = [region(i, s) for i in range(len(s.total))]
    return compression.join(parts, x.shape)

  return jax.tree.map(leaf, like, sums)
