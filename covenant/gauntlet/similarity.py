"""The similarity of two messages, by the indices that they send.

Honest peers start from the same parameters and share some indices. A copy
shares all of them, even if its values were perturbed and quantized again. So
the similarity is the fraction that a pair shares beyond the fraction that both
share with the others anyway.

Only tensors of two or more dimensions are compared, and of these only blocks
that are not sent whole: vectors and small blocks are similar by design.
"""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from covenant import typing as ct
from covenant.optim import block_rows
from covenant.optim import compression as compression_lib

MAX_BLOCKS = 32  # blocks compared per message, drawn anew every round
_DENSE_BLOCK = 4096  # elements, for messages that have no blocks of their own
# The usual shared fraction that is assumed with fewer than _FEW other peers.
_FEW, _USUAL = 3, 0.5
_HIGHEST = 0.9  # usual fractions are capped, so that an equal copy is found


class Sketcher:
  """Draws a deterministic sample from the messages of a run.

  Args:
    abstract_params: the shapes and dtypes of the parameters.
    compression: the compression of the messages.
  """

  def __init__(
    self,
    abstract_params: ct.Params,
    compression: compression_lib.Compression,
  ):
    self._treedef = jax.tree.structure(abstract_params)
    self._regions = []  # (leaf, region, number of blocks, size of a block)
    for leaf, x in enumerate(jax.tree.leaves(abstract_params)):
      if len(x.shape) < 2:
        continue
      if not isinstance(compression, compression_lib.TopK):
        size = min(_DENSE_BLOCK, int(np.prod(x.shape)))
        self._regions.append((leaf, None, np.prod(x.shape) // size, size))
        continue
      for region, r in enumerate(compression.regions(x.shape)):
        if compression.block_k(r.block_size) < r.block_size:
          self._regions.append((leaf, region, r.num_blocks, r.block_size))

  def sketch(
    self, messages: Mapping[int, ct.Message], seed: bytes
  ) -> np.ndarray:
    """Returns a row of bits per message, in order: uint64 [R, W].

    A bit stands for an element of a sampled block. It is set if the element's
    index is sent or, in messages that send every value, if the value is
    positive.

    Args:
      messages: messages by uid, of arrays or packed (lazy.py).
      seed: unknown before the messages were committed.
    """
    ends = np.cumsum([0, *(blocks for _, _, blocks, _ in self._regions)])
    chosen = _sample(seed, int(ends[-1]))
    rows = []
    for message in messages.values():
      parts = self._treedef.flatten_up_to(message)
      bits = []
      for region, first, last in zip(
        self._regions, ends[:-1], ends[1:], strict=True
      ):
        blocks = chosen[(first <= chosen) & (chosen < last)] - first
        if blocks.size:
          bits.append(_bits(parts, region, blocks).ravel())
      packed = np.packbits(np.concatenate([*bits, np.zeros(0, bool)]))
      rows.append(np.pad(packed, (0, -packed.size % 8)).view(np.uint64))
    return np.stack(rows) if rows else np.zeros((0, 0), np.uint64)


def _sample(seed: bytes, blocks: int) -> np.ndarray:
  """Returns `MAX_BLOCKS` of the blocks, or all, ascending: int64.

  The draw uses raw bits only, which are the same in every NumPy release.
  """
  if blocks <= MAX_BLOCKS:
    return np.arange(blocks)
  key = hashlib.blake2b(seed, digest_size=16, person=b'gauntlet.sketch')
  draw, chosen = MAX_BLOCKS, np.zeros(0, np.int64)
  while chosen.size < MAX_BLOCKS:
    draw *= 2
    philox = np.random.Philox(int.from_bytes(key.digest(), 'little'))
    drawn = (philox.random_raw(draw) % np.uint64(blocks)).astype(np.int64)
    _, first = np.unique(drawn, return_index=True)
    chosen = drawn[np.sort(first)[:MAX_BLOCKS]]
  return np.sort(chosen)


def shared_fractions(a_RxW: np.ndarray, b_SxW: np.ndarray) -> np.ndarray:
  """Returns the fraction of bits that two sketches share: float64 [R, S].

  It is relative to the larger of the two sets, so that adding indices does not
  make a message look similar.
  """
  shared_RxS = np.zeros((len(a_RxW), len(b_SxW)))
  for row, a_W in enumerate(a_RxW):
    shared_RxS[row] = np.bitwise_count(a_W & b_SxW).sum(1, dtype=np.int64)
  a_Rx1 = np.bitwise_count(a_RxW).sum(1, dtype=np.int64)[:, None]
  b_1xS = np.bitwise_count(b_SxW).sum(1, dtype=np.int64)[None]
  return shared_RxS / np.maximum(np.maximum(a_Rx1, b_1xS), 1)


def similarities(shared_RxS: np.ndarray, others_RxS: np.ndarray) -> np.ndarray:
  """Returns the similarity of messages: 0 for a usual pair, 1 for equal ones.

  That is (shared - usual) / (1 - usual). The usual fraction of a message is
  the lower quartile of those that it shares with all others; the larger one of
  the pair is taken. So cliques of up to three quarters of all peers are found.

  Args:
    shared_RxS: the result of `shared_fractions`.
    others_RxS: bool; False where both messages are of one peer.

  Returns:
    float64 [R, S], at most 1; 0 where `others_RxS` is False.

  >>> honest, copied = np.full((5, 5), 0.2), np.ones((5, 5))
  >>> matrix = np.where(np.arange(5) < 2, copied, honest)  # 0 and 1 are alike
  >>> matrix = np.minimum(matrix, matrix.T)
  >>> float(similarities(matrix, ~np.eye(5, dtype=bool))[0, 1])
  1.0
  """
  usual_Rx1 = _usual(shared_RxS, others_RxS)[:, None]
  usual_1xS = _usual(shared_RxS.T, others_RxS.T)[None]
  usual_RxS = np.minimum(np.maximum(usual_Rx1, usual_1xS), _HIGHEST)
  return np.where(others_RxS, (shared_RxS - usual_RxS) / (1 - usual_RxS), 0)


def _usual(shared_RxS: np.ndarray, others_RxS: np.ndarray) -> np.ndarray:
  """Returns the lower quartile of each row's others: float64 [R]."""
  usual_R = np.full(len(shared_RxS), _USUAL)
  for row, (values, others) in enumerate(
    zip(shared_RxS, others_RxS, strict=True)
  ):
    if others.sum() >= _FEW:
      usual_R[row] = np.sort(values[others])[(others.sum() - 1) // 4]
  return usual_R


def _bits(
  parts: list[ct.Message],
  where: tuple[int, int | None, int, int],
  blocks_n: np.ndarray,
) -> np.ndarray:
  """Returns the bits of chosen blocks of one region: bool [n, L]."""
  leaf, region, _, size = where
  if region is None:
    flat = np.asarray(parts[leaf]).reshape(-1)
    return np.stack([flat[b * size : (b + 1) * size] > 0 for b in blocks_n])
  bits = np.zeros((blocks_n.size, size), bool)
  indices = block_rows.pick(parts[leaf][region].indices, blocks_n)
  np.put_along_axis(bits, indices.astype(np.int64), True, axis=1)
  return bits
