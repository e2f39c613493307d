"""Tests for covenant.optim.batch_sums."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from covenant.optim import batch
from covenant.optim import batch_sums
from covenant.optim import compression
from covenant.optim import reduce
from covenant.optim import weight

PARTS = np.array([64, 16, 0], np.uint16)
TILES = compression.TopK(4, (8, 8))


class MeansTest(absltest.TestCase):
  def test_each_leaf_has_the_sum_of_its_messages_and_the_step(self):
    deltas = [
      jax.random.normal(jax.random.key(r), (16, 8)) for r in range(len(PARTS))
    ]
    like = [jnp.zeros((16, 8)), jnp.zeros(24)]
    trees = [[d, d.reshape(-1)[:24]] for d in deltas]
    (one,) = found = batch.Batches(like, [TILES] * 2, [()] * 2)
    parts = [one.compression.compress(found.split(t)[0][0]) for t in trees]
    message = jax.tree.map(lambda *x: jnp.stack(x)[None], *parts)
    factors = jnp.array([[1.0, 0.5], [0.25, 1.0], [0.0, 0.0]])
    means = batch_sums.means(
      found, [message], [jax.vmap(jax.vmap(one.compression.values))(message)],
      factors, jnp.asarray(PARTS, jnp.int32), 'senders', lambda x: -x,
    )  # fmt: skip
    totals = weight.totals(PARTS)
    for i, got in enumerate(found.merge(means)[0]):
      want = reduce.reduce(
        [TILES.compress(t[i]) for t in trees],
        factors[:, i], PARTS, totals, like[i].shape, TILES,
      )  # fmt: skip
      np.testing.assert_array_equal(got, -want)


if __name__ == '__main__':
  absltest.main()
