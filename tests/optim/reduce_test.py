import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from covenant.optim import compression
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import weight

EXACT = compression.TopK(k=2, block=(2, 2), quantizer=quantize.Exact())


def message(indices, values):
  """A message of one vector of four elements."""
  return {
    'w': (
      compression.Packet(
        jnp.array([indices]), jnp.array([values]), jnp.zeros((0, 0))
      ),
    )
  }


class MemoryTest(absltest.TestCase):
  def test_one_more_peer_takes_its_message_and_less_than_a_dense_leaf(self):
    """Beside the sum: the count of senders, and what XLA takes to add."""
    like = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    compressor = compression.TopK()
    part = jax.eval_shape(compressor.compress, like)
    sums = jax.eval_shape(lambda: compressor.start(like.shape))
    add = jax.jit(
      lambda sums, part: reduce.add(sums, part, jnp.ones(()), compressor),
      donate_argnums=0,
    )
    plan = add.lower(sums, part).compile().memory_analysis()
    dense = 4 * like.size
    count = sum(x.size * x.dtype.itemsize for x in sums.senders)
    self.assertEqual(count, dense // 2)
    self.assertEqual(plan.alias_size_in_bytes, dense + count)  # in place
    self.assertLess(plan.temp_size_in_bytes + count, dense)


class AggregateTest(absltest.TestCase):
  LIKE = {'w': jnp.zeros(4)}

  def test_mean_over_senders_by_hand(self):
    messages = [message([0, 1], [2.0, 4.0]), message([1, 3], [8.0, 1.0])]
    got = reduce.aggregate(messages, self.LIKE, EXACT, clip='none')
    np.testing.assert_array_equal(got['w'], [2.0, 6.0, 0.0, 1.0])

  def test_mean_over_all_by_hand(self):
    messages = [message([0, 1], [2.0, 4.0]), message([1, 3], [8.0, 1.0])]
    got = reduce.aggregate(messages, self.LIKE, EXACT, 'all', 'none')
    np.testing.assert_array_equal(got['w'], [1.0, 6.0, 0.0, 0.5])

  def test_a_giant_counts_as_much_as_the_median(self):
    messages = [
      message([0, 1], [3.0, 4.0]),
      message([0, 1], [3.0, 4.0]),
      message([0, 1], [3e4, 4e4]),
    ]
    got = reduce.aggregate(messages, self.LIKE, EXACT)
    np.testing.assert_allclose(got['w'], [3.0, 4.0, 0.0, 0.0], rtol=1e-6)

  def test_of_two_peers_the_lower_norm_is_the_median(self):
    factors = reduce.clip_factors(jnp.array([[1.0], [4.0]]))
    np.testing.assert_allclose(factors, [[1.0], [0.25]], rtol=1e-6)

  def test_by_tokens_over_senders_and_over_all(self):
    """A quarter of the training counts a quarter."""
    messages = [message([0, 1], [2.0, 4.0]), message([1, 3], [8.0, 1.0])]
    weights = [weight.weigh('tokens', n, 80) for n in (80, 20)]
    for over, want in (
      ('senders', [2.0, (4.0 + 0.25 * 8.0) / 1.25, 0.0, 0.25 / 0.625]),
      ('all', [2.0 / 1.25, (4.0 + 0.25 * 8.0) / 1.25, 0.0, 0.25 / 1.25]),
    ):
      got = reduce.aggregate(
        messages, self.LIKE, EXACT, over, 'none', weights=weights
      )
      np.testing.assert_allclose(got['w'], want, rtol=1e-6, err_msg=over)

  def test_who_trained_on_more_may_be_longer_and_nobody_else(self):
    norms_RxP = jnp.array([[1.0], [2.0], [8.0], [8.0]])
    factors = reduce.clip_factors(
      norms_RxP, sizes_R=np.array([5, 10, 40, 10], np.float32)
    )
    np.testing.assert_allclose(factors[:, 0], [1, 1, 1, 0.25], rtol=1e-6)
    # Nor does a claim of nothing make anybody else's longer.
    factors = reduce.clip_factors(
      norms_RxP, sizes_R=np.array([10, 10, 1, 10], np.float32)
    )
    np.testing.assert_allclose(factors[:, 0], [1, 1, 0.25, 0.25], rtol=1e-6)

  def test_nobody_moves_nothing(self):
    got = reduce.aggregate([], self.LIKE, EXACT)
    np.testing.assert_array_equal(got['w'], np.zeros(4))

  def test_dense_messages_are_averaged(self):
    messages = [{'w': jnp.full(4, 1.0)}, {'w': jnp.full(4, 4.0)}]
    for over in ('all', 'senders'):
      got = reduce.aggregate(
        messages, self.LIKE, compression.Dense(), over, 'none'
      )
      np.testing.assert_array_equal(got['w'], np.full(4, 2.5))


if __name__ == '__main__':
  absltest.main()
