"""The bits of a message on the wire between devices: uint32 words.

Of each block the ascending indices are Elias-Fano coded, as in
`covenant/wire/codec.py`: the low bits of each index as they are, its high bits
as the position of a one in a bitmap. With codes of `bits` each, k = 64 values
of a block of 4,096 take 64 * (8 + bits) bits. Scales are stored as they are.
Parts of compressors without packets are stored as the bits of their arrays.

All sizes are static, so that packing is a program of the device and a message
crosses a mesh axis as one array.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from covenant import typing as ct
from covenant.optim import batch
from covenant.optim import block_groups
from covenant.optim import compression as compression_lib
from covenant.optim import topk

_WORD = 32
Group = block_groups.Group


def pack(
  part: ct.Message,
  compression: compression_lib.Compression,
  shape: tuple[int, ...],
) -> jax.Array:
  """Returns the words of a leaf's part of a message: uint32 [W].

  Args:
    part: made by `compression.compress`.
    compression: the compressor.
    shape: that of the leaf.
  """
  packets = _packets(compression, shape)
  if packets is None:
    return _join([_words(x) for x in jax.tree.leaves(part)])
  of_packets, bits = packets
  words = []
  for packet, groups in zip(part, of_packets, strict=True):
    words.append(_packet_bits(packet, groups, bits))
    if bits > 8:
      words += [_words(packet.codes[rows, :k]) for rows, k in _kept(groups)]
    words.append(_words(packet.scales))
  return _join(words)


def unpack(
  words: jax.Array,
  compression: compression_lib.Compression,
  shape: tuple[int, ...],
) -> ct.Message:
  """Returns the part of the message that `pack` made words of."""
  like: Any = jax.eval_shape(
    compression.compress, jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  take = _Reader(words)
  packets = _packets(compression, shape)
  if packets is None:
    return jax.tree.map(take.array, like)
  of_packets, bits = packets
  return tuple(
    _read(take, x, groups, bits)
    for x, groups in zip(like, of_packets, strict=True)
  )


def unpack_batches(
  batches: Sequence[batch.Batch], words_RxW: Sequence[jax.Array]
) -> list[ct.Message]:
  """Returns every peer's part of each batch, [G, R, ...], from its words."""
  messages = []
  for b, words in zip(batches, words_RxW, strict=True):
    words_GxRxW = jnp.swapaxes(
      words.reshape(len(words), b.elements, words.shape[1] // b.elements), 0, 1
    )
    one = lambda w, b=b: unpack(w, b.compression, b.shape)  # noqa: E731
    messages.append(batch.each(jax.vmap(one), (words_GxRxW,)))
  return messages


def _packets(
  compression: compression_lib.Compression, shape: tuple[int, ...]
) -> tuple[list[tuple[Group, ...]], int] | None:
  """Returns the groups of blocks in each packet, and the bits of a code.

  Parts of other compressors have no packets: None.
  """
  if isinstance(compression, block_groups.BlockGroups):
    return [compression.groups], compression.quantizer.bits
  if not isinstance(compression, compression_lib.TopK):
    return None
  return [
    (Group(r.num_blocks, r.block_size, compression.block_k(r.block_size)),)
    for r in compression.regions(shape)
  ], compression.quantizer.bits


def _kept(groups: Sequence[Group]) -> list[tuple[slice, int]]:
  """Returns the rows of each group, and how many values these keep."""
  found, at = [], 0
  for g in groups:
    found.append((slice(at, at + g.count), g.k))
    at += g.count
  return found


def _packet_bits(
  packet: compression_lib.Packet, groups: Sequence[Group], bits: int
) -> jax.Array:
  """Returns the words of the indices, and of codes of up to 8 bits."""
  n, most = packet.indices.shape
  widths = [_widths(g) for g in groups]
  indices_NxK = packet.indices.astype(jnp.uint32)
  lows_NxKxB = _bits_of(indices_NxK, max(low for low, _ in widths))
  lows_Nx1 = block_groups.per_row(groups, [low for low, _ in widths])
  rank_1xK = jnp.arange(most, dtype=jnp.uint32)[None]
  ones_NxK = (indices_NxK >> lows_Nx1.astype(jnp.uint32)) + rank_1xK
  unary = max(unary for _, unary in widths)
  if len(groups) > 1:
    ones_NxK = jnp.where(block_groups.is_kept(groups, most), ones_NxK, unary)
  bitmap_NxU = (
    jnp.zeros((n, unary), jnp.uint32)
    .at[jnp.arange(n)[:, None], ones_NxK]
    .set(1, mode='drop')
  )
  codes_NxKxB = None
  if bits <= 8:
    codes_NxKxB = _bits_of(packet.codes.astype(jnp.uint32), bits)
  found = []
  for (rows, k), (low, unary) in zip(_kept(groups), widths, strict=True):
    columns = [lows_NxKxB[rows, :k, :low], bitmap_NxU[rows, :unary]]
    if codes_NxKxB is not None:
      columns.append(codes_NxKxB[rows, :k])
    height = rows.stop - rows.start
    columns = [x.reshape(height, math.prod(x.shape[1:])) for x in columns]
    flat = jnp.concatenate(columns, axis=1).reshape(-1)
    found.append(jnp.pad(flat, (0, -flat.size % _WORD)))
  return _numbers(jnp.concatenate(found).reshape(-1, _WORD))


def _read(
  take: '_Reader',
  like: compression_lib.Packet,
  groups: Sequence[Group],
  bits: int,
) -> compression_lib.Packet:
  """Returns the packet that `pack` wrote."""
  n, most = like.indices.shape
  width = bits if bits <= 8 else 0
  widths = [_widths(g) for g in groups]
  sizes = [
    g.count * (g.k * (low + width) + unary)
    for g, (low, unary) in zip(groups, widths, strict=True)
  ]
  most_low = max(low for low, _ in widths)
  most_unary = max(unary for _, unary in widths)
  flat = take.bits(sum(-(-size // _WORD) for size in sizes))
  lows, bitmaps, codes, at = [], [], [], 0
  for g, (low, unary), size in zip(groups, widths, sizes, strict=True):
    coded = flat[at : at + size].reshape(g.count, size // max(g.count, 1))
    at += size + -size % _WORD
    ends = g.k * low, g.k * low + unary
    lows.append(_padded(coded[:, : ends[0]], g, low, most, most_low))
    bitmaps.append(
      jnp.pad(coded[:, ends[0] : ends[1]], ((0, 0), (0, most_unary - unary)))
    )
    codes.append(_padded(coded[:, ends[1] :], g, width, most, width))
  rank_NxK = jnp.broadcast_to(jnp.arange(most, dtype=jnp.int32), (n, most))
  bitmap = topk.bitmap(jnp.concatenate(bitmaps) == 1)
  position_NxK = batch.once(topk.nth_one, bitmap, rank_NxK)
  highs_NxK = (position_NxK - rank_NxK).astype(jnp.uint32)
  shifts_Nx1 = block_groups.per_row(groups, [low for low, _ in widths])
  indices = highs_NxK << shifts_Nx1.astype(jnp.uint32)
  indices = indices | _numbers(jnp.concatenate(lows))
  if len(groups) > 1:
    none = max(g.size for g in groups)
    indices = jnp.where(block_groups.is_kept(groups, most), indices, none)
  if width:
    found = _numbers(jnp.concatenate(codes)).astype(like.codes.dtype)
  else:
    found = jnp.concatenate(
      [
        jnp.pad(
          take.array(jax.ShapeDtypeStruct((g.count, g.k), like.codes.dtype)),
          ((0, 0), (0, most - g.k)),
        )
        for g in groups
      ]
    )
  return compression_lib.Packet(
    indices.astype(like.indices.dtype), found, take.array(like.scales)
  )


def _padded(
  bits: jax.Array, group: Group, width: int, most: int, most_width: int
) -> jax.Array:
  """Returns the bits of a group's numbers, as of K wider ones: [N, K, B]."""
  numbers = bits.reshape(group.count, group.k, width)
  pads = (0, 0), (0, most - group.k), (0, most_width - width)
  return jnp.pad(numbers, pads)


class _Reader:
  """Takes arrays from the front of words, in the order of `pack`."""

  def __init__(self, words: jax.Array):
    self._words = words
    self._at = 0

  def take(self, count: int) -> jax.Array:
    self._at += count
    return self._words[self._at - count : self._at]

  def bits(self, words: int) -> jax.Array:
    """Returns the bits of words: uint32 [32 * words], zeros and ones."""
    return _bits_of(self.take(words), _WORD).reshape(-1)

  def array(self, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array of the shape and type of `like`."""
    size, each = math.prod(like.shape), jnp.dtype(like.dtype).itemsize
    words = self.take(-(-size * each // 4))
    if each == 4:
      values = jax.lax.bitcast_convert_type(words, like.dtype)
    else:
      small = {1: jnp.uint8, 2: jnp.uint16}[each]
      units = jax.lax.bitcast_convert_type(words, small)
      values = jax.lax.bitcast_convert_type(units, like.dtype)
    return values.reshape(-1)[:size].reshape(like.shape)


def _widths(group: Group) -> tuple[int, int]:
  """Returns the low bits of an index and the bits of a block's bitmap."""
  low = (group.size // group.k).bit_length() - 1
  return low, group.k + -(-group.size // 2**low)


def _numbers(bits: jax.Array) -> jax.Array:
  """Returns the numbers of bits along the last axis, the lowest bit first."""
  return jnp.sum(bits << _shifts(bits), axis=-1, dtype=jnp.uint32)


def _bits_of(numbers: jax.Array, count: int) -> jax.Array:
  """Returns the lowest bits of numbers along a new last axis."""
  repeated = jnp.broadcast_to(numbers[..., None], (*numbers.shape, count))
  return (repeated >> _shifts(repeated)) & 1


def _shifts(bits: jax.Array) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)


def _words(x: jax.Array) -> jax.Array:
  """Returns the bits of an array, padded to whole words."""
  each = jnp.dtype(x.dtype).itemsize
  if each > 4:
    raise TypeError(f'a message has arrays of at most 32 bits, got {x.dtype}')
  unit = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[each]
  units = jax.lax.bitcast_convert_type(x, unit).reshape(-1)
  if each == 4:
    return units
  padded = jnp.pad(units, (0, -units.size % (4 // each)))
  return jax.lax.bitcast_convert_type(
    padded.reshape(-1, 4 // each), jnp.uint32
  ).reshape(-1)


def _join(words: list[jax.Array]) -> jax.Array:
  return jnp.concatenate([jnp.zeros(0, jnp.uint32), *words])
