"""The exchange of a round's deltas among peers, inside one program.

Every peer compresses its delta, all messages cross the peers' axis as one array
of words (packing.py), and every peer reduces them to the same mean (reduce.py).
Leaves are compressed and reduced in few batches (batch.py), and peers are added
by a loop, so the program hardly grows with either. Where the leaves of a peer
are sharded it takes four collectives: one all-gather more for leaves that some
shards repeat, and the largest magnitudes and sums of integers, which make norms
and statistics those of whole tensors.

A peer of weight 0, or with a delta that is not finite, takes no part: it is
nobody's sender, sets no limit to others, and gets the same mean.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import batch as batch_lib
from covenant.optim import batch_sums
from covenant.optim import block_groups
from covenant.optim import collectives
from covenant.optim import compression as compression_lib
from covenant.optim import compressor
from covenant.optim import exact
from covenant.optim import packing
from covenant.optim import reduce
from covenant.optim import weight as weight_lib

Batch = batch_lib.Batch
each = batch_lib.each
Compression = compression_lib.Compression


class Stats(NamedTuple):
  """Statistics of the last exchange of one peer, over all its tensors.

  With x what was offered to the compressor and s what was sent of it:
  """

  relative_error: jax.Array  # |x - s| / |x|
  # <x, s>^2 / (|x|^2 |s|^2); of exact top-k |s|^2 / |x|^2
  energy_kept: jax.Array
  error_norm: jax.Array  # |x - s|, the norm of the error feedback left behind
  # int32 [2**bits]: how often each code was sent; None if nothing is coded.
  code_counts: jax.Array | None


class Rules(NamedTuple):
  """The static arguments of an exchange, see `sparseloco.sparseloco`."""

  axis_name: ct.AxisName
  error_decay: Any = None
  mean_over: str = 'senders'
  clip: str = 'median'


class Exchanged(NamedTuple):
  """The outcome of an exchange for one peer."""

  delta: ct.Delta  # `step` of the mean, float32, the same on all peers
  error: ct.PyTree  # new error feedback; None without
  stats: Stats


class _Sent(NamedTuple):
  """One peer's part of one batch of G elements."""

  words: jax.Array  # uint32 [G, W]
  rest: Any  # float32 [G, ...], the new error feedback; None without
  finite: jax.Array  # bool [G]
  sums: jax.Array  # float32 [G, 4]
  counts: jax.Array  # int32 [G, codes]


def no_stats(compressions: Sequence[Compression]) -> Stats:
  """Returns the statistics before the first exchange: zeros."""
  # Arrays of their own: one that is donated twice ends the process.
  a, b, c = (jnp.zeros((), jnp.float32) for _ in range(3))
  codes = max((c.num_codes for c in compressions), default=0)
  return Stats(a, b, c, jnp.zeros(codes, jnp.int32) if codes else None)


def exchange(
  delta: ct.Delta,
  error: ct.PyTree,
  parts: jax.Array,
  compressions: Sequence[Compression],
  rules: Rules,
  shards: Sequence[tuple[str, ...]],
  lost: ct.Scalar = False,
  step: Callable[[jax.Array], ct.PyTree] | None = None,
) -> Exchanged:
  """Returns the mean delta of all peers, and what this one keeps.

  Args:
    delta: this peer's pseudo-gradient, float32, or one shard of each leaf.
    error: its error feedback, like `delta`; None without.
    parts: int32, its weight in parts of 64; 0 if it takes no part.
    compressions: the compressor of each leaf.
    rules: the static arguments.
    shards: the mesh axes of each leaf's shards.
    lost: whether this peer's round is lost, as if its delta were not finite: it
      takes no part, and its error feedback is emptied.
    step: a function of the mean of each element, such as the outer step, which
      is applied to few arrays here instead of to every leaf.
  """
  leaves, treedef = jax.tree.flatten(delta)
  batches = batch_lib.Batches(leaves, compressions, shards)
  takes_part, decay = parts > 0, rules.error_decay
  if error is not None:
    # Added leaf by leaf, so that one tree is split and not two.
    leaves = [
      jax.lax.select(takes_part, compressor.offered(x, e, decay), e)
      for x, e in zip(leaves, jax.tree.leaves(error), strict=True)
    ]
  sent = [
    _compress(b, x, takes_part, error is not None)
    for b, x in zip(batches, batches.split(leaves), strict=True)
  ]
  flags_2xR, messages = _gather(batches, sent, parts, lost, rules.axis_name)
  values = [
    each(jax.vmap(b.compression.values), (m,))
    for b, m in zip(batches, messages, strict=True)
  ]
  norms_RxP, flags_2xR, stats = _norms(
    batches, values, flags_2xR, sent, len(leaves), rules.clip
  )
  finite_R = flags_2xR[1] == 0
  parts_R = jnp.where(finite_R, flags_2xR[0], 0).astype(jnp.int32)
  counted_RxP = jnp.where(parts_R[:, None] > 0, norms_RxP, 0)
  factors_RxP = exact.product(
    reduce.clip_factors(counted_RxP, rules.clip),
    weight_lib.wholes(parts_R)[:, None],
  )
  means = batch_sums.means(
    batches, messages, values, factors_RxP, parts_R, rules.mean_over, step
  )
  if error is None:
    (delta,) = batches.merge(means)
    return Exchanged(treedef.unflatten(delta), None, stats)
  # A lost round leaves no error feedback.
  index = collectives.index(rules.axis_name)
  is_own_finite = batch_lib.once(lambda x, i: x[i], finite_R, index)
  kept = [jnp.where(is_own_finite, s.rest, 0) for s in sent]
  delta, error = map(treedef.unflatten, batches.merge(means, kept))
  return Exchanged(delta, error, stats)


