"""Rice coding of the gaps between indices: fewer bits than Elias-Fano.

The gaps g of a top-k selection are nearly geometric. g >> l is mostly 0 to 3
and is sent as that many zeros and a one; the l low bits of g are sent plainly.
For L = 4096 and k = 64 that is 7.5 bits an index, where `codec.py` takes 8 and
uniform indices 7.36 at least. The length varies with the message: only its
bounds are known before. A section is frames of some hundred blocks:

  zeros u32 | a block: k x l low bits, codes | all g >> l in unary | zero bits

so that sizes are checked before anything is unpacked, and the memory that
unpacking takes besides its result is bounded. One message has one encoding.

The functions are those of `codec.py`.
"""

from collections.abc import Iterator

import numpy as np

from covenant.optim import blocks
from covenant.wire import codec

# Most bits of a frame, unless eight blocks take more. Part of the format.
_FRAME_BITS = 1 << 18
_PREFIX_BYTES = 4


def low_bits(block_size: int, k: int) -> int:
  """Returns l, the number of low bits of a gap that are stored plainly.

  The shortest code of geometric gaps: l + 1 saves one zero a gap or more if
  2**l * k / L is below ln 1.618 (the golden ratio).

  >>> low_bits(4096, 64), low_bits(4096, 32), low_bits(8, 8)
  (5, 6, 0)
  """
  return ((4812 * block_size - 1) // (10_000 * k)).bit_length()


def section_bytes(num_blocks: int, block_size: int, k: int, bits: int) -> int:
  """Returns the most bytes that a packed region takes.

  >>> section_bytes(1, 4096, 64, 2)  # 510 + 128 bits, and the prefix
  84
  """
  most = (block_size - k) >> low_bits(block_size, k)
  return _bytes(num_blocks, block_size, k, bits, zeros=most)


def least_bytes(num_blocks: int, block_size: int, k: int, bits: int) -> int:
  """Returns the fewest bytes that a packed region takes."""
  return _bytes(num_blocks, block_size, k, bits, zeros=0)


def length(
  data: bytes | memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> int:
  """Bytes of the section that `data` begins with, by its prefixes.

  Raises:
    CodecError: if a prefix is missing or more than any message needs.
  """
  size = 0
  for start, stop in _frames(num_blocks, block_size, k, bits):
    zeros = _zeros(data[size:], stop - start, block_size, k)
    size += _frame_bytes(stop - start, block_size, k, bits, zeros)
  return size


def pack(
  indices_NxK: np.ndarray, codes_NxK: np.ndarray, block_size: int, bits: int
) -> bytes:
  """Packs a region like `codec.pack`, in at most `section_bytes`."""
  k = indices_NxK.shape[1]
  low = low_bits(block_size, k)
  chunks = []
  for start, stop in _frames(len(indices_NxK), block_size, k, bits):
    indices = indices_NxK[start:stop].astype(np.int32)
    gaps = np.diff(indices, axis=1, prepend=np.int32(-1)) - 1
    ends = np.cumsum((gaps >> low) + 1, dtype=np.int64)
    unary = np.zeros(ends[-1], np.uint8)
    unary[ends - 1] = 1
    codes = codec.to_bits(codes_NxK[start:stop], bits)
    fixed = np.concatenate([codec.to_bits(gaps, low), codes], axis=1)
    flat = np.concatenate([fixed.reshape(-1), unary])
    zeros = len(unary) - gaps.size
    chunks.append(zeros.to_bytes(_PREFIX_BYTES, 'little'))
    chunks.append(np.packbits(flat, bitorder='little').tobytes())
  return b''.join(chunks)


def unpack(
  data: bytes | memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
  """Unpacks a region like `codec.unpack`, as strictly."""
  expected = length(data, num_blocks, block_size, k, bits)
  if len(data) != expected:
    raise codec.CodecError(f'expected {expected} bytes, got {len(data)}')
  low = low_bits(block_size, k)
  block_bits = k * (low + bits)
  indices_NxK = np.empty((num_blocks, k), blocks.index_dtype(block_size))
  codes_NxK = np.empty((num_blocks, k), np.uint8)

  def unpack_frame(frame: tuple[int, int, memoryview]) -> None:
    start, stop, data = frame
    n = stop - start
    zeros = _zeros(data, n, block_size, k)
    flat = np.unpackbits(
      np.frombuffer(data[_PREFIX_BYTES:], np.uint8), bitorder='little'
    )
    unary_end = n * (block_bits + k) + zeros
    if flat[unary_end:].any():
      raise codec.CodecError('the padding after a frame is not zero')
    ones = np.flatnonzero(flat[n * block_bits : unary_end].astype(bool))
    if len(ones) != n * k or ones[-1] != n * k + zeros - 1:
      raise codec.CodecError(
        f'expected {n * k} gaps in {zeros} zeros, got {len(ones)}'
      )
    fixed_NxB = flat[: n * block_bits].reshape(n, block_bits)
    # All gaps of a frame together are below n * block_size.
    dtype = np.int32 if n * block_size < 2**30 else np.int64
    gaps = np.empty(n * k, dtype)
    gaps[0] = ones[0]
    np.subtract(ones[1:], ones[:-1], out=gaps[1:], casting='unsafe')
    gaps[1:] -= 1
    del ones
    indices = gaps.reshape(n, k)
    indices <<= low
    indices |= codec.from_bits(fixed_NxB[:, : k * low], k, low)
    indices += 1
    np.cumsum(indices, axis=1, out=indices)
    indices -= 1
    codec.check_indices(indices, block_size)
    indices_NxK[start:stop] = indices
    codes_NxK[start:stop] = codec.from_bits(fixed_NxB[:, k * low :], k, bits)

  frames = list(
    _found_frames(memoryview(data), num_blocks, block_size, k, bits)
  )
  codec.in_parallel(unpack_frame, frames)
  return indices_NxK, codes_NxK


def _found_frames(
  data: memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> Iterator[tuple[int, int, memoryview]]:
  """Yields the first block of each frame, the one after its last, its bytes."""
  for start, stop in _frames(num_blocks, block_size, k, bits):
    zeros = _zeros(data, stop - start, block_size, k)
    size = _frame_bytes(stop - start, block_size, k, bits, zeros)
    yield start, stop, data[:size]
    data = data[size:]


def offsets(
  data: memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> tuple[int, list[int]]:
  """Returns the blocks of a frame, and the first byte of each; last, the end.

  Raises:
    CodecError: as `length`.
  """
  step, begins = 1, [0]
  for start, stop, frame in _found_frames(
    data, num_blocks, block_size, k, bits
  ):
    step = step if start else stop
    begins.append(begins[-1] + len(frame))
  return step, begins


def _frames(
  num_blocks: int, block_size: int, k: int, bits: int
) -> Iterator[tuple[int, int]]:
  """Yields the first block of each frame, and the one after its last."""
  low = low_bits(block_size, k)
  most = k * (low + 1 + bits) + ((block_size - k) >> low)
  return codec.runs(num_blocks, most, _FRAME_BITS)


def _frame_bytes(n: int, block_size: int, k: int, bits: int, zeros: int) -> int:
  """Returns the bytes of a frame of n blocks with `zeros` zeros in unary."""
  fixed = n * k * (low_bits(block_size, k) + 1 + bits)
  return _PREFIX_BYTES + -(-(fixed + zeros) // 8)


def _bytes(n: int, block_size: int, k: int, bits: int, zeros: int) -> int:
  """Returns the bytes of n blocks with `zeros` zeros in each."""
  return sum(
    _frame_bytes(stop - start, block_size, k, bits, (stop - start) * zeros)
    for start, stop in _frames(n, block_size, k, bits)
  )


def _zeros(data: bytes | memoryview, n: int, block_size: int, k: int) -> int:
  """Returns the prefix of a frame of n blocks: its zeros in unary."""
  if len(data) < _PREFIX_BYTES:
    raise codec.CodecError('a frame ends before its prefix')
  zeros = int.from_bytes(data[:_PREFIX_BYTES], 'little')
  most = n * ((block_size - k) >> low_bits(block_size, k))
  if zeros > most:
    raise codec.CodecError(f'a frame of {n} blocks has {zeros} zeros > {most}')
  return zeros
