import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import yuma

MAX = 65535
# The pallet keeps bonds in 16 bits between epochs.
STORED = 2e-5


def make_uids(stakes, registered=0, updated=1, validators=None):
  n = len(stakes)
  stake_N = np.array(stakes, float)
  return yuma.Uids(
    stake_N,
    np.ones(n, bool) if validators is None else np.array(validators, bool),
    np.broadcast_to(np.array(registered, np.int64), n),
    np.broadcast_to(np.array(updated, np.int64), n),
  )


class PublishedTest(parameterized.TestCase):
  """Numbers that subtensor's tests/epoch.rs states or logs."""

  def test_bonds(self):
    """`test_bonds`: validators fall silent one by one; eight epochs."""
    uids = make_uids([1, 2, 3, 4, 0, 0, 0, 0])
    weights_NxN = np.zeros((8, 8))
    said = [MAX // 4, MAX // 2, MAX // 4 * 3, MAX]
    weights_NxN[:4, 4:] = said
    bonds_NxN = np.zeros((8, 8))

    def step(block):
      nonlocal bonds_NxN
      # That the weights are newer than the uids is all that matters here.
      result = yuma.epoch(uids, weights_NxN, bonds_NxN, block, tempo=1)
      bonds_NxN = result.bonds_NxN
      return result

    def only_self(uid):
      weights_NxN[uid] = 0
      weights_NxN[uid, uid] = MAX

    first = step(2)
    share = [0.0999975584, 0.2000012207, 0.2999926754, 0.400008545]
    np.testing.assert_allclose(first.consensus_N, [0] * 4 + share, atol=1e-9)
    np.testing.assert_allclose(first.incentive_N, [0] * 4 + share, atol=1e-8)
    np.testing.assert_allclose(first.trust_N, [1] * 4 + [0] * 4, atol=1e-9)
    np.testing.assert_allclose(
      first.dividends_N, [0.1, 0.2, 0.3, 0.4] + [0] * 4, atol=1e-8
    )
    emission = [49999998, 99999999, 150000000, 200000001]
    emission += [49998779, 100000610, 149996337, 200004272]
    np.testing.assert_allclose(first.emission_N * 1e9, emission, atol=3)

    only_self(0)
    second = step(3)
    np.testing.assert_allclose(second.trust_N, [0, 1, 1, 1] + [0] * 4)
    np.testing.assert_allclose(
      second.dividends_N[:4],
      [0.0899967032, 0.2022211233, 0.303334432, 0.404447741],
      atol=STORED,
    )

    only_self(1)
    third = step(4)
    np.testing.assert_allclose(
      third.dividends_N[:4],
      [0.0809936118, 0.1819995677, 0.3158592721, 0.421147548],
      atol=STORED,
    )
    np.testing.assert_allclose(third.incentive_N, [0] * 4 + share, atol=1e-8)

    # One validator with 0.4 of the stake is no majority: stake is paid.
    only_self(2)
    fourth = step(5)
    for nothing_N in fourth[:4]:
      np.testing.assert_array_equal(nothing_N, np.zeros(8))
    np.testing.assert_allclose(
      fourth.emission_N, [0.1, 0.2, 0.3, 0.4] + [0] * 4, atol=1e-9
    )
    bonds_N = [12602, 28320, 49150, MAX]
    np.testing.assert_allclose(
      bonds_NxN[:4, 7] / bonds_NxN[3, 7] * MAX, bonds_N, atol=3
    )

    weights_NxN[2] = 0
    weights_NxN[2, 7] = MAX
    for block, bonds, dividends in (
      (6, [10951, 24609], [0.0728874663, 0.1637972582, 0.3271309866]),
      (7, [9559, 21482], [0.0655988548, 0.1474132247, 0.3372762585]),
      (8, [8376, 18824], [0.0590361361, 0.1326722752, 0.3464062694]),
      (9, None, [0.053130352, 0.1194037423, 0.3546237142]),
    ):
      result = step(block)
      np.testing.assert_allclose(
        result.consensus_N, [0] * 7 + [0.400008545], atol=1e-9
      )
      np.testing.assert_allclose(result.trust_N[2:4], [0.400008545] * 2)
      np.testing.assert_array_equal(result.incentive_N, [0] * 7 + [1])
      np.testing.assert_allclose(
        result.dividends_N[:3], dividends, atol=2 * STORED
      )
      if bonds:
        scaled = bonds_NxN[:2, 7] / bonds_NxN[3, 7] * MAX
        np.testing.assert_allclose(scaled, bonds, atol=3)

  def test_active_stake(self):
    """`test_active_stake`: who says nothing for 5000 blocks has no say."""
    weights_NxN = np.zeros((4, 4))
    weights_NxN[:2, 2:] = MAX // 2
    uids = make_uids([1, 1, 1, 1], updated=[1, 1, 0, 0])
    first = yuma.epoch(uids, weights_NxN, np.zeros((4, 4)), 1, tempo=1)
    np.testing.assert_allclose(first.emission_N, [0.25] * 4)
    np.testing.assert_allclose(first.dividends_N, [0.5, 0.5, 0, 0])

    uids = make_uids([1, 1, 1, 1], updated=[5002, 1, 0, 0])
    second = yuma.epoch(uids, weights_NxN, first.bonds_NxN, 5002, tempo=1)
    np.testing.assert_allclose(second.dividends_N, [0.55, 0.45, 0, 0])
    np.testing.assert_allclose(second.emission_N, [0.275, 0.225, 0.25, 0.25])

    uids = make_uids([1, 1, 1, 1], updated=[5002, 5002, 0, 0])
    third = yuma.epoch(uids, weights_NxN, second.bonds_NxN, 5003, tempo=1)
    np.testing.assert_allclose(
      third.dividends_N, [0.545002266, 0.4549977337, 0, 0], atol=STORED
    )
    np.testing.assert_allclose(third.dividends_N, [0.545, 0.455, 0, 0])

  def test_outdated_weights(self):
    """`test_outdated_weights`: uid 3 changes hands at block 1."""
    weights_NxN = np.zeros((4, 4))
    weights_NxN[:2, 2:] = [MAX, 32768]
    weights_NxN[2, 2] = weights_NxN[3, 3] = MAX
    uids = make_uids([1, 1, 1, 1])
    first = yuma.epoch(uids, weights_NxN, np.zeros((4, 4)), 1, tempo=0)
    np.testing.assert_allclose(
      first.emission_N, [0.25, 0.25, 0.3333316378, 0.166668362], atol=1e-9
    )
    uids = make_uids(
      [1, 1, 1, 0],
      registered=[0, 0, 0, 1],
      updated=[2, 1, 1, 1],
      validators=[1, 1, 1, 0],
    )
    second = yuma.epoch(uids, weights_NxN, first.bonds_NxN, 2, tempo=0)
    np.testing.assert_allclose(
      second.consensus_N, [0, 0, 0.6666632756, 0], atol=1e-9
    )
    np.testing.assert_allclose(
      second.trust_N, [0.6666632756, 0.6666632756, 0, 0], atol=1e-9
    )
    np.testing.assert_array_equal(second.incentive_N, [0, 0, 1, 0])
    np.testing.assert_allclose(second.emission_N, [0.25, 0.25, 0.5, 0])

  def test_512_uids(self):
    """`test_512_graph`: 64 validators that agree on 448 servers."""
    weights_NxN = np.zeros((512, 512))
    weights_NxN[:64, 64:] = 1
    uids = make_uids([328_125] * 64 + [0] * 448)
    bonds_NxN = np.zeros((512, 512))
    for block in (1, 2, 3):
      result = yuma.epoch(uids, weights_NxN, bonds_NxN, block, tempo=1)
      bonds_NxN = result.bonds_NxN
    np.testing.assert_array_equal(np.floor(result.dividends_N[:64] * MAX), 1023)
    np.testing.assert_array_equal(np.floor(result.incentive_N[64:] * MAX), 146)
    emission = np.floor(result.emission_N * 1e9 + 1e-3)
    np.testing.assert_array_equal(emission[:64], 7812500)
    np.testing.assert_array_equal(emission[64:], 1116071)


class ByHandTest(parameterized.TestCase):
  def test_two_validators_that_differ(self):
    # Stake 0.7 and 0.3; weights for uids 2 and 3: (0.5, 0.5) and (0.1, 0.9).
    # Majority is 0.7 alone: consensus 0.5 and 0.5. Clipped: (0.5, 0.5) and
    # (0.1, 0.5): trust 1 and 0.6. Ranks: 0.35 + 0.03 and 0.35 + 0.15, sum
    # 0.88. Bonds: 0.35 : 0.03 on uid 2, 0.35 : 0.15 on uid 3. Dividends of
    # the first: (0.38 * 0.35/0.38 + 0.5 * 0.35/0.5) / 0.88 = 0.7 / 0.88.
    weights_NxN = np.zeros((4, 4))
    weights_NxN[0, 2:] = [5, 5]
    weights_NxN[1, 2:] = [1, 9]
    uids = make_uids([7, 3, 0, 0])
    got = yuma.epoch(uids, weights_NxN, np.zeros((4, 4)), 10, tempo=5)
    np.testing.assert_allclose(got.consensus_N, [0, 0, 0.5, 0.5])
    np.testing.assert_allclose(got.trust_N, [1, 0.6, 0, 0])
    np.testing.assert_allclose(got.incentive_N, [0, 0, 0.38 / 0.88, 0.5 / 0.88])
    np.testing.assert_allclose(got.dividends_N, [0.7 / 0.88, 0.18 / 0.88, 0, 0])
    np.testing.assert_allclose(
      got.emission_N, np.array([0.7, 0.18, 0.38, 0.5]) / 1.76
    )

  @parameterized.parameters(
    # stake, weights of one column, the median
    ([1.0], [1.0], 1.0),
    ([0.49, 0.51], [0.5, 1.0], 1.0),
    ([0.51, 0.49], [0.5, 1.0], 0.5),
    ([0.5, 0.5], [0.5, 1.0], 1.0),  # half is a majority
    ([0.1] * 10, [0.0] * 5 + [1.0] * 5, 1.0),
    ([0.1] * 10, [0.0] * 6 + [1.0] * 4, 0.0),
    ([0.0, 1.0], [1.0, 0.25], 0.25),  # no stake, no say
    ([0.0, 0.0], [1.0, 1.0], 0.0),
    ([0.2, 0.2, 0.6], [0.9, 0.1, 0.4], 0.4),
  )
  def test_stake_median(self, stakes, column, median):
    got_N = yuma.stake_median(np.array(column)[:, None], np.array(stakes))
    np.testing.assert_array_equal(got_N, [median])

  def test_a_new_uid_has_no_old_bonds(self):
    weights_NxN = np.zeros((4, 4))
    weights_NxN[:2, 2:] = 1
    bonds_NxN = np.zeros((4, 4))
    bonds_NxN[0, 2:] = 1
    uids = make_uids([1, 1, 0, 0], registered=[0, 0, 0, 15], updated=19)
    got = yuma.epoch(uids, weights_NxN, bonds_NxN, 20, tempo=5)
    np.testing.assert_allclose(got.bonds_NxN[:2, 2], [0.95, 0.05])
    np.testing.assert_allclose(got.bonds_NxN[:2, 3], [0.5, 0.5])

  def test_without_a_permit_nothing_counts(self):
    weights_NxN = np.zeros((3, 3))
    weights_NxN[:2, 2] = 1
    weights_NxN[1, 0] = 1
    uids = make_uids([1, 9, 0], validators=[1, 0, 0])
    got = yuma.epoch(uids, weights_NxN, np.zeros((3, 3)), 10, tempo=5)
    np.testing.assert_array_equal(got.incentive_N, [0, 0, 1])
    np.testing.assert_array_equal(got.dividends_N, [1, 0, 0])
    np.testing.assert_array_equal(got.emission_N, [0.5, 0, 0.5])

  def test_nobody_speaks(self):
    none_NxN = np.zeros((2, 2))
    got = yuma.epoch(make_uids([1, 3]), none_NxN, none_NxN, 10, tempo=5)
    np.testing.assert_array_equal(got.emission_N, [0.25, 0.75])
    silent = make_uids([1, 3], validators=[0, 0])
    got = yuma.epoch(silent, none_NxN, none_NxN, 10, tempo=5)
    np.testing.assert_array_equal(got.emission_N, [0.25, 0.75])
    got = yuma.epoch(make_uids([0, 0]), none_NxN, none_NxN, 10, tempo=5)
    np.testing.assert_array_equal(got.emission_N, [0, 0])


class QuantizeTest(parameterized.TestCase):
  def test_as_the_sdk(self):
    # bittensor 11.3 sent [9362, 65535, 18724] for these.
    got = yuma.quantize({0: 1 / 7, 1: 1.0, 2: 2 / 7})
    self.assertEqual(got, {0: 9362, 1: 65535, 2: 18724})
    self.assertEqual(yuma.quantize({0: 1e-9, 1: 1.0}), {1: 65535})
    self.assertEqual(yuma.quantize({3: 5e-324}), {3: 65535})

  @parameterized.parameters(
    ({1: -0.1, 2: 1.0}, 'weight of uid 1: .* 0 or more, got -0.1'),
    ({1: float('nan')}, 'weight of uid 1: .* got nan'),
    ({1: float('inf')}, 'weight of uid 1: .* got inf'),
    ({}, 'expected one above 0, got 0 without'),
    ({1: 0.0}, 'expected one above 0, got 1 without'),
  )
  def test_refused(self, weights, message):
    with self.assertRaisesRegex(ValueError, message):
      yuma.quantize(weights)


SIZE = 6
MATRICES = hnp.arrays(
  np.float64, (SIZE, SIZE), elements=st.integers(0, 5).map(float)
)
STAKES = hnp.arrays(np.float64, SIZE, elements=st.integers(0, 9).map(float))
BLOCKS = hnp.arrays(np.int64, SIZE, elements=st.integers(0, 30))
MASKS = hnp.arrays(bool, SIZE)
QUICK = hypothesis.settings(deadline=None)


class PropertiesTest(parameterized.TestCase):
  @QUICK
  @hypothesis.given(STAKES, MASKS, BLOCKS, BLOCKS, MATRICES, MATRICES)
  def test_shares(self, stakes, validators, registered, updated, w, b):
    uids = yuma.Uids(stakes, validators, registered, updated)
    got = yuma.epoch(uids, w, b, block=30, tempo=10)
    for name, value in got._asdict().items():
      self.assertTrue(np.isfinite(value).all(), name)
      self.assertGreaterEqual(value.min(), 0, name)
    incentive, dividends = got.incentive_N.sum(), got.dividends_N.sum()
    self.assertAlmostEqual(incentive, round(incentive))
    self.assertAlmostEqual(incentive, dividends)
    self.assertAlmostEqual(got.emission_N.sum(), float(stakes.any()))
    self.assertLessEqual(got.trust_N.max(), 1 + 1e-9)
    sums_N = got.bonds_NxN.sum(axis=0)
    np.testing.assert_allclose(sums_N, np.round(sums_N), atol=1e-12)

  @QUICK
  @hypothesis.given(
    STAKES,
    MASKS,
    BLOCKS,
    BLOCKS,
    MATRICES,
    MATRICES,
    st.permutations(range(SIZE)),
  )
  def test_numbering_does_not_matter(
    self, stakes, validators, registered, updated, w, b, order
  ):
    uids = yuma.Uids(stakes, validators, registered, updated)
    got = yuma.epoch(uids, w, b, block=30, tempo=10)
    order = np.array(order)
    moved = yuma.epoch(
      yuma.Uids(*(x[order] for x in uids)),
      w[np.ix_(order, order)],
      b[np.ix_(order, order)],
      block=30,
      tempo=10,
    )
    for a, b in zip(got[:-1], moved[:-1], strict=True):
      np.testing.assert_allclose(b, a[order], atol=1e-12)
    np.testing.assert_allclose(
      moved.bonds_NxN, got.bonds_NxN[np.ix_(order, order)], atol=1e-12
    )

  @QUICK
  @hypothesis.given(
    MATRICES,
    hnp.arrays(np.float64, SIZE, elements=st.integers(1, 9).map(float)),
    st.integers(0, SIZE - 1),
    STAKES,
  )
  def test_a_minority_raises_nobody_above_the_others(
    self, w, stakes, liar, lies
  ):
    stakes = stakes / stakes.sum()
    hypothesis.assume(stakes[liar] < yuma.KAPPA)
    w = w.copy()
    w[liar] = lies
    uids = make_uids(stakes)
    got = yuma.epoch(uids, w, np.zeros((SIZE, SIZE)), block=9, tempo=3)
    np.fill_diagonal(w, 0)
    w /= np.maximum(w.sum(axis=1, keepdims=True), 1)
    highest_N = np.delete(w, liar, axis=0).max(axis=0)
    self.assertTrue((got.consensus_N <= highest_N + 1e-12).all())
    self.assertTrue((got.incentive_N[highest_N == 0] == 0).all())

  @QUICK
  @hypothesis.given(st.integers(1, 9), st.integers(0, 5), MATRICES)
  def test_a_copy_of_the_majority_is_paid_by_stake(self, stake, _, w):
    # Two validators that say the same are paid in the ratio of their stakes,
    # from the first epoch on.
    w = w.copy()
    w[:, :2] = 0
    w[1] = w[0]
    hypothesis.assume(w[0].any())
    uids = make_uids([10, stake, 0, 0, 0, 0])
    got = yuma.epoch(uids, w, np.zeros((SIZE, SIZE)), block=9, tempo=3)
    np.testing.assert_allclose(
      got.dividends_N[:2], np.array([10, stake]) / (10 + stake)
    )

  @QUICK
  @hypothesis.given(STAKES, MATRICES, st.floats(0.001, 1000))
  def test_units_do_not_matter(self, stakes, w, unit):
    zeros_NxN = np.zeros((SIZE, SIZE))
    got = yuma.epoch(make_uids(stakes), w, zeros_NxN, block=9, tempo=3)
    same = yuma.epoch(
      make_uids(stakes * unit), w * unit, zeros_NxN, block=9, tempo=3
    )
    for a, b in zip(got, same, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-9)


if __name__ == '__main__':
  absltest.main()
