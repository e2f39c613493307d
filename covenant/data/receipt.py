"""What a miner says it was trained on, so that a validator can check it.

A receipt is a digest of tokens, not of their numbers in the corpus: nobody
makes it without reading them. It does not prove that they were trained on;
that is what the loss on them shows (covenant/gauntlet/scores.py).
"""

import hashlib

import numpy as np

from covenant.data import tokens as tokens_lib

NUM_BYTES = 16
_PERSON = b'covenant.receipt'
_AT_ONCE = 1024  # sequences read


class Receipt:
  """Collects sequences as they are trained on."""

  def __init__(self):
    self._digest = hashlib.blake2b(digest_size=NUM_BYTES, person=_PERSON)
    self.sequences = 0

  def add(self, tokens_BxL1: np.ndarray) -> None:
    """One batch, in the order of training."""
    self._digest.update(np.ascontiguousarray(tokens_BxL1, '<i4').data)
    self.sequences += len(tokens_BxL1)

  def digest(self) -> bytes:
    """`NUM_BYTES` bytes."""
    return self._digest.digest()


def of_sequences(
  split: tokens_lib.Split, ids: np.ndarray, context: int
) -> bytes:
  """The receipt of somebody who was trained on the sequences `ids`, [n]."""
  receipt = Receipt()
  batches = [ids[i : i + _AT_ONCE] for i in range(0, len(ids), _AT_ONCE)]
  for tokens in tokens_lib.prefetch(split, batches, context):
    receipt.add(tokens)
  return receipt.digest()
