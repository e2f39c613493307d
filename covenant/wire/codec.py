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

import collections
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import TypeVar

import numpy as np

from covenant import errors
from covenant.optim import blocks

# Bits that a thread packs or unpacks at one time; each takes up to a byte. The
# memory needed is about six times as much, below 2 MiB, and fits a cache.
_TRANSIENT_BITS = 1 << 18
_WORTH_THREADS = 4  # runs from which on several threads are worth their start

_T = TypeVar('_T')


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
  bitmap_bits = block_bits - k * (low + bits)
  packed = np.frombuffer(data, np.uint8)
  indices_NxK = np.empty((num_blocks, k), blocks.index_dtype(block_size))
  codes_NxK = np.empty((num_blocks, k), np.uint8)
  # Where each part of a block is whole bytes, no bit needs a byte of its own.
  in_bytes = low <= 8 and 8 % max(bits, 1) == 0
  in_bytes &= not any(x % 8 for x in (k * low, bitmap_bits, k * bits))
  act = _unpack_bytes if in_bytes else _unpack_bits

  def unpack_run(run: tuple[int, int]) -> None:
    start, stop = run
    bytes_ = slice(start * block_bits // 8, -(-stop * block_bits // 8))
    indices_NxK[start:stop], codes_NxK[start:stop] = act(
      packed[bytes_], start, stop - start, block_size, k, bits
    )
    check_indices(indices_NxK[start:stop], block_size)

  in_parallel(unpack_run, list(runs(num_blocks, block_bits)))
  return indices_NxK, codes_NxK


def _unpack_bits(
  packed: np.ndarray, first: int, n: int, block_size: int, k: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices and codes of n blocks, of any layout.

  Args:
    packed: their bytes.
    first: the number of the first block, for errors.
    n: their number.
    block_size: L.
    k: indices of a block.
    bits: of one code.
  """
  low = low_bits(block_size, k)
  block_bits = index_bits(block_size, k) + k * bits
  flat = np.unpackbits(packed, bitorder='little')
  if flat[n * block_bits :].any():
    raise CodecError('the padding after the last block is not zero')
  bits_NxB = flat[: n * block_bits].reshape(n, block_bits)
  # Contiguous booleans, of which NumPy finds the ones much faster.
  bitmap_NxW = bits_NxB[:, k * low : block_bits - k * bits].astype(bool)
  ones_NxK = _ones(bitmap_NxW, first, k)
  start_Nx1 = bitmap_NxW.shape[1] * np.arange(n)[:, None]
  high_NxK = ones_NxK - start_Nx1 - np.arange(k)
  indices_NxK = high_NxK << low | from_bits(bits_NxB[:, : k * low], k, low)
  check_indices(indices_NxK, block_size)  # before they are made smaller
  return indices_NxK, from_bits(bits_NxB[:, block_bits - k * bits :], k, bits)


def _unpack_bytes(
  packed: np.ndarray, first: int, n: int, block_size: int, k: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what `_unpack_bits` does, where all parts are whole bytes."""
  low = low_bits(block_size, k)
  low_end, codes_end = k * low // 8, k * bits // 8
  bytes_NxB = packed.reshape(n, -1)
  bitmap_end = bytes_NxB.shape[1] - codes_end
  bitmap = np.ascontiguousarray(bytes_NxB[:, low_end:bitmap_end])
  bitmap_NxW = np.unpackbits(bitmap, axis=1, bitorder='little').view(bool)
  # Sums of 16 bits wrap, but the high part of an index is far below 2**16.
  dtype = np.uint16 if block_size <= 2**16 else np.int64
  high_NxK = _ones(bitmap_NxW, first, k).astype(dtype)
  high_NxK -= (bitmap_NxW.shape[1] * np.arange(n)[:, None]).astype(dtype)
  high_NxK -= np.arange(k, dtype=dtype)
  if block_size <= 2**16 and int(high_NxK.max(initial=0)) << low >= 2**16:
    raise CodecError(f'an index is not below {block_size}')
  high_NxK <<= dtype(low)
  high_NxK |= _whole_low(bytes_NxB[:, :low_end], k, low)
  return high_NxK, _whole_codes(bytes_NxB[:, bitmap_end:], k, bits)


def _ones(bitmap_NxW: np.ndarray, first: int, k: int) -> np.ndarray:
  """Returns where the k ones of each row are, counted from the first row."""
  n, width = bitmap_NxW.shape
  ones = np.flatnonzero(bitmap_NxW)
  if len(ones) == n * k:
    ones_NxK = ones.reshape(n, k)
    start_N = width * np.arange(n)
    if (ones_NxK[:, 0] >= start_N).all() and (
      ones_NxK[:, -1] < start_N + width
    ).all():
      return ones_NxK
  found_N = np.count_nonzero(bitmap_NxW, axis=1)
  bad = int(np.argmax(found_N != k))
  raise CodecError(
    f'block {first + bad}: expected {k} indices, got {found_N[bad]}'
  )


def _whole_low(bytes_NxB: np.ndarray, k: int, low: int) -> np.ndarray:
  """Returns k integers of `low` <= 8 bits per row of bytes: uint8 [N, k]."""
  out_NxK = np.zeros((len(bytes_NxB), k), np.uint8)
  if not low:
    return out_NxK
  period = 8 // math.gcd(8, low)  # integers after which a byte begins
  columns = np.ascontiguousarray(
    bytes_NxB.reshape(-1, low * period // 8).T
  )  # one row per byte of a period
  out = out_NxK.reshape(-1, period)
  for j in range(period):
    byte, shift = divmod(j * low, 8)
    x = columns[byte] >> np.uint8(shift)
    if shift + low > 8:
      x |= columns[byte + 1] << np.uint8(8 - shift)
    out[:, j] = x & np.uint8(2**low - 1)
  return out_NxK


def _whole_codes(bytes_NxB: np.ndarray, k: int, bits: int) -> np.ndarray:
  """Returns k codes of 0, 1, 2, 4 or 8 bits per row of bytes: uint8 [N, k]."""
  if not bits:
    return np.zeros((len(bytes_NxB), k), np.uint8)
  return _code_table(bits)[bytes_NxB].view(np.uint8).reshape(-1, k)


@functools.cache
def _code_table(bits: int) -> np.ndarray:
  """Returns the codes in each byte, as the bytes of one integer per byte."""
  codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & 2**bits - 1
  return codes.astype(np.uint8).view(f'u{8 // bits}').reshape(-1)


def in_parallel(act: Callable[[_T], object], items: Sequence[_T]) -> None:
  """Calls `act` with each item, in the threads of all cores.

  NumPy works on arrays without the lock of the interpreter. The first error,
  in the order of the items, is raised.
  """
  if len(items) < _WORTH_THREADS:
    for item in items:
      act(item)
    return
  left = iter(items)
  waiting = collections.deque(
    _threads().submit(act, item)
    for item in itertools.islice(left, 2 * (os.cpu_count() or 1))
  )
  error: BaseException | None = None
  while waiting:
    found = waiting.popleft().exception()
    error = error or found
    if error is None and (more := next(left, None)) is not None:
      waiting.append(_threads().submit(act, more))
  if error is not None:
    raise error


@functools.cache
def _threads() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(
    os.cpu_count(), thread_name_prefix='covenant-codec'
  )


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