def _compress(
  batch: Batch, given: jax.Array, takes_part: jax.Array, keeps_rest: bool
) -> _Sent:
  """Returns the part sent of `given`, and the rest: all, if none is sent."""
  compression = batch.compression

  def element(given: jax.Array) -> _Sent:
    bad = ~jnp.isfinite(given)
    clean = jnp.where(bad, 0, given)
    if isinstance(compression, block_groups.BlockGroups):
      part, rest, sums = _compress_blocks(clean, bad, takes_part, compression)
    else:
      part = compression.compress(clean)
      sent = compression.decompress(part, batch.shape)
      rest = compressor.residual(clean, sent)
      terms = rest * rest, clean * clean, sent * sent, clean * sent
      sums = _sums_of(*terms, bad)
      rest = jnp.where(takes_part, rest, clean)
    finite = sums[4] == 0
    return _Sent(
      packing.pack(part, compression, batch.shape),
      rest if keeps_rest else None,
      finite,
      jnp.where(finite, sums[:4], 0),
      compression.code_counts(part),
    )

  return each(element, (given,))


def _compress_blocks(
  given: jax.Array,
  bad: jax.Array,
  takes_part: jax.Array,
  compression: block_groups.BlockGroups,
) -> tuple[ct.Message, jax.Array, jax.Array]:
  """Returns a part of the message, what it leaves, and five sums.

  These are four for `Stats` and that of `bad`. What is sent is subtracted in
  place, so that no other sum than that of the rest is of all of `given`.
  """
  part, chosen = compression.compress_and_keep(given)
  (sent,) = compression.values(part)
  given_NxL = given.reshape(given.shape[0], given.shape[2])
  taken = jnp.where(takes_part, sent, 0)
  (rest,) = compression.scatter_add((given_NxL,), part, [-taken])
  rest = rest.reshape(given.shape)
  left = chosen - taken
  terms = _sums_of(sent * sent, chosen * sent, chosen * chosen, left * left)
  of_rest, count = _sums_of(rest * rest, bad)
  of_given = jnp.maximum(of_rest - terms[3], 0) + terms[2]
  return part, rest, jnp.stack([of_rest, of_given, terms[0], terms[1], count])


