"""The pieces of tensors: what has a digest, and an object in a checkpoint."""

import collections
import hashlib
from collections.abc import Iterator
from concurrent import futures

import numpy as np

from covenant import typing as ct
from covenant.optim import host_copy

# Bytes of a leaf that have a digest of their own; a published checkpoint has an
# object per piece.
PIECE_BYTES = 1 << 25
_PIECES = 32  # number of pieces on the host at once


def piece_digests(
  leaf: ct.Array, piece_bytes: int = PIECE_BYTES
) -> Iterator[bytes]:
  """Yields the digest of each piece of a tensor, 32 bytes each.

  All cores compute them in parallel: one core would need minutes for 72 billion
  parameters.
  """

  def digest(piece: np.ndarray) -> bytes:
    return hashlib.blake2b(piece.data, digest_size=32).digest()

  with futures.ThreadPoolExecutor() as pool:
    waiting = collections.deque[futures.Future[bytes]]()
    for piece in pieces(leaf, piece_bytes):
      waiting.append(pool.submit(digest, piece))
      if len(waiting) > _PIECES:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def pieces(
  leaf: ct.Array, piece_bytes: int = PIECE_BYTES
) -> Iterator[np.ndarray]:
  """Yields the bytes of a tensor, row-major, cut at multiples of a size."""
  left = np.zeros(0, np.uint8)
  budget = max(piece_bytes // leaf.dtype.itemsize, 1)
  for part in host_copy.stream(leaf, budget):
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    left = np.concatenate([left, data]) if left.size else data
    while left.size >= piece_bytes:
      yield left[:piece_bytes]
      left = left[piece_bytes:]
  if left.size:
    yield left
