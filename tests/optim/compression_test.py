import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import compression
from covenant.optim import quantize

EXACT = compression.TopK(k=1, block=(2, 2), quantizer=quantize.Exact())
SIGN = compression.TopK(k=2, block=(2, 2), quantizer=quantize.Sign())
# Two blocks side by side.
X_2x4 = np.float32([[1, -2, 0, 3], [0, 1, 4, -5]])


class TopKTest(parameterized.TestCase):
  def test_the_largest_of_each_block_by_hand(self):
    (packet,) = EXACT.compress(X_2x4)
    np.testing.assert_array_equal(packet.indices, [[1], [3]])
    np.testing.assert_array_equal(packet.codes, [[-2], [-5]])
    np.testing.assert_array_equal(
      EXACT.decompress((packet,), X_2x4.shape), [[0, -2, 0, 0], [0, 0, 0, -5]]
    )

  def test_a_side_that_does_not_divide_gives_a_region_of_its_own(self):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole, rest = EXACT.compress(x)
    np.testing.assert_array_equal(whole.codes, [[4]])
    np.testing.assert_array_equal(rest.codes, [[5]])
    np.testing.assert_array_equal(
      EXACT.decompress((whole, rest), x.shape), [[0, 0, 0], [0, 4, 5]]
    )

  @parameterized.parameters(EXACT, SIGN)
  def test_values_have_the_norm_of_what_they_stand_for(self, compressor):
    part = compressor.compress(X_2x4)
    values = np.concatenate([np.ravel(v) for v in compressor.values(part)])
    np.testing.assert_allclose(
      np.linalg.norm(values),
      np.linalg.norm(compressor.decompress(part, X_2x4.shape)),
      rtol=1e-6,
    )

  def test_codes_are_counted(self):
    part = SIGN.compress(X_2x4)
    counts = SIGN.code_counts(part)
    self.assertEqual(SIGN.num_codes, 2)
    # Of the four values sent, -2, 1, 4 and -5, two are negative.
    self.assertEqual(counts.tolist(), [2, 2])
    self.assertEqual(EXACT.num_codes, 0)
    self.assertEmpty(EXACT.code_counts(EXACT.compress(X_2x4)))

  def test_peers_are_summed_and_counted_where_they_sent(self):
    sums = EXACT.start(X_2x4.shape)
    total, senders = sums
    for x, weight in ((X_2x4, 1), (-3 * X_2x4[::-1], 2)):
      part = EXACT.compress(x)
      total = EXACT.scatter_add(total, part, EXACT.values(part))
      senders = EXACT.count(senders, part, weight)
    np.testing.assert_array_equal(
      EXACT.join(total, X_2x4.shape), [[0, -2, 0, 15], [0, 6, 0, -5]]
    )
    np.testing.assert_array_equal(
      EXACT.join(senders, X_2x4.shape), [[0, 1, 0, 2], [0, 2, 0, 1]]
    )

  def test_an_index_sent_twice_counts_twice(self):
    indices = jnp.uint16([[3, 3]])
    part = (compression.Packet(indices, jnp.float32([[1, 2]]), None),)
    total, senders = EXACT.start((2, 2))
    (got,) = EXACT.scatter_add(total, part, [part[0].codes])
    (count,) = EXACT.count(senders, part, 1)
    self.assertEqual(got.tolist(), [[0, 0, 0, 3]])
    self.assertEqual(count.tolist(), [[0, 0, 0, 2]])

  def test_an_unknown_layout_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "layout: .*'tiles'.* got 'rows'"):
      compression.TopK(layout='rows')


class DenseTest(absltest.TestCase):
  def test_a_leaf_is_its_own_message(self):
    dense = compression.Dense()
    part = dense.compress(jnp.asarray(X_2x4))
    np.testing.assert_array_equal(dense.decompress(part, X_2x4.shape), X_2x4)
    self.assertEmpty(dense.code_counts(part))
    total, senders = dense.start(X_2x4.shape)
    for _ in range(2):
      total = dense.scatter_add(total, part, dense.values(part))
      senders = dense.count(senders, part, 3)
    np.testing.assert_array_equal(dense.join(total, X_2x4.shape), 2 * X_2x4)
    self.assertEqual(senders[0], 6)


if __name__ == '__main__':
  absltest.main()
