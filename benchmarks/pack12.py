"""The index packing that Templar deployed: 12 bits per index, in pairs.

Two indices a, b are three bytes: a & 255; a >> 8 | (b & 15) << 4; b >> 4. It
takes 1.5 times the bytes of `covenant/wire/codec.py`; `benchmarks/indices.py`
and `experiments/arithmetic.py` compare the two. A section is the pairs of all
blocks, then the codes at `bits` each: 14 bits per value at two bits. (The
deployed system uses one byte per code and reads -1 as 4095; a negative index is
an error here.)
"""

import numpy as np

from covenant.optim import blocks
from covenant.wire import codec

_LARGEST = 2**12


def pack12(indices: np.ndarray) -> bytes:
  """Packs integers of any shape, flattened, as 12-bit pairs.

  >>> pack12(np.array([0xABC, 0x123])).hex(' ')
  'bc 3a 12'

  Raises:
    CodecError: for an odd number of indices, or one outside [0, 4096).
  """
  flat = np.ravel(indices)
  if flat.size % 2:
    raise codec.CodecError(
      f'12-bit indices travel in pairs: expected an even number, got '
      f'{flat.size}'
    )
  if flat.size and not 0 <= flat.min() <= flat.max() < _LARGEST:
    bad = flat[(flat < 0) | (flat >= _LARGEST)][0]
    raise codec.CodecError(f'index {bad} does not fit 12 bits: 0 to 4095')
  a, b = flat[0::2].astype(np.uint16), flat[1::2].astype(np.uint16)
  pairs = np.stack([a & 255, (a >> 8) | ((b & 15) << 4), b >> 4], axis=1)
  return pairs.astype(np.uint8).tobytes()


def unpack12(data: bytes | memoryview) -> np.ndarray:
  """Returns the indices that `pack12` packed: uint16, flat."""
  if len(data) % 3:
    raise codec.CodecError(
      f'12-bit pairs take 3 bytes each, got {len(data)} bytes'
    )
  pairs = np.frombuffer(data, np.uint8).reshape(-1, 3)
  low, middle, high = (pairs[:, i].astype(np.uint16) for i in range(3))
  both = np.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], axis=1)
  return both.reshape(-1)


def section_bytes(num_blocks: int, block_size: int, k: int, bits: int) -> int:
  """Returns the bytes of a packed region: all pairs, then all codes.

  >>> section_bytes(1, 4096, 64, 2)  # 14 bits a value
  112

  Raises:
    CodecError: if such blocks cannot travel in 12-bit pairs.
  """
  if block_size > _LARGEST:
    raise codec.CodecError(
      f'12-bit indices reach blocks of {_LARGEST}, not of {block_size}'
    )
  count = num_blocks * k
  if count % 2:
    raise codec.CodecError(
      f'12-bit indices travel in pairs: expected an even number, got '
      f'{num_blocks} x {k}'
    )
  return count // 2 * 3 + -(-count * bits // 8)


def pack(
  indices_NxK: np.ndarray, codes_NxK: np.ndarray, block_size: int, bits: int
) -> bytes:
  """Packs the section of a region; see `codec.pack`."""
  n, k = indices_NxK.shape
  section_bytes(n, block_size, k, bits)
  runs = codec.runs(n, k * bits)
  codes = [
    np.packbits(
      codec.to_bits(codes_NxK[start:stop], bits), bitorder='little'
    ).tobytes()
    for start, stop in runs
  ]
  return pack12(indices_NxK) + b''.join(codes)


def unpack(
  data: bytes | memoryview, num_blocks: int, block_size: int, k: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
  """Unpacks the indices and codes of a section; strict as `codec.unpack`."""
  expected = section_bytes(num_blocks, block_size, k, bits)
  if len(data) != expected:
    raise codec.CodecError(f'expected {expected} bytes, got {len(data)}')
  pairs_end = num_blocks * k // 2 * 3
  packed = np.frombuffer(data, np.uint8)[pairs_end:]
  indices_NxK = np.empty((num_blocks, k), blocks.index_dtype(block_size))
  codes_NxK = np.empty((num_blocks, k), np.uint8)
  for start, stop in codec.runs(num_blocks, k * max(12, bits)):
    n = stop - start
    pairs = slice(start * k // 2 * 3, stop * k // 2 * 3)
    indices = unpack12(data[pairs]).reshape(n, k)
    codec.check_indices(indices, block_size)
    indices_NxK[start:stop] = indices
    bytes_ = slice(start * k * bits // 8, -(-stop * k * bits // 8))
    flat = np.unpackbits(packed[bytes_], bitorder='little')
    if flat[n * k * bits :].any():
      raise codec.CodecError('the padding after the last code is not zero')
    codes_NxK[start:stop] = codec.from_bits(
      flat[: n * k * bits].reshape(n, k * bits), k, bits
    )
  return indices_NxK, codes_NxK
