"""Tests for covenant.data.assignment."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import tensorstore as ts
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.data import assignment
from covenant.data import corpus
from covenant.data import dataset
from covenant.data import tokenizer
from covenant.data import tokens as tokens_lib

SEEDS = st.integers(0, 2**31 - 1) | st.binary(max_size=40)
ROUNDS = st.integers(0, 2**40)


class AssignTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(SEEDS, ROUNDS, st.integers(1, 30), st.integers(1, 40))
  def test_all_uids_share_out_all_sequences(self, seed, round_index, uids, n):
    parts = [
      assignment.assign(seed, uid, round_index, n, uids * n)
      for uid in range(uids)
    ]
    self.assertCountEqual(np.concatenate(parts).tolist(), range(uids * n))

  @hypothesis.settings(deadline=None)
  @hypothesis.given(
    SEEDS,
    ROUNDS,
    st.integers(1, 50),
    st.integers(2 * 50, 2**40),
    st.data(),
  )
  def test_two_uids_share_nothing(self, seed, round_index, n, total, data):
    uids = data.draw(
      st.lists(
        st.integers(0, total // n - 1), min_size=2, max_size=2, unique=True
      )
    )
    parts = [
      assignment.assign(seed, uid, round_index, n, total) for uid in uids
    ]
    together = np.concatenate(parts)
    self.assertEqual(together.dtype, np.int64)
    self.assertLen(np.unique(together), 2 * n)
    self.assertBetween(together.min(), 0, total - 1)
    self.assertBetween(together.max(), 0, total - 1)

  @hypothesis.settings(deadline=None)
  @hypothesis.given(SEEDS, ROUNDS, st.integers(0, 100), st.integers(1, 9))
  def test_pure(self, seed, round_index, uid, n):
    arguments = seed, uid, round_index, n, 1000
    np.testing.assert_array_equal(
      assignment.assign(*arguments), assignment.assign(*arguments)
    )

  # A change of these numbers forks every network that runs: do not.
  @parameterized.parameters(
    (0, 0, 0, 1000, [174, 445, 659, 825]),
    (0, 3, 7, 1000, [716, 437, 647, 793]),
    (b'\x01\x02', 3, 7, 1000, [712, 838, 744, 690]),
    (
      2**31 - 1,
      255,
      12345,
      2**40,
      [559911726316, 906209559738, 20416350973, 948781984837],
    ),
  )
  def test_golden(self, seed, uid, round_index, total, expected):
    got = assignment.assign(seed, uid, round_index, 4, total)
    self.assertEqual(got.tolist(), expected)

  def test_seeds_rounds_and_kinds_of_seed_differ(self):
    draws = [
      tuple(assignment.assign(seed, 0, r, 8, 10_000).tolist())
      for r in range(20)
      for seed in (0, 1, b'', b'\0', bytes(8), bytes(9))
    ]
    self.assertLen(set(draws), len(draws))

  @parameterized.parameters(8, 10, 250)
  def test_uniform(self, total):
    """Each id is as likely as any other; 5 sigma of a chi-square."""
    n = 5000
    first = [assignment.assign(0, 0, r, 2, total) for r in range(n)]
    for place in range(2):
      counts = np.bincount([ids[place] for ids in first], minlength=total)
      expected = n / total
      chi2 = ((counts - expected) ** 2 / expected).sum()
      self.assertLess(abs(chi2 - (total - 1)), 5 * np.sqrt(2 * (total - 1)))

  def test_neighbours_are_scattered(self):
    ids = assignment.assign(0, 0, 0, 10_000, 2**30)
    correlation = np.corrcoef(ids[:-1], ids[1:])[0, 1]
    self.assertLess(abs(correlation), 0.05)

  def test_numpy_integers_do_not_overflow(self):
    arguments: Any = (np.uint8(255), np.int32(1), np.uint8(2))
    got = assignment.assign(0, *arguments, num_sequences=512)
    np.testing.assert_array_equal(got, assignment.assign(0, 255, 1, 2, 512))

  def test_too_few_sequences(self):
    with self.assertRaisesRegex(
      ValueError,
      'uid 3 with count 25 needs 100 training sequences; there are 99, enough '
      'for 3 uids',
    ):
      assignment.assign(0, 3, 0, 25, 99)
    self.assertLen(assignment.assign(0, 3, 0, 25, 100), 25)

  @parameterized.parameters(
    ({'uid': -1}, 'uid: expected 0 to 9223372036854775807, got -1'),
    ({'round_index': -1}, 'round_index: expected 0 to .*, got -1'),
    ({'count': 0}, 'count: expected 1 to .*, got 0'),
    ({'seed': -1}, 'seed: expected 0 to .*, got -1'),
    ({'seed': 2**63}, 'seed: expected 0 to .*, got 9223372036854775808'),
    (
      {'num_sequences': 2**40 + 1},
      'num_sequences: expected 0 to 1099511627776, got 1099511627777',
    ),
  )
  def test_bounds(self, change, message):
    arguments = {
      'seed': 0,
      'uid': 0,
      'round_index': 0,
      'count': 1,
      'num_sequences': 9,
    }
    with self.assertRaisesRegex(ValueError, message):
      assignment.assign(**(arguments | change))

  def test_heldout_plays_are_never_trained(self):
    plays = corpus.load(config.Data(), seed=0)
    data = dataset.tokenize(plays, tokenizer.Bytes())
    context, count = 256, 500
    limit = data.train.num_sequences(context)
    trained = set()
    for uid in range(limit // count):
      ids = assignment.assign(0, uid, 0, count, limit)
      trained.update(map(bytes, data.train.read(ids, context).astype('u1')))
    self.assertLen(trained, limit // count * count)
    ids = np.arange(data.heldout.num_sequences(context))
    heldout = data.heldout.read(ids, context).astype('u1')
    self.assertEmpty(trained.intersection(map(bytes, heldout)))


class EvaluationTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(st.integers(1, 2**40), st.integers(1, 600))
  def test_evenly_spaced(self, total, count):
    ids = assignment.evaluation(total, count)
    self.assertEqual(ids.dtype, np.int64)
    self.assertLen(ids, min(total, count))
    self.assertEqual(ids[0], 0)
    self.assertLess(ids[-1], total)
    gaps = np.diff(np.append(ids, total))
    self.assertGreaterEqual(gaps.min(), 1)
    self.assertLessEqual(gaps.max() - gaps.min(), 1)

  @parameterized.parameters((0, 1), (1, 0))
  def test_bounds(self, total, count):
    with self.assertRaisesRegex(
      ValueError,
      f'expected 1 or more of num_sequences and count, got {total} and {count}',
    ):
      assignment.evaluation(total, count)


CONTEXT = 4


class MixtureTest(parameterized.TestCase):
  POPULATION = tokens_lib.Population(
    (0, 1000, 1300), (1000, 300, 90), (6, 3, 1)
  )

  def assigned(self, uid, count=20, round_index=7, population=POPULATION):
    return assignment.assign(0, uid, round_index, count, population)

  def test_disjoint_and_in_proportion(self):
    most = assignment.capacity(0, 7, self.POPULATION)
    self.assertBetween(most, 880, 910)  # the last source has 90 for a tenth
    ids = np.concatenate([self.assigned(uid) for uid in range(most // 20)])
    self.assertLen(set(ids.tolist()), ids.size)
    self.assertBetween(ids.min(), 0, ids.max())
    self.assertLess(ids.max(), 1390)
    for uid in range(most // 20):
      found = np.searchsorted([1000, 1300], self.assigned(uid), 'right')
      self.assertEqual(np.bincount(found, minlength=3).tolist(), [12, 6, 2])

  def test_exhausted(self):
    most = assignment.capacity(0, 7, self.POPULATION)
    self.assigned(0, count=most)
    with self.assertRaisesRegex(ValueError, f'there are {most}, enough for 0'):
      self.assigned(0, count=most + 1)

  @hypothesis.given(
    st.lists(
      st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=4
    ),
    st.integers(0, 99),
  )
  def test_a_round_uses_a_source_up_and_none_twice(self, sources, round_index):
    sizes, weights = zip(*sources, strict=True)
    offsets = tuple(int(x) for x in np.cumsum((0, *sizes[:-1])))
    population = tokens_lib.Population(offsets, sizes, weights)
    most = assignment.capacity(3, round_index, population)
    if not most:
      return
    ids = assignment.assign(3, 0, round_index, most, population)
    self.assertLen(set(ids.tolist()), most)
    used = np.bincount(
      np.searchsorted(np.cumsum(sizes), ids, 'right'), minlength=len(sizes)
    )
    self.assertTrue(np.all(used <= sizes))
    self.assertTrue(np.any(used == sizes))

  def test_rare_sources_come_to_every_uid(self):
    population = tokens_lib.Population((0, 9000), (9000, 900), (99, 1))
    for uid in range(3):
      rounds = [self.assigned(uid, 8, r, population) for r in range(200)]
      rare = np.mean(np.concatenate(rounds) >= 9000)
      self.assertBetween(rare, 0.003, 0.02)

  def test_one_source_is_spread_over_all_of_it(self):
    population = tokens_lib.Population((50,), (40,), (1,))
    ids = self.assigned(0, 40, 3, population)
    self.assertCountEqual(ids.tolist(), range(50, 90))

  def test_is_fixed(self):
    self.assertEqual(
      self.assigned(1, 6).tolist(), [495, 1165, 45, 511, 1071, 725]
    )

  def test_least_capacity(self):
    split = tokens_lib.Split(
      ts.array(np.zeros(11 * 1390, np.int32)),
      0,
      parts=(10_001, 3001, 901),
      phases=(
        tokens_lib.MixturePhase(0, (0,), (1,)),
        tokens_lib.MixturePhase(9, (0, 1, 2), (6, 3, 1)),
      ),
    )
    least = assignment.least_capacity(split, 10)
    self.assertBetween(least, 800, 900)
    for r in range(40):
      most = assignment.capacity(1, r, split.population(10, r))
      self.assertGreaterEqual(most, least)


SPLIT = tokens_lib.Split(ts.array(np.arange(401, dtype=np.int32)), 0)


def trained(batches):
  """The receipt of who reads batch after batch of ids."""
  receipt = assignment.Receipt()
  for ids in batches:
    receipt.add(SPLIT.read(ids, CONTEXT))
  return receipt


class ReceiptTest(parameterized.TestCase):
  @hypothesis.given(
    st.lists(st.integers(0, 99), min_size=1, max_size=30), st.data()
  )
  def test_a_validator_finds_what_the_miner_says(self, ids, data):
    """In batches of any size, it is a receipt of the sequences in order."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))))
    batches = [b for b in np.split(np.array(ids), cuts) if b.size]
    receipt = trained(batches)
    self.assertEqual(receipt.sequences, len(ids))
    self.assertLen(receipt.digest(), assignment.RECEIPT_BYTES)
    self.assertEqual(
      receipt.digest(),
      assignment.receipt_of(SPLIT, np.array(ids), CONTEXT),
    )

  @parameterized.parameters(
    ([0, 1, 2], [0, 1, 3]),
    ([0, 1, 2], [0, 2, 1]),
    ([0, 1, 2], [0, 1]),
    ([0, 1], [0, 1, 1]),
    ([0], []),
  )
  def test_other_data_has_another(self, one, other):
    receipts = {
      assignment.receipt_of(SPLIT, np.array(ids, np.int64), CONTEXT)
      for ids in (one, other)
    }
    self.assertLen(receipts, 2)

  def test_every_token_is_in_it(self):
    tokens_BxL1 = SPLIT.read([3, 5], CONTEXT)
    seen = set()
    for at in np.ndindex(tokens_BxL1.shape):
      changed = tokens_BxL1.copy()
      changed[at] += 1
      receipt = assignment.Receipt()
      receipt.add(changed)
      seen.add(receipt.digest())
    self.assertLen(seen - {trained([[3, 5]]).digest()}, tokens_BxL1.size)

  def test_is_of_tokens_not_of_their_layout_in_memory(self):
    tokens_BxL1 = SPLIT.read([3, 5], CONTEXT)
    want = trained([[3, 5]]).digest()
    for same in (
      np.asfortranarray(tokens_BxL1),
      tokens_BxL1.astype('>i4'),
      tokens_BxL1.astype(np.int64),
    ):
      receipt = assignment.Receipt()
      receipt.add(same)
      self.assertEqual(receipt.digest(), want)

  def test_a_known_receipt(self):
    """Payloads carry it: it must never change."""
    want = 'aa17384bf428d1aa5e687982efddacb1'
    self.assertEqual(trained([[0, 1], [2]]).digest().hex(), want)


if __name__ == '__main__':
  absltest.main()
