"""The exchange of a round's deltas among peers, inside one program.

Every peer compresses its delta, all messages cross the peers' axis as one array
of words (packing.py), and every peer reduces them to the same mean (reduce.py).
Leaves are compressed and reduced in few batches (batch.py), and peers are added
by a loop, so the program hardly grows with either. Where the leaves of a peer
are sharded, three more collectives make norms and statistics those of whole
tensors: the largest magnitudes, integer sums, and float sums.

A peer of weight 0, or with a delta that is not finite, takes no part: it is
nobody's sender, sets no limit to others, and gets the same mean.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import batch as batch_lib
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

  delta: ct.Delta  # the mean, float32, the same on all peers
  error: ct.PyTree  # new error feedback; None without
  stats: Stats


class _Sent(NamedTuple):
  """One peer's part of one batch of G elements."""

  words: jax.Array  # uint32 [G, W]
  error: Any  # float32 [G, ...], or None
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
  """
  leaves, treedef = jax.tree.flatten(delta)
  batches = batch_lib.Batches(leaves, compressions, shards)
  deltas = batches.split(leaves)
  errors: list[Any] = [None] * len(deltas)
  if error is not None:
    errors = batches.split(jax.tree.leaves(error))
  sent = [
    _compress(b, x, e, rules.error_decay)
    for b, x, e in zip(batches, deltas, errors, strict=True)
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
  means = _reduce(batches, messages, values, factors_RxP, parts_R, rules)
  delta = treedef.unflatten(batches.merge(means))
  if error is None:
    return Exchanged(delta, None, stats)
  # A peer without part keeps its error feedback; a lost round empties it.
  own = finite_R[collectives.index(rules.axis_name)]
  kept = [jnp.where(parts > 0, s.error, e)
          for s, e in zip(sent, errors, strict=True)]  # fmt: skip
  kept = [jnp.where(own, e, jnp.zeros_like(e)) for e in kept]
  return Exchanged(delta, treedef.unflatten(batches.merge(kept)), stats)


def _compress(
  batch: Batch, delta: jax.Array, error: jax.Array | None, decay: Any
) -> _Sent:
  compression = batch.compression

  def element(delta: jax.Array, error: Any = None) -> _Sent:
    given = compressor.offered(delta, error, decay)
    finite = jnp.all(jnp.isfinite(given))
    part = compression.compress(jnp.where(jnp.isfinite(given), given, 0))
    sent = compression.decompress(part, batch.shape)
    rest = compressor.residual(given, sent)
    products = (rest * rest, given * given, sent * sent, given * sent)
    return _Sent(
      packing.pack(part, compression, batch.shape),
      None if error is None else rest,
      finite,
      jnp.where(finite, jnp.stack([jnp.sum(x) for x in products]), 0),
      compression.code_counts(part),
    )

  return each(element, (delta,) if error is None else (delta, error))


def _gather(
  batches: batch_lib.Batches,
  sent: list[_Sent],
  parts: jax.Array,
  lost: ct.Scalar,
  axis_name: ct.AxisName,
) -> tuple[jax.Array, list[ct.Message]]:
  """Returns what all peers sent, by one all-gather.

  Where leaves are sharded along different axes it takes one for each set of
  axes: values that are the same on all shards must stay typed so.

  Returns:
    float32 [2, R], each peer's weight and whether its round is lost, as far as
    this shard knows; and its part of every batch, [G, R, ...].
  """
  messages: list[Any] = [None] * len(sent)
  flags = []
  for axes in sorted({b.axes for b in batches}) or [()]:
    chosen = [i for i, b in enumerate(batches) if b.axes == axes]
    bad = [jnp.asarray(lost)[None], *(~sent[i].finite for i in chosen)]
    header = jnp.stack([parts, jnp.any(jnp.concatenate(bad)).astype(jnp.int32)])
    words = [sent[i].words.reshape(-1) for i in chosen]
    words_RxW = collectives.gather_words(
      jnp.concatenate([header.astype(jnp.uint32), *words]), axis_name
    )
    flags.append(words_RxW[:, :2].T.astype(jnp.float32))
    own = [b for b in batches if b.axes == axes]
    for i, message in zip(chosen, _unpack(own, words_RxW[:, 2:]), strict=True):
      messages[i] = message
  return functools.reduce(jnp.maximum, flags), messages


def _unpack(batches: list[Batch], words_RxW: jax.Array) -> list[ct.Message]:
  """Returns every peer's part of some batches: [G, R, ...]."""
  messages, at = [], 0
  for b in batches:
    like: Any = jax.eval_shape(
      lambda x, b=b: packing.pack(
        b.compression.compress(x), b.compression, b.shape
      ),
      jax.ShapeDtypeStruct(b.shape, jnp.float32),
    )
    size = b.elements * like.size
    words_GxRxW = (
      words_RxW[:, at : at + size]
      .reshape(len(words_RxW), b.elements, like.size)
      .transpose(1, 0, 2)
    )
    at += size
    one = lambda w, b=b: packing.unpack(w, b.compression, b.shape)  # noqa: E731
    messages.append(each(jax.vmap(one), (words_GxRxW,)))
  return messages


