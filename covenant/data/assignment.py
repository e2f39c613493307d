"""The assignment of training sequences to miners, and receipts for them.

Every node can compute the sequences of every miner without a message. All ids
are of the training split; held-out sequences have no id here.

A receipt is a miner's claim of the sequences it trained on: a digest of tokens,
not of ids of sequences, because making it requires reading them. It does not
prove that they were trained on; the loss on them shows that
(covenant/gauntlet/scores.py).
"""

import fractions
import functools
import hashlib
import math
import operator
from typing import NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant.data import tokens as tokens_lib

_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
MAX_SEQUENCES = 2**40  # products below 2**63 with room to spare
RECEIPT_BYTES = 16
_PERSON = b'covenant.receipt'
_AT_ONCE = 1024  # sequences per read

Sequences = int | tokens_lib.Population  # of a round: a number, or a mixture


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
  num_sequences: Sequences,
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
    num_sequences: sequences of the training split, 2**40 at most, or the
      mixture that the round draws from (`tokens.Split.population`).

  Returns:
    Distinct ids, int64 [count]. Time and memory are O(count).

  Raises:
    ValueError: an argument is out of range, or there are fewer than
      (uid + 1) * count sequences (`capacity`).
  """
  # Python's integers: NumPy's would overflow in (uid + 1) * count.
  uid = _bounded('uid', uid)
  round_index = _bounded('round_index', round_index)
  count = _bounded('count', count, low=1)
  most = capacity(seed, round_index, num_sequences)
  if (uid + 1) * count > most:
    raise ValueError(
      f'uid {uid} with count {count} needs {(uid + 1) * count} training '
      f'sequences; there are {most}, enough for '
      f'{most // count} uids. Lower the batch size, the inner steps '
      'or the context, or bring more data'
    )
  if isinstance(num_sequences, tokens_lib.Population):
    first, last = uid * count, (uid + 1) * count
    return _mixed(seed, round_index, first, last, num_sequences)
  positions = np.arange(uid * count, (uid + 1) * count, dtype=np.uint64)
  return _permute(positions, _keys(seed, round_index), num_sequences)


def capacity(
  seed: int | bytes, round_index: int, num_sequences: Sequences
) -> int:
  """Returns the number of positions of a round, all of different sequences.

  Of a mixture it is the number at which the first source is exhausted.

  Args:
    seed: as in `assign`.
    round_index: the round.
    num_sequences: as in `assign`.
  """
  if not isinstance(num_sequences, tokens_lib.Population):
    return _bounded('num_sequences', num_sequences, high=MAX_SEQUENCES)
  places = _places(num_sequences.weights)
  shift = _shift(seed, round_index, places)
  most = MAX_SEQUENCES
  for k, size in enumerate(num_sequences.sizes):
    slots = np.flatnonzero(places.source_p == k)
    used = int(np.searchsorted(slots, shift))  # before the first position
    period, slot = divmod(used + size, len(slots))
    most = min(most, period * len(places.source_p) + int(slots[slot]) - shift)
  return most


def least_capacity(split: tokens_lib.Split, context: int) -> int:
  """Returns a number of positions that any round of a run has (`capacity`)."""
  least = MAX_SEQUENCES
  for start in [phase.start for phase in split.phases] or [0]:
    found = split.population(context, start)
    if not isinstance(found, tokens_lib.Population):
      return found
    # A source may be ahead of its share by less than one place per source.
    for size, weight in zip(found.sizes, found.weights, strict=True):
      room = max(size - len(found.sizes), 0)
      least = min(least, room * sum(found.weights) // weight)
  return least


class _Places(NamedTuple):
  """The sources of the positions of one period of a mixture."""

  source_p: np.ndarray  # the source of each position
  rank_p: np.ndarray  # earlier positions of the same source


@functools.lru_cache(maxsize=16)
def _places(weights: tuple[int, ...]) -> _Places:
  """Spreads each source evenly over a period of sum(weights) positions.

  >>> _places((3, 1)).source_p.tolist()
  [0, 0, 1, 0]
  """
  source_p = np.repeat(np.arange(len(weights)), weights)
  rank_p = np.concatenate([np.arange(w) for w in weights])
  # By times (rank + 1/2) / weight, compared as fractions: the same everywhere.
  times = [
    (fractions.Fraction(2 * int(r) + 1, 2 * weights[k]), int(k))
    for k, r in zip(source_p, rank_p, strict=True)
  ]
  order = sorted(range(len(times)), key=times.__getitem__)
  return _Places(source_p[order], rank_p[order])


def _shift(seed: int | bytes, round_index: int, places: _Places) -> int:
  """Returns the place of a round's first position in the period.

  It differs by round, so that a uid of few sequences gets every source.
  """
  return int(_keys(seed, round_index)[0] % np.uint64(len(places.source_p)))


def _mixed(
  seed: int | bytes,
  round_index: int,
  first: int,
  last: int,
  population: tokens_lib.Population,
) -> np.ndarray:
  """Returns the ids at the positions [first, last) of a mixture."""
  places = _places(population.weights)
  shift = _shift(seed, round_index, places)
  period_n, place_n = np.divmod(
    np.arange(first + shift, last + shift, dtype=np.int64), len(places.source_p)
  )
  source_n = places.source_p[place_n]
  ids_n = np.empty(last - first, np.int64)
  for k, (offset, size) in enumerate(
    zip(population.offsets, population.sizes, strict=True)
  ):
    here_n = source_n == k
    skipped = np.count_nonzero(places.source_p[:shift] == k)
    rank_n = (
      period_n[here_n] * population.weights[k]
      + places.rank_p[place_n[here_n]]
      - skipped
    )
    keys = _keys(seed, round_index, source=k)
    ids_n[here_n] = offset + _permute(rank_n.astype(np.uint64), keys, size)
  return ids_n


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


def _keys(
  seed: int | bytes, round_index: int, source: int | None = None
) -> np.ndarray:
  """Returns eight round keys, uint64 [8], of a source of a mixture if given."""
  if isinstance(seed, bytes):
    material = b'b' + seed
  else:
    material = b'i' + _bounded('seed', seed).to_bytes(8, 'little')
  if source is not None:
    material = b'm' + source.to_bytes(4, 'little') + material
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
