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
from typing import Any

import jax
import jax.numpy as jnp

from covenant import typing as ct
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
  abstract: Any = jax.eval_shape(
    compression.compress, jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  take = _Reader(words)
  if not isinstance(compression, compression_lib.TopK):
    return jax.tree.map(take.array, abstract)
  packets = []
  for like, region in zip(abstract, compression.regions(shape), strict=True):
    bits, size = compression.quantizer.bits, region.block_size
    n, k = like.indices.shape
    low, unary = _widths(k, size)
    width = bits if bits <= 8 else 0
    coded = take.bits(n, k * low + unary + k * width)
    indices = _indices(coded[:, : k * low + unary], k, size)
    if width:
      codes = _numbers(coded[:, k * low + unary :].reshape(n, k, width))
      codes = codes.astype(like.codes.dtype)
    else:
      codes = take.array(like.codes)
    packets.append(
      compression_lib.Packet(
        indices.astype(like.indices.dtype), codes, take.array(like.scales)
      )
    )
  return tuple(packets)


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


def _indices(bits_NxB: jax.Array, k: int, size: int) -> jax.Array:
  """Returns the indices that `_index_bits` coded: uint32 [N, k]."""
  n = bits_NxB.shape[0]
  low, _ = _widths(k, size)
  rank_NxK = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (n, k))
  bitmap = topk.bitmap(bits_NxB[:, k * low :] == 1)
  highs = (topk.nth_one(bitmap, rank_NxK) - rank_NxK).astype(jnp.uint32)
  if not low:
    return highs
  return (highs << low) | _numbers(bits_NxB[:, : k * low].reshape(n, k, low))


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