def _rows(batch: Batch, values: list[jax.Array]) -> tuple[Any, np.ndarray]:
  """Returns values as rows of one tensor each, [T, R, W], and the tensors."""
  owners_T = batch.owners
  if batch.of_blocks:
    rows_TxRxV = values[0][0].transpose(1, 0, 2)
  else:
    g, r = values[0].shape[:2] if values else (batch.elements, 1)
    rows_TxRxV = jnp.concatenate([x.reshape(g, r, -1) for x in values], axis=2)
  t, r, size = rows_TxRxV.shape
  width = min(size, exact.ROW) or 1
  padded = jnp.pad(rows_TxRxV, ((0, 0), (0, 0), (0, -size % width)))
  rows = padded.reshape(t, r, -1, width).transpose(0, 2, 1, 3)
  return rows.reshape(-1, r, width), np.repeat(owners_T, rows.shape[1])


def _norms(
  batches: batch_lib.Batches,
  values: list[list[jax.Array]],
  flags_2xR: jax.Array,
  sent: list[_Sent],
  tensors: int,
  clip: str,
) -> tuple[jax.Array, jax.Array, Stats]:
  """Returns norms of whole tensors [R, P], flags of any shard, statistics."""
  axes = tuple(sorted({a for b in batches for a in b.axes}))
  rows, owners = [], [np.zeros(0, np.int32)]
  if clip == 'median':
    for b, v in zip(batches, values, strict=True):
      row, owner = _rows(b, v)
      rows.append(row)
      owners.append(owner)
  owners_T = np.concatenate(owners)
  peers = flags_2xR.shape[1]
  tops_TxR = jnp.concatenate(
    [jnp.zeros((0, peers), jnp.float32), *map(exact.largest, rows)]
  )
  most = jnp.zeros((tensors, peers), jnp.float32).at[owners_T].max(tops_TxR)
  most = jnp.concatenate([most, flags_2xR])
  if axes:
    most = jax.lax.pmax(most, axes)
  largest_PxR, flags_2xR = most[:-2], most[-2:]
  squares = [jnp.zeros((3, 0, peers), jnp.uint32)]
  for b, row, owner in zip(batches, rows, owners[1:], strict=False):
    parts = exact.row_squares(row, largest_PxR[owner])
    squares.append(_once(parts, b.axes, axes))
  limbs = exact.tensor_squares(
    jnp.concatenate(squares, axis=1), owners_T, tensors
  )
  sums_4, counts = _sums(batches, sent, axes)
  if axes:
    sums_4 = jax.lax.psum(sums_4, axes)
    flat = jnp.concatenate([limbs.reshape(-1), counts.astype(jnp.uint32)])
    flat = jax.lax.psum(flat, axes)
    counts = flat[limbs.size :]
    limbs = flat[: limbs.size].reshape(limbs.shape)
  norms_RxP = jnp.zeros((peers, tensors), jnp.float32)
  if rows:
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


def _reduce(
  batches: batch_lib.Batches,
  messages: list[ct.Message],
  values: list[list[jax.Array]],
  factors_RxP: jax.Array,
  parts_R: jax.Array,
  rules: Rules,
) -> list[jax.Array]:
  """Returns the mean deltas of all batches: float32 [G, ...]."""
  if len(parts_R) > weight_lib.MOST_PEERS:
    raise ValueError(
      f'axis_name: expected at most {weight_lib.MOST_PEERS} peers, whose '
      f'senders can be counted, got {len(parts_R)}'
    )
  totals = weight_lib.totals(parts_R, len(parts_R) * weight_lib.WHOLE + 1)
  means = []
  for b, message, value in zip(batches, messages, values, strict=True):
    factors_GxR = factors_RxP[:, b.owners].T
    if b.of_blocks:
      factors_GxR = factors_GxR.T[None, :, :, None]  # [1, R, N, 1]

    def element(*peers: Any, b: Batch = b) -> jax.Array:
      def add(sums: Any, peer: Any) -> tuple[Any, None]:
        part, value, factor, parts = peer
        sums = reduce.add_values(
          sums, part, value, factor, b.compression, parts
        )
        return sums, None

      start = collectives.typed_like(b.compression.start(b.shape), peers)
      sums, _ = jax.lax.scan(add, start, (*peers, parts_R))
      return reduce.finish(
        sums, totals, b.shape, b.compression, rules.mean_over
      )

    means.append(each(element, (message, value, factors_GxR)))
  return means
