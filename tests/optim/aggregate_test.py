import pathlib

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import aggregate
from covenant.optim import compression
from covenant.optim import quantize
from covenant.optim import sparseloco

GOLDEN = (
  pathlib.Path(__file__).parent.parent / 'golden' / 'aggregate_outer_step.npz'
)
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


class AggregateTest(parameterized.TestCase):
  LIKE = {'w': jnp.zeros(4)}

  def test_mean_over_senders_by_hand(self):
    messages = [message([0, 1], [2.0, 4.0]), message([1, 3], [8.0, 1.0])]
    got = aggregate.aggregate(messages, self.LIKE, EXACT, clip='none')
    np.testing.assert_array_equal(got['w'], [2.0, 6.0, 0.0, 1.0])

  def test_mean_over_all_by_hand(self):
    messages = [message([0, 1], [2.0, 4.0]), message([1, 3], [8.0, 1.0])]
    got = aggregate.aggregate(messages, self.LIKE, EXACT, 'all', 'none')
    np.testing.assert_array_equal(got['w'], [1.0, 6.0, 0.0, 0.5])

  def test_a_giant_counts_as_much_as_the_median(self):
    messages = [
      message([0, 1], [3.0, 4.0]),
      message([0, 1], [3.0, 4.0]),
      message([0, 1], [3e4, 4e4]),
    ]
    got = aggregate.aggregate(messages, self.LIKE, EXACT)
    np.testing.assert_allclose(got['w'], [3.0, 4.0, 0.0, 0.0], rtol=1e-6)

  def test_of_two_peers_the_lower_norm_is_the_median(self):
    factors = aggregate.clip_factors(jnp.array([[1.0], [4.0]]))
    np.testing.assert_allclose(factors, [[1.0], [0.25]], rtol=1e-6)

  def test_nobody_moves_nothing(self):
    got = aggregate.aggregate([], self.LIKE, EXACT)
    np.testing.assert_array_equal(got['w'], np.zeros(4))

  def test_dense_messages_are_averaged(self):
    messages = [{'w': jnp.full(4, 1.0)}, {'w': jnp.full(4, 4.0)}]
    for over in ('all', 'senders'):
      got = aggregate.aggregate(
        messages, self.LIKE, compression.Dense(), over, 'none'
      )
      np.testing.assert_array_equal(got['w'], np.full(4, 2.5))

  @parameterized.parameters(1, 2, 3, 4, 5)
  def test_matches_the_reference_system(self, peers):
    """Aggregate and outer step (lr 0.4) measured from it, templar.md 3.9."""
    with np.load(GOLDEN) as golden:
      z = {k: golden[k] for k in golden if k.startswith(f'n{peers}_')}
    like = {n: jnp.asarray(z[f'n{peers}_{n}_before']) for n in ('b', 'w')}
    dense = compression.TopK(k=64, block=(64, 64), quantizer=quantize.Exact())
    # The reference cuts vectors in runs of 64 and sends all of each; in ours
    # a run is 4096 long. An all-zero padding of what was not sent would count
    # as sent, so each leaf is aggregated in the layout it came in.
    got, norms = {}, {}
    for name in like:
      packets = []
      for r in range(peers):
        indices = z[f'n{peers}_{name}_peer{r}_idx'].reshape(-1, 64)
        values = z[f'n{peers}_{name}_peer{r}_val'].reshape(-1, 64)
        order = np.argsort(indices, axis=1)
        packets.append(
          (
            compression.Packet(
              jnp.asarray(np.take_along_axis(indices, order, 1)),
              jnp.asarray(np.take_along_axis(values, order, 1)),
              jnp.zeros((0, 0)),
            ),
          )
        )
      norms[name] = jnp.stack([dense.norm(p) for p in packets])
      np.testing.assert_allclose(
        norms[name], z[f'n{peers}_{name}_norms'], rtol=1e-6
      )
      factors = aggregate.clip_factors(norms[name][:, None])[:, 0]
      size = 4096 if name == 'w' else 64
      zeros = jnp.zeros((packets[0][0].indices.shape[0], size))
      sums = compression.Sums((zeros,), (zeros,))
      for packet, factor in zip(packets, factors, strict=True):
        sums = dense.add(sums, packet, factor)
      mean = sums.total[0] / jnp.maximum(sums.senders[0], 1)
      if name == 'w':
        got[name] = dense.join([mean], like[name].shape)
      else:
        got[name] = mean.reshape(like[name].shape)
      want = z[f'n{peers}_{name}_agg']
      # Sums of both signs cancel: 1e-6 of the largest, not of each.
      np.testing.assert_allclose(
        got[name], want, atol=1e-6 * np.abs(want).max()
      )
    outer = sparseloco.nesterov(0.4)
    after, _ = sparseloco.outer_update(outer, got, outer.init(like), like)
    for name in like:
      np.testing.assert_allclose(
        after[name], z[f'n{peers}_{name}_after'], rtol=1e-6, atol=1e-7
      )


if __name__ == '__main__':
  absltest.main()
