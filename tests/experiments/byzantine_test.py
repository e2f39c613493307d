"""Tests of the rules of robust aggregation that experiments compare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import compression
from covenant.optim import reduce
from covenant.optim import sparseloco
from experiments import byzantine

HONEST = 1 + 0.1 * jax.random.normal(jax.random.key(0), (byzantine.PEERS, 50))
BAD = HONEST.at[-byzantine.BAD :].set(-100.0)


class RulesTest(parameterized.TestCase):
  @parameterized.parameters('Krum', 'trimmed mean', 'geometric median', 'ours')
  def test_two_attackers_move_it_little(self, rule):
    calm = byzantine.RULES[rule](HONEST, [0])
    found = byzantine.RULES[rule](BAD, [0])
    # Of the sum of eight, two that are clipped take at most four back.
    self.assertGreater(float(found.mean()), 0.45 * float(calm.mean()))
    self.assertLess(float(jnp.abs(calm - 1).max()), 0.4)

  def test_the_mean_is_anybodys(self):
    self.assertLess(float(byzantine.mean(BAD, [0]).mean()), -20)

  def test_krum_takes_an_honest_message_as_it_is(self):
    found = byzantine.krum(BAD, [0])
    honest = HONEST[: -byzantine.BAD]
    self.assertTrue(bool(jnp.any(jnp.all(found[None] == honest, axis=1))))

  @pytest.mark.slow
  def test_ours_is_the_aggregation_of_the_nodes(self):
    like = {'a': jnp.zeros((64, 64)), 'b': jnp.zeros((40,))}
    top = compression.TopK()
    keys = jax.random.split(jax.random.key(1), byzantine.PEERS)
    deltas = [
      jax.tree.map(
        lambda x, k=k, i=i: (1 + 5 * i) * jax.random.normal(k, x.shape), like
      )
      for i, k in enumerate(keys)
    ]
    messages = [sparseloco.compress(d, None, top, None)[0] for d in deltas]
    expected = reduce.aggregate(messages, like, top)
    dense = [sparseloco.decompress(m, like, top) for m in messages]
    rows = [
      jnp.concatenate([x.ravel() for x in jax.tree.leaves(d)]) for d in dense
    ]
    found = byzantine.clipped(jnp.stack(rows), [0, 64 * 64])
    flat = [x.ravel() for x in jax.tree.leaves(expected)]
    np.testing.assert_allclose(
      found, jnp.concatenate(flat), rtol=1e-5, atol=1e-4
    )


if __name__ == '__main__':
  absltest.main()
