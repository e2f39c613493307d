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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from covenant import typing as ct
from covenant.optim import batch
from covenant.optim import compression as compression_lib
from covenant.optim import topk

_WORD = 32


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
  if not isinstance(compression, compression_lib.TopK):
    return _join([_words(x) for x in jax.tree.leaves(part)])
  words = []
  for packet, region in zip(part, compression.regions(shape), strict=True):
    coded = [_index_bits(packet.indices, region.block_size)]
    bits = compression.quantizer.bits
    if bits <= 8:
      coded.append(_code_bits(packet.codes, bits))
    words.append(_words_of_bits(jnp.concatenate(coded, axis=1)))
    if bits > 8:
      words.append(_words(packet.codes))
    words.append(_words(packet.scales))
  return _join(words)


def unpack(
  words: jax.Array,
  compression: compression_lib.Compression,
  shape: tuple[int, ...],
) -> ct.Message:
  """Returns the part of the message that `pack` made words of."""
  return unpack_all([words], [compression], [shape])[0]


def unpack_all(
  words: Sequence[jax.Array],
  compressions: Sequence[compression_lib.Compression],
  shapes: Sequence[tuple[int, ...]],
) -> list[ct.Message]:
  """Returns the parts of several leaves.

  All indices are decoded together, so that a program has the decoder once.
  """
  parts: list[Any] = []
  packets: list[_Coded] = []
  for own, one, shape in zip(words, compressions, shapes, strict=True):
    like: Any = jax.eval_shape(
      one.compress, jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    take = _Reader(own)
    if not isinstance(one, compression_lib.TopK):
      parts.append(jax.tree.map(take.array, like))
      continue
    coded = [
      _read(take, x, region.block_size, one.quantizer.bits)
      for x, region in zip(like, one.regions(shape), strict=True)
    ]
    packets += coded
    parts.append(tuple(coded))
  decoded = iter(_decode(packets))
  return [
    tuple(next(decoded) for _ in part)
    if isinstance(one, compression_lib.TopK)
    else part
    for part, one in zip(parts, compressions, strict=True)
  ]


def unpack_batches(
  batches: list[batch.Batch], words_RxW: Sequence[jax.Array]
) -> list[ct.Message]:
  """Returns every peer's part of each batch, [G, R, ...], from its words."""
  messages: list[Any] = [None] * len(batches)
  cut: list[tuple[int, jax.Array]] = []
  for i, (b, words) in enumerate(zip(batches, words_RxW, strict=True)):
    words_GxRxW = jnp.swapaxes(
      words.reshape(len(words), b.elements, words.shape[1] // b.elements), 0, 1
    )
    if b.of_blocks:
      cut.append((i, words_GxRxW[0]))
      continue
    one = lambda w, b=b: unpack(w, b.compression, b.shape)  # noqa: E731
    messages[i] = batch.each(jax.vmap(one), (words_GxRxW,))
  chosen = [batches[i] for i, _ in cut]
  parts = jax.vmap(
    lambda *words: unpack_all(
      words, [b.compression for b in chosen], [b.shape for b in chosen]
    )
  )(*[w for _, w in cut]) if cut else []  # fmt: skip
  for (i, _), part in zip(cut, parts, strict=True):
    messages[i] = jax.tree.map(lambda x: x[None], part)
  return messages


class _Coded(NamedTuple):
  """A region's packet, of which the indices are not decoded yet."""

  lows: jax.Array | None  # uint32 [N, k], the low bits of the indices
  low: int  # how many these are
  bitmap: jax.Array  # uint32 [N, W], the high bits
  like: compression_lib.Packet
  codes: jax.Array
  scales: jax.Array


def _read(
  take: '_Reader', like: compression_lib.Packet, size: int, bits: int
) -> _Coded:
  n, k = like.indices.shape
  low, unary = _widths(k, size)
  width = bits if bits <= 8 else 0
  coded = take.bits(n, k * low + unary + k * width)
  if width:
    codes = _numbers(coded[:, k * low + unary :].reshape(n, k, width))
    codes = codes.astype(like.codes.dtype)
  else:
    codes = take.array(like.codes)
  lows = _numbers(coded[:, : k * low].reshape(n, k, low)) if low else None
  bitmap = topk.bitmap(coded[:, k * low : k * low + unary] == 1)
  return _Coded(lows, low, bitmap, like, codes, take.array(like.scales))


def _decode(packets: Sequence[_Coded]) -> list[compression_lib.Packet]:
  if not packets:
    return []
  most = max(p.like.indices.shape[1] for p in packets)
  words = max(p.bitmap.shape[1] for p in packets)
  bitmap = jnp.concatenate(
    [
      jnp.pad(p.bitmap, ((0, 0), (0, words - p.bitmap.shape[1])))
      for p in packets
    ]
  )
  rank_NxK = jnp.broadcast_to(
    jnp.arange(most, dtype=jnp.int32), (len(bitmap), most)
  )
  position_NxK = batch.once(topk.nth_one, bitmap, rank_NxK)
  highs_NxK = (position_NxK - rank_NxK).astype(jnp.uint32)
  found, at = [], 0
  for p in packets:
    n, k = p.like.indices.shape
    indices = highs_NxK[at : at + n, :k]
    if p.lows is not None:
      indices = (indices << p.low) | p.lows
    indices = indices.astype(p.like.indices.dtype)
    found.append(compression_lib.Packet(indices, p.codes, p.scales))
    at += n
  return found


class _Reader:
  """Takes arrays from the front of words, in the order of `pack`."""

  def __init__(self, words: jax.Array):
    self._words = words
    self._at = 0

  def take(self, count: int) -> jax.Array:
    self._at += count
    return self._words[self._at - count : self._at]

  def bits(self, rows: int, columns: int) -> jax.Array:
    """Returns uint32 [rows, columns], zeros and ones."""
    words = self.take(-(-rows * columns // _WORD))
    flat = _bits_of(words, _WORD).reshape(-1)
    return flat[: rows * columns].reshape(rows, columns)

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


def _widths(k: int, size: int) -> tuple[int, int]:
  """Returns the low bits of an index and the bits of a block's bitmap."""
  low = (size // k).bit_length() - 1
  return low, k + -(-size // 2**low)


def _index_bits(indices_NxK: jax.Array, size: int) -> jax.Array:
  """Returns the coded indices of blocks of `size`: uint32 [N, bits]."""
  n, k = indices_NxK.shape
  low, unary = _widths(k, size)
  indices_NxK = indices_NxK.astype(jnp.uint32)
  lows = _bits_of(indices_NxK, low).reshape(n, k * low)
  ones = (indices_NxK >> low) + jnp.arange(k, dtype=jnp.uint32)[None]
  rows = jnp.arange(n)[:, None]
  bitmap = jnp.zeros((n, unary), jnp.uint32).at[rows, ones].set(1, mode='drop')
  return jnp.concatenate([lows, bitmap], axis=1)


def _code_bits(codes_NxK: jax.Array, bits: int) -> jax.Array:
  coded = _bits_of(codes_NxK.astype(jnp.uint32), bits)
  return coded.reshape(codes_NxK.shape[0], -1)


def _numbers(bits: jax.Array) -> jax.Array:
  """Returns the numbers of bits along the last axis, the lowest bit first."""
  return jnp.sum(bits << _shifts(bits), axis=-1, dtype=jnp.uint32)


def _bits_of(numbers: jax.Array, count: int) -> jax.Array:
  """Returns the lowest bits of numbers along a new last axis."""
  repeated = jnp.broadcast_to(numbers[..., None], (*numbers.shape, count))
  return (repeated >> _shifts(repeated)) & 1


def _shifts(bits: jax.Array) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)


def _words_of_bits(bits: jax.Array) -> jax.Array:
  flat = bits.reshape(-1)
  padded = jnp.pad(flat, (0, -flat.size % _WORD))
  return _numbers(padded.reshape(-1, _WORD))


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
