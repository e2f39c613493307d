"""A miner's claim of the sequences it trained on, for validators to check.

A receipt is a digest of tokens, not of ids of sequences: making it requires
reading them. It does not prove that they were trained on; the loss on them
shows that (covenant/gauntlet/scores.py).
"""

import hashlib

import numpy as np

from covenant.data import tokens as tokens_lib

NUM_BYTES = 16
_PERSON = b'covenant.receipt'
_AT_ONCE = 1024  # sequences per read


class Receipt:
  """A digest that grows by the sequences trained on.

  Attributes:
    sequences: number of sequences so far.
  """

  def __init__(self):
    self._digest = hashlib.blake2b(digest_size=NUM_BYTES, person=_PERSON)
    self.sequences = 0

  def add(self, tokens_BxL1: np.ndarray) -> None:
    """Adds one batch, in the order of training."""
    self._digest.update(np.ascontiguousarray(tokens_BxL1, '<i4').data)
    self.sequences += len(tokens_BxL1)

  def digest(self) -> bytes:
    """Returns the receipt, `NUM_BYTES` bytes."""
    return self._digest.digest()


def of_sequences(
  split: tokens_lib.Split, ids: np.ndarray, context: int
) -> bytes:
  """Returns the receipt of training on the sequences `ids`, [n]."""
  receipt = Receipt()
  batches = [ids[i : i + _AT_ONCE] for i in range(0, len(ids), _AT_ONCE)]
  for tokens in tokens_lib.prefetch(split, batches, context):
    receipt.add(tokens)
  return receipt.digest()
