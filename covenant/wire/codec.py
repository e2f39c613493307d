"""Bit packing: k sorted indices and their codes, in a fixed number of bits.

The k indices of a block of L elements travel as Elias-Fano: with
l = floor(log2(L / k)), the l low bits of each, then a bitmap of
k + ceil(L / 2**l) bits that has a one at position (index >> l) + rank. For
L = 4096 and k = 64 that is 512 bits, 8 an index, where 12-bit indices take
768 and the entropy bound is 471. The values' codes follow, `bits` each. Every
block takes the same number of bits, so one can be found and decoded alone,
and one set of indices has exactly one encoding.
"""

import numpy as np


class CodecError(ValueError):
  """Bytes that no encoder makes. The message says what was wrong."""


def low_bits(block_size: int, k: int) -> int:
  """l: how many low bits of an index are stored as they are."""
  return (block_size // k).bit_length() - 1


def index_bits(block_size: int, k: int) -> int:
  """Bits that the k indices of one block take.

  >>> index_bits(4096, 64), index_bits(4096, 64) / 64
  (512, 8.0)
  """
  low = low_bits(block_size, k)
  return k * low + k + -(-block_size // 2**low)


def section_bytes(num_blocks: int, block_size: int, k: int, bits: int) -> int:
  """Bytes of a packed region: all blocks, then zero bits up to a byte.

  >>> section_bytes(1, 4096, 64, 2)  # 640 bits
  80
  """
  return -(-num_blocks * (index_bits(block_size, k) + k * bits) // 8)


def pack(
  indices_NxK: np.ndarray, codes_NxK: np.ndarray, block_size: int, bits: int
) -> bytes:
  """Indices and codes of N blocks as bytes.

  Args:
    indices_NxK: integers, strictly increasing along K, in [0, block_size).
    codes_NxK: integers in [0, 2**bits).
    block_size: L.
    bits: of one code.

  Returns:
    `section_bytes(N, block_size, K, bits)` bytes.
  """
  n, k = indices_NxK.shape
  low = low_bits(block_size, k)
  indices_NxK = indices_NxK.astype(np.int64)
  width = index_bits(block_size, k) - k * low
  bitmap_NxW = np.zeros((n, width), np.uint8)
  rows_Nx1 = np.arange(n)[:, None]
  bitmap_NxW[rows_Nx1, (indices_NxK >> low) + np.arange(k)] = 1
  parts = (_to_bits(indices_NxK, low), bitmap_NxW, _to_bits(codes_NxK, bits))
  return np.packbits(np.concatenate(parts, axis=1), bitorder='little').tobytes()


def unpack(
  data: bytes | memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
  """What `pack` packed: int32 indices and uint8 codes, both [N, K].

  Raises:
    CodecError: if `data` is not what `pack` would have made of any message.
  """
  expected = section_bytes(num_blocks, block_size, k, bits)
  if len(data) != expected:
    raise CodecError(f'expected {expected} bytes, got {len(data)}')
  low = low_bits(block_size, k)
  block_bits = index_bits(block_size, k) + k * bits
  flat = np.unpackbits(np.frombuffer(data, np.uint8), bitorder='little')
  if flat[num_blocks * block_bits :].any():
    raise CodecError('the padding after the last block is not zero')
  bits_NxB = flat[: num_blocks * block_bits].reshape(num_blocks, block_bits)
  bitmap_NxW = bits_NxB[:, k * low : block_bits - k * bits]
  ones_N = np.count_nonzero(bitmap_NxW, axis=1)
  if (ones_N != k).any():
    bad = int(np.argmax(ones_N != k))
    raise CodecError(f'block {bad}: expected {k} indices, got {ones_N[bad]}')
  positions_NxK = np.nonzero(bitmap_NxW)[1].reshape(num_blocks, k)
  high_NxK = positions_NxK - np.arange(k)
  indices_NxK = (high_NxK << low) | _from_bits(bits_NxB[:, : k * low], k, low)
  if (np.diff(indices_NxK, axis=1) <= 0).any():
    raise CodecError('indices of a block are not strictly increasing')
  if num_blocks and indices_NxK[:, -1].max() >= block_size:
    raise CodecError(f'an index is not below {block_size}')
  codes_NxK = _from_bits(bits_NxB[:, block_bits - k * bits :], k, bits)
  return indices_NxK.astype(np.int32), codes_NxK.astype(np.uint8)


def _to_bits(x_NxK: np.ndarray, bits: int) -> np.ndarray:
  """uint8 [N, K * bits]: each integer's lowest bits, low bit first."""
  bits_NxKxB = (x_NxK[..., None] >> np.arange(bits)) & 1
  n, k = x_NxK.shape
  return bits_NxKxB.reshape(n, k * bits).astype(np.uint8)


def _from_bits(bits_NxB: np.ndarray, k: int, bits: int) -> np.ndarray:
  bits_NxKxB = bits_NxB.reshape(bits_NxB.shape[0], k, bits).astype(np.int64)
  return (bits_NxKxB << np.arange(bits)).sum(axis=-1)
