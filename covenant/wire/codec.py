"""Bit packing: k sorted indices and their codes, in a fixed number of bits.

The k indices of a block of L elements travel as Elias-Fano: with
l = floor(log2(L / k)), the l low bits of each, then a bitmap of
k + ceil(L / 2**l) bits that has a one at position (index >> l) + rank. For
L = 4096 and k = 64 that is 512 bits, 8 an index, where 12-bit indices take
768 and the entropy bound is 471. The values' codes follow, `bits` each. Every
block takes the same number of bits, so one can be found and decoded alone,
and one set of indices has exactly one encoding.

`rice.py` has the same functions for sections of variable length; only there do
`least_bytes` and `length` differ from `section_bytes`.
"""

from collections.abc import Iterator

import numpy as np

from covenant import errors
from covenant.optim import blocks

# Bits that are packed or unpacked at one time; each takes a byte meanwhile. The
# memory needed is about six times as much, below 2 MiB, and fits a cache.
_TRANSIENT_BITS = 1 << 18


class CodecError(errors.CovenantError, ValueError):
  """Bytes that no encoder makes; the message names the fault."""


def low_bits(block_size: int, k: int) -> int:
  """Returns l, the number of low bits of an index that are stored plainly."""
  return (block_size // k).bit_length() - 1


def index_bits(block_size: int, k: int) -> int:
  """Returns the bits that the k indices of one block take.

  >>> index_bits(4096, 64), index_bits(4096, 64) / 64
  (512, 8.0)
  """
  low = low_bits(block_size, k)
  return k * low + k + -(-block_size // 2**low)


def section_bytes(num_blocks: int, block_size: int, k: int, bits: int) -> int:
  """Returns the bytes of a packed region: all blocks, then padding to a byte.

  >>> section_bytes(1, 4096, 64, 2)  # 640 bits
  80
  """
  return -(-num_blocks * (index_bits(block_size, k) + k * bits) // 8)


def least_bytes(num_blocks: int, block_size: int, k: int, bits: int) -> int:
  """Returns the fewest bytes of a packed region: here `section_bytes`."""
  return section_bytes(num_blocks, block_size, k, bits)


def length(
  data: bytes | memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> int:
  """Returns the bytes of the first section of `data`: here `section_bytes`."""
  del data
  return section_bytes(num_blocks, block_size, k, bits)


def pack(
  indices_NxK: np.ndarray, codes_NxK: np.ndarray, block_size: int, bits: int
) -> bytes:
  """Packs the indices and codes of N blocks into bytes.

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
  block_bits = index_bits(block_size, k) + k * bits
  chunks = []
  for start, stop in runs(n, block_bits):
    indices = indices_NxK[start:stop].astype(np.int64)
    bits_NxB = np.zeros((stop - start, block_bits), np.uint8)
    bits_NxB[:, : k * low] = to_bits(indices, low)
    ones_NxK = k * low + (indices >> low) + np.arange(k)
    np.put_along_axis(bits_NxB, ones_NxK, 1, axis=1)
    bits_NxB[:, block_bits - k * bits :] = to_bits(codes_NxK[start:stop], bits)
    chunks.append(np.packbits(bits_NxB, bitorder='little').tobytes())
  return b''.join(chunks)


def unpack(
  data: bytes | memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
  """Unpacks the indices (`blocks.index_dtype`) and uint8 codes of `pack`.

  Raises:
    CodecError: `data` is no result of `pack`.
  """
  expected = section_bytes(num_blocks, block_size, k, bits)
  if len(data) != expected:
    raise CodecError(f'expected {expected} bytes, got {len(data)}')
  low = low_bits(block_size, k)
  block_bits = index_bits(block_size, k) + k * bits
  packed = np.frombuffer(data, np.uint8)
  indices_NxK = np.empty((num_blocks, k), blocks.index_dtype(block_size))
  codes_NxK = np.empty((num_blocks, k), np.uint8)
  for start, stop in runs(num_blocks, block_bits):
    n = stop - start
    bytes_ = slice(start * block_bits // 8, -(-stop * block_bits // 8))
    flat = np.unpackbits(packed[bytes_], bitorder='little')
    if flat[n * block_bits :].any():
      raise CodecError('the padding after the last block is not zero')
    bits_NxB = flat[: n * block_bits].reshape(n, block_bits)
    # Contiguous booleans, of which NumPy finds the ones much faster.
    bitmap_NxW = bits_NxB[:, k * low : block_bits - k * bits].astype(bool)
    ones_N = np.count_nonzero(bitmap_NxW, axis=1)
    if (ones_N != k).any():
      bad = int(np.argmax(ones_N != k))
      raise CodecError(
        f'block {start + bad}: expected {k} indices, got {ones_N[bad]}'
      )
    start_Nx1 = bitmap_NxW.shape[1] * np.arange(n)[:, None]
    high = np.flatnonzero(bitmap_NxW).reshape(n, k) - start_Nx1 - np.arange(k)
    indices = high << low | from_bits(bits_NxB[:, : k * low], k, low)
    check_indices(indices, block_size)
    indices_NxK[start:stop] = indices
    codes_NxK[start:stop] = from_bits(
      bits_NxB[:, block_bits - k * bits :], k, bits
    )
  return indices_NxK, codes_NxK


def runs(
  num_blocks: int, block_bits: int, run_bits: int = _TRANSIENT_BITS
) -> Iterator[tuple[int, int]]:
  """Yields starts and stops of runs of blocks, few enough to unpack at once.

  Each but the last has a multiple of eight blocks, so it ends with a byte.

  >>> list(runs(1000, 640))
  [(0, 408), (408, 816), (816, 1000)]
  """
  step = max(8, run_bits // max(1, block_bits) // 8 * 8)
  for start in range(0, num_blocks, step):
    yield start, min(start + step, num_blocks)


def check_indices(indices_NxK: np.ndarray, block_size: int) -> None:
  """Raises `CodecError` unless they increase and are below `block_size`."""
  if (indices_NxK[:, 1:] <= indices_NxK[:, :-1]).any():
    raise CodecError('indices of a block are not strictly increasing')
  if indices_NxK[:, -1].max() >= block_size:
    raise CodecError(f'an index is not below {block_size}')


def to_bits(x_NxK: np.ndarray, bits: int) -> np.ndarray:
  """Returns each integer's lowest bits, low bit first: uint8 [N, K * bits]."""
  n, k = x_NxK.shape
  bits_NxKxB = np.empty((n, k, bits), np.uint8)
  for bit in range(bits):
    bits_NxKxB[..., bit] = (x_NxK >> bit) & 1
  return bits_NxKxB.reshape(n, k * bits)


def from_bits(bits_NxB: np.ndarray, k: int, bits: int) -> np.ndarray:
  """Returns the integers of `to_bits`: int32 [N, K]."""
  bits_NxKxB = bits_NxB.reshape(bits_NxB.shape[0], k, bits)
  x_NxK = np.zeros((bits_NxB.shape[0], k), np.int32)
  for bit in range(bits):
    x_NxK |= bits_NxKxB[..., bit].astype(np.int32) << bit
  return x_NxK
