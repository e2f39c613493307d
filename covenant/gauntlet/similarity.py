"""How alike two messages are, by the indices that they send.

Honest peers start from the same parameters and share some indices (in the
first rounds a third, later a twentieth); a copy shares all of them, however
its values were perturbed and quantized again. So what counts is how much a
pair shares beyond what these peers share with the others anyway.

Only tensors of two or more dimensions are compared, and of these only blocks
that are not sent whole: vectors and small blocks are alike by design
(reference/templar.md 11.6).
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from covenant.optim import compression as compression_lib

MAX_BLOCKS = 32  # compared of a message, drawn anew every round
_DENSE_BLOCK = 4096  # elements, where messages have no blocks of their own
# With fewer others than this nobody knows what is usual; this is assumed.
_FEW, _USUAL = 3, 0.5
_HIGHEST = 0.9  # no usual overlap hides a copy that is equal


class Sketcher:
  """Cuts a deterministic sample out of the messages of a run."""

  def __init__(self, like: Any, compression: compression_lib.Compression):
    """Of parameters shaped like `like`, sent by `compression`."""
    self._treedef = jax.tree.structure(like)
    self._places = []  # (leaf, region, number of blocks, size of a block)
    for leaf, x in enumerate(jax.tree.leaves(like)):
      if len(x.shape) < 2:
        continue
      if not isinstance(compression, compression_lib.TopK):
        size = min(_DENSE_BLOCK, int(np.prod(x.shape)))
        self._places.append((leaf, None, np.prod(x.shape) // size, size))
        continue
      for region, r in enumerate(compression.regions(x.shape)):
        if compression.block_k(r.block_size) < r.block_size:
          self._places.append((leaf, region, r.num_blocks, r.block_size))

  def sketch(self, messages: Mapping[int, Any], seed: bytes) -> np.ndarray:
    """One row of bits a message, in the order of `messages`: uint64 [R, W].

    A bit is an element of a sampled block: set where its index is sent, or
    where its value is above zero in messages that send everything.

    Args:
      messages: by uid, as decoded.
      seed: unknown before the messages were committed to.
    """
    ends = np.cumsum([0, *(blocks for _, _, blocks, _ in self._places)])
    key = hashlib.blake2b(seed, digest_size=16, person=b'gauntlet.sketch')
    draw = np.random.Generator(
      np.random.Philox(int.from_bytes(key.digest(), 'little'))
    )
    count = min(MAX_BLOCKS, int(ends[-1]))
    chosen = np.sort(draw.choice(int(ends[-1]), count, replace=False))
    rows = []
    for message in messages.values():
      parts = self._treedef.flatten_up_to(message)
      bits = []
      for place, first, last in zip(
        self._places, ends[:-1], ends[1:], strict=True
      ):
        blocks = chosen[(first <= chosen) & (chosen < last)] - first
        if blocks.size:
          bits.append(_bits(parts, place, blocks).ravel())
      packed = np.packbits(np.concatenate([*bits, np.zeros(0, bool)]))
      rows.append(np.pad(packed, (0, -packed.size % 8)).view(np.uint64))
    return np.stack(rows) if rows else np.zeros((0, 0), np.uint64)


def overlaps(a_RxW: np.ndarray, b_SxW: np.ndarray) -> np.ndarray:
  """The share of set bits that two sketches have in common: float64 [R, S].

  Of the larger of the two sets: who adds indices does not look alike.
  """
  shared_RxS = np.zeros((len(a_RxW), len(b_SxW)))
  for row, a_W in enumerate(a_RxW):
    shared_RxS[row] = np.bitwise_count(a_W & b_SxW).sum(1, dtype=np.int64)
  a_Rx1 = np.bitwise_count(a_RxW).sum(1, dtype=np.int64)[:, None]
  b_1xS = np.bitwise_count(b_SxW).sum(1, dtype=np.int64)[None]
  return shared_RxS / np.maximum(np.maximum(a_Rx1, b_1xS), 1)


def similarities(
  overlaps_RxS: np.ndarray, others_RxS: np.ndarray
) -> np.ndarray:
  """How much more than usual two messages overlap: 0 usual, 1 equal.

  (overlap - usual) / (1 - usual), where usual is the lower quartile of what
  either of the two shares with its others, whichever is more: cliques of up
  to three quarters of all peers do not pass for usual.

  Args:
    overlaps_RxS: `overlaps`.
    others_RxS: bool; False where both are the same peer.

  Returns:
    float64 [R, S], at most 1; 0 where not `others_RxS`.

  >>> honest, copied = np.full((5, 5), 0.2), np.ones((5, 5))
  >>> matrix = np.where(np.arange(5) < 2, copied, honest)  # 0 and 1 are alike
  >>> matrix = np.minimum(matrix, matrix.T)
  >>> float(similarities(matrix, ~np.eye(5, dtype=bool))[0, 1])
  1.0
  """
  usual_Rx1 = _usual(overlaps_RxS, others_RxS)[:, None]
  usual_1xS = _usual(overlaps_RxS.T, others_RxS.T)[None]
  usual_RxS = np.minimum(np.maximum(usual_Rx1, usual_1xS), _HIGHEST)
  return np.where(others_RxS, (overlaps_RxS - usual_RxS) / (1 - usual_RxS), 0)


def _usual(overlaps_RxS: np.ndarray, others_RxS: np.ndarray) -> np.ndarray:
  """The lower quartile of each row's others: float64 [R]."""
  usual_R = np.full(len(overlaps_RxS), _USUAL)
  for row, (values, others) in enumerate(
    zip(overlaps_RxS, others_RxS, strict=True)
  ):
    if others.sum() >= _FEW:
      usual_R[row] = np.sort(values[others])[(others.sum() - 1) // 4]
  return usual_R


def _bits(parts: list[Any], place: Any, blocks_n: np.ndarray) -> np.ndarray:
  """Bool [n, L] of the chosen blocks of one region of a message."""
  leaf, region, _, size = place
  if region is None:
    flat = np.asarray(parts[leaf]).reshape(-1)
    return np.stack([flat[b * size : (b + 1) * size] > 0 for b in blocks_n])
  bits = np.zeros((blocks_n.size, size), bool)
  indices = np.asarray(parts[leaf][region].indices)[blocks_n]
  np.put_along_axis(bits, indices.astype(np.int64), True, axis=1)
  return bits
