"""The assignment of training sequences to miners, and receipts for them.

Every node can compute the sequences of every miner without a message. All ids
are of the training split; held-out sequences have no id here.

A receipt is a miner's claim of the sequences it trained on: a digest of tokens,
not of ids of sequences, because making it requires reading them. It does not
prove that they were trained on; the loss on them shows that
(covenant/gauntlet/scores.py).
"""

import hashlib
import math
import operator

import numpy as np

from covenant import config as config_lib
from covenant.data import tokens as tokens_lib

_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
MAX_SEQUENCES = 2**40  # products below 2**63 with room to spare
RECEIPT_BYTES = 16
_PERSON = b'covenant.receipt'
_AT_ONCE = 1024  # sequences per read


def per_miner(config: config_lib.Config) -> int:
  """Returns the number of sequences that a miner is assigned per round.

  A miner may train on fewer: the first of them.
  """
  optim = config.optim
  return optim.most_sequences or optim.inner_steps * optim.inner.batch_size


def assign(
  seed: int | bytes,
  uid: int,
  round_index: int,
  count: int,
  num_sequences: int,
) -> np.ndarray:
  """Returns the ids of the training sequences of a uid in a round.

  Seed and round key a permutation of all ids, of which uid u has the positions
  [u * count, (u + 1) * count). So the uids of a round have no sequence in
  common, and `num_sequences // count` uids use all of the split. Every round
  has another permutation: an id can return in a later round.

  >>> assign(seed=0, uid=2, round_index=7, count=4, num_sequences=1000)
  array([862, 720, 349, 980])

  Args:
    seed: the run's seed, 0 or more, or bytes such as a block hash.
    uid: the uid of the miner, 0 or more.
    round_index: the round, 0 or more.
    count: sequences per miner and round, 1 or more.
    num_sequences: sequences of the training split, 2**40 at most.

  Returns:
    Distinct ids, int64 [count]. Time and memory are O(count).

  Raises:
    ValueError: an argument is out of range, or there are fewer than
      (uid + 1) * count sequences.
  """
  # Python's integers: NumPy's would overflow in (uid + 1) * count.
  uid = _bounded('uid', uid)
  round_index = _bounded('round_index', round_index)
  count = _bounded('count', count, low=1)
  num_sequences = _bounded('num_sequences', num_sequences, high=MAX_SEQUENCES)
  if (uid + 1) * count > num_sequences:
    raise ValueError(
      f'uid {uid} with count {count} needs {(uid + 1) * count} training '
      f'sequences; there are {num_sequences}, enough for '
      f'{num_sequences // count} uids. Lower the batch size, the inner steps '
      'or the context, or bring more data'
    )
  positions = np.arange(uid * count, (uid + 1) * count, dtype=np.uint64)
  return _permute(positions, _keys(seed, round_index), num_sequences)


def evaluation(num_sequences: int, count: int) -> np.ndarray:
  """Returns evenly spaced ids of held-out sequences to evaluate on.

  >>> evaluation(num_sequences=10, count=4)
  array([0, 2, 5, 7])

  Returns:
    Ascending ids, int64 [min(count, num_sequences)].
  """
  if num_sequences < 1 or count < 1:
    raise ValueError(
      'expected 1 or more of num_sequences and count, got '
      f'{num_sequences} and {count}'
    )
  count = min(count, num_sequences)
  return np.arange(count, dtype=np.int64) * num_sequences // count


def _bounded(name: str, value: int, low: int = 0, high: int = 2**63 - 1) -> int:
  if not low <= operator.index(value) <= high:
    raise ValueError(f'{name}: expected {low} to {high}, got {value}')
  return operator.index(value)


def _keys(seed: int | bytes, round_index: int) -> np.ndarray:
  """Returns eight round keys, uint64 [8]."""
  if isinstance(seed, bytes):
    material = b'b' + seed
  else:
    material = b'i' + _bounded('seed', seed).to_bytes(8, 'little')
  digest = hashlib.blake2b(
    round_index.to_bytes(8, 'little') + material,
    digest_size=64,
    person=b'covenant.assign',
  )
  return np.frombuffer(digest.digest(), '<u8').astype(np.uint64)


def _permute(x: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
  """Evaluates a permutation of [0, size) at the points x.

  A Feistel network on pairs (left, right), left below `rows` and right below
  `columns`, by modular addition (generalized Feistel; Black and Rogaway,
  Ciphers with Arbitrary Finite Domains, 2002). It permutes
  [0, rows * columns), which exceeds `size` by less than `rows`; the few points
  that land outside are mapped again until they are inside.
  """
  rows = max(math.isqrt(size - 1), 1)
  columns = -(-size // rows)
  y = _feistel(x, keys, rows, columns)
  outside = y >= size
  while outside.any():
    y[outside] = _feistel(y[outside], keys, rows, columns)
    outside = y >= size
  return y.astype(np.int64)


def _feistel(
  x: np.ndarray, keys: np.ndarray, rows: int, columns: int
) -> np.ndarray:
  m, n = np.uint64(rows), np.uint64(columns)
  left, right = np.divmod(x, n)
  for key_left, key_right in keys.reshape(-1, 2):
    left = (left + _mix(right, key_left) % m) % m
    right = (right + _mix(left, key_right) % n) % n
  return left * n + right


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
  """Mixes x and key into 64 bits (finalizer of splitmix64).

  It is no cipher: the data and the keys are public; it only has to balance.
  """
  x = x ^ key
  for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(multiplier)
  return x ^ (x >> np.uint64(31))


class Receipt:
  """A digest that grows by the sequences trained on.

  Attributes:
    sequences: number of sequences so far.
  """

  def __init__(self):
    self._digest = hashlib.blake2b(digest_size=RECEIPT_BYTES, person=_PERSON)
    self.sequences = 0

  def add(self, tokens_BxL1: np.ndarray) -> None:
    """Adds one batch, in the order of training."""
    self._digest.update(np.ascontiguousarray(tokens_BxL1, '<i4').data)
    self.sequences += len(tokens_BxL1)

  def digest(self) -> bytes:
    """Returns the receipt, `NUM_BYTES` bytes."""
    return self._digest.digest()


def receipt_of(split: tokens_lib.Split, ids: np.ndarray, context: int) -> bytes:
  """Returns the receipt of training on the sequences `ids`, [n]."""
  receipt = Receipt()
  batches = [ids[i : i + _AT_ONCE] for i in range(0, len(ids), _AT_ONCE)]
  for tokens in tokens_lib.prefetch(split, batches, context):
    receipt.add(tokens)
  return receipt.digest()