def _sums_of(*terms: jax.Array) -> jax.Array:
  """Returns the sum of each of some arrays of one shape: float32 [T].

  Rows are added up first, all sums in one pass over them.
  """
  width = (terms[0].shape[-1] if terms[0].ndim else 1) or 1
  rows = [x.astype(jnp.float32).reshape(x.size // width, width) for x in terms]
  zeros = collectives.typed_like((jnp.float32(0),) * len(rows), rows)
  sums = jax.lax.reduce(
    rows, list(zeros),
    lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
    (1,),
  )  # fmt: skip
  return jnp.sum(jnp.stack(sums), axis=1)


def _gather(
  batches: batch_lib.Batches,
  sent: list[_Sent],
  parts: jax.Array,
  lost: ct.Scalar,
  axis_name: ct.AxisName,
) -> tuple[jax.Array, list[ct.Message]]:
  """Returns what all peers sent.

  Returns:
    float32 [2, R], each peer's weight and whether its round is lost, as far as
    this shard knows; and its part of every batch, [G, R, ...].
  """
  bad = [jnp.asarray(lost)[None], *(~s.finite for s in sent)]
  header = jnp.stack([parts, jnp.any(jnp.concatenate(bad)).astype(jnp.int32)])
  header_Rx2, *words_RxW = collectives.gather_shards(
    [header.astype(jnp.uint32), *(s.words.reshape(-1) for s in sent)],
    [batch_lib.axes(batches), *(b.axes for b in batches)],
    axis_name,
  )
  messages: list[Any] = [None] * len(sent)
  # Decoded together, leaves would be typed as varying over the axes of all.
  for axes in sorted({b.axes for b in batches}):
    chosen = [i for i, b in enumerate(batches) if b.axes == axes]
    own = [b for b in batches if b.axes == axes]
    parts_of = packing.unpack_batches(own, [words_RxW[i] for i in chosen])
    for i, message in zip(chosen, parts_of, strict=True):
      messages[i] = message
  return header_Rx2.T.astype(jnp.float32), messages


def _all_rows(
  batches: batch_lib.Batches,
  values: list[list[jax.Array]],
  peers: int,
  axes: tuple[str, ...],
) -> tuple[jax.Array, np.ndarray, Any]:
  """Returns the rows of all batches, padded to one width: [T, R, W].

  Then the tensor of each row, and whether this device counts it, of those that
  repeat it.
  """
  rows, owners, counted = [], [np.zeros(0, np.int32)], []
  for b, v in zip(batches, values, strict=False):
    row, owner = batch_lib.rows(b, v)
    rows.append(row)
    owners.append(owner)
    counted.append(_once(jnp.ones(len(owner), bool), b.axes, axes))
  width = max([1, *(row.shape[2] for row in rows)])
  rows = [
    jnp.pad(row, ((0, 0), (0, 0), (0, width - row.shape[2]))) for row in rows
  ]
  none = jnp.zeros((0, peers, width), jnp.float32)
  return (
    jnp.concatenate([none, *rows]),
    np.concatenate(owners),
    jnp.concatenate([jnp.zeros(0, bool), *counted]),
  )


def _norms(
  batches: batch_lib.Batches,
  values: list[list[jax.Array]],
  flags_2xR: jax.Array,
  sent: list[_Sent],
  tensors: int,
  clip: str,
) -> tuple[jax.Array, jax.Array, Stats]:
  """Returns norms of whole tensors [R, P], flags of any shard, statistics."""
  axes = batch_lib.axes(batches)
  peers = flags_2xR.shape[1]
  rows, owners_T, once_T = _all_rows(
    batches, values if clip == 'median' else [], peers, axes
  )
  most = (
    jnp.zeros((tensors, peers), jnp.float32)
    .at[owners_T]
    .max(exact.largest(rows))
  )
  most = jnp.concatenate([most, flags_2xR])
  if axes:
    most = jax.lax.pmax(most, axes)
  largest_PxR, flags_2xR = most[:-2], most[-2:]
  squares = exact.row_squares(rows, largest_PxR[owners_T])
  if axes:
    squares = jnp.where(once_T[:, None], squares, jnp.zeros_like(squares))
  limbs = exact.tensor_squares(squares, owners_T, tensors)
  sums_4, counts = _sums(batches, sent, axes)
  if axes:
    # Floats travel with the integers, each shard's in a place of its own.
    bits = jax.lax.bitcast_convert_type(sums_4, jnp.uint32)
    own = jax.nn.one_hot(
      jax.lax.axis_index(axes), jax.lax.axis_size(axes), dtype=jnp.uint32
    )
    several = limbs, counts.astype(jnp.uint32), own[:, None] * bits[None]
    ends = np.cumsum([x.size for x in several])
    flat = jnp.concatenate([x.reshape(-1) for x in several])
    flat = jnp.split(jax.lax.psum(flat, axes), ends[:-1])
    limbs, counts = flat[0].reshape(limbs.shape), flat[1]
    bits_Sx4 = flat[2].reshape(-1, 4)
    sums_4 = jnp.sum(
      jax.lax.bitcast_convert_type(bits_Sx4, jnp.float32), axis=0
    )
  norms_RxP = jnp.zeros((peers, tensors), jnp.float32)
  if clip == 'median':
    norms_RxP = exact.norms_of_squares(limbs, largest_PxR).T
  return norms_RxP, flags_2xR, _stats(sums_4, counts.astype(jnp.int32))


def _once(x: Any, own: tuple[str, ...], axes: tuple[str, ...]) -> Any:
  """Returns `x`, or zeros on all but one of the devices that repeat it."""
  first = jnp.array(True)
  for axis in set(axes) - set(own):
    first &= jax.lax.axis_index(axis) == 0
  return jnp.where(first, x, jnp.zeros_like(x)) if axes else x


def _sums(
  batches: batch_lib.Batches, sent: list[_Sent], axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
  codes = max((s.counts.shape[1] for s in sent), default=0)
  sums_4 = jnp.zeros(4, jnp.float32)
  counts = jnp.zeros(codes, jnp.int32)
  for b, s in zip(batches, sent, strict=True):
    sums_4 += _once(jnp.sum(s.sums, axis=0), b.axes, axes)
    own = jnp.sum(s.counts, axis=0, dtype=jnp.int32)
    counts += _once(jnp.pad(own, (0, codes - own.size)), b.axes, axes)
  return sums_4, counts


def _stats(sums_4: jax.Array, counts: jax.Array) -> Stats:
  tiny = jnp.finfo(jnp.float32).tiny
  norm = jnp.sqrt(sums_4[0])
  whole = jnp.maximum(jnp.sqrt(sums_4[1]), tiny)
  along = sums_4[3] / jnp.maximum(jnp.sqrt(sums_4[2]), tiny)
  return Stats(
    relative_error=norm / whole,
    energy_kept=jnp.square(along / whole),
    error_norm=norm,
    code_counts=counts if counts.size else None,
  )
