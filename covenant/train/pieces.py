"""The pieces of tensors: what has a digest, and an object in a checkpoint."""

import collections
import hashlib
from collections.abc import Iterator
from concurrent import futures

import jax
import numpy as np

from covenant import typing as ct

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
  for part in stream(leaf, max(piece_bytes // leaf.dtype.itemsize, 1)):
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    left = np.concatenate([left, data]) if left.size else data
    while left.size >= piece_bytes:
      yield left[:piece_bytes]
      left = left[piece_bytes:]
  if left.size:
    yield left


def stream(x: ct.Array, budget: int) -> Iterator[np.ndarray]:
  """Yields a leaf on the host piece by piece, in row-major order.

  A piece has up to `budget` elements, or one index of the first axis. Each
  piece is gathered on the host, so that no device gets more of a sharded array
  than it has.
  """
  if not isinstance(x, jax.Array) or x.size <= budget:
    yield np.asarray(x)
    return
  n = max(budget * x.shape[0] // x.size, 1)
  for first in range(0, x.shape[0], n):
    last = min(first + n, x.shape[0])
    piece = np.empty((last - first, *x.shape[1:]), x.dtype)
    for shard in x.addressable_shards:
      start, stop, _ = shard.index[0].indices(x.shape[0])
      low, high = max(start, first), min(stop, last)
      if shard.replica_id == 0 and low < high:
        here = jax.lax.dynamic_slice_in_dim(shard.data, low - start, high - low)
        piece[low - first : high - first, *shard.index[1:]] = here
    yield piece
