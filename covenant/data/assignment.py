"""Which sequences a miner trains in a round, as a pure function.

Everyone can compute everyone's data: a validator needs no message to know
what a miner was given. All ids index the training split; held-out sequences
have no id here.
"""

import hashlib
import math
import operator

import numpy as np

from covenant import config as config_lib

_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
MAX_SEQUENCES = 2**40  # products below 2**63 with room to spare


def per_miner(config: config_lib.Config) -> int:
  """How many sequences a miner is assigned in a round.

  It may train on fewer, the first ones.
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
  """The ids of the `count` training sequences of `uid` in a round.

  A keyed permutation of all ids is drawn for (seed, round); uid u owns its
  positions [u * count, (u + 1) * count). So the uids of one round share
  nothing, whoever they are, and `num_sequences // count` uids use all there
  is. Rounds draw anew: an id can return in a later round.

  >>> assign(seed=0, uid=2, round_index=7, count=4, num_sequences=1000)
  array([862, 720, 349, 980])

  Args:
    seed: The run's seed, 0 or more, or bytes such as a block hash.
    uid: The miner, 0 or more.
    round_index: 0 or more.
    count: Sequences a miner and round, 1 or more.
    num_sequences: Of the training split, 2**40 at most.

  Returns:
    int64 [count], all different. Time and memory are O(count).

  Raises:
    ValueError: An argument is out of its range, or there are fewer than
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
  """Held-out sequences to evaluate on: evenly spaced, the same every round.

  >>> evaluation(num_sequences=10, count=4)
  array([0, 2, 5, 7])

  Returns:
    int64 [min(count, num_sequences)], rising.
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
  """Eight round keys, uint64. Round and tag have fixed lengths: injective."""
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
  """A permutation of [0, size) at the points x.

  A Feistel network on pairs (left, right), left below `rows` and right below
  `columns`, by modular addition (generalized Feistel; Black and Rogaway,
  Ciphers with Arbitrary Finite Domains, 2002). It permutes
  [0, rows * columns), which exceeds `size` by less than `rows`; a point that
  lands outside walks on until it is back inside, which few have to.
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
  """64 bits that depend on all bits of x and key (finalizer of splitmix64).

  Not a cipher: data is public, keys too; only balance is asked for.
  """
  x = x ^ key
  for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(multiplier)
  return x ^ (x >> np.uint64(31))
