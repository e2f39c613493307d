import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.optim import sparseloco
from covenant.pool import deltas as deltas_lib
from covenant.pool import leases as leases_lib
from tests import helpers

LIKE = {
  'a': jax.ShapeDtypeStruct((64, 64), jnp.float32),
  'b': jax.ShapeDtypeStruct((128,), jnp.float32),
}
Verdict = deltas_lib.LeaseVerdict


@functools.cache
def common():
  config = config_lib.load(f'{helpers.CONFIGS}/tiny.py')
  merger = deltas_lib.Merger(config, LIKE)
  return config, merger, deltas_lib.Inspector(config, LIKE, merger)


def dense(number, direction=0.5, noise=1.0):
  """A common direction, and noise of this lease."""
  draw = np.random.default_rng(number)
  return {
    name: np.float32(direction + noise * draw.standard_normal(x.shape))
    for name, x in LIKE.items()
  }


def compress(tree):
  compression = deltas_lib.compression(common()[0])
  return jax.device_get(sparseloco.compress(tree, None, compression, None)[0])


def message(number, **kwargs):
  return compress(dense(number, **kwargs))


def flipped(number):
  return compress(jax.tree.map(np.negative, dense(number)))


def delta(number, content, at=0.0):
  lease = leases_lib.Lease(number, f'w{number}', number, 1, 1, 0.0, 1.0)
  return deltas_lib.Delta(lease, content, 1.0, at)


class MergerTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    _, self.merger, _ = common()
    self.params = jax.tree.map(lambda x: jnp.ones(x.shape), LIKE)

  def test_without_deltas_the_parameters_stay(self):
    self.assertIs(self.merger.merge(self.params, [], []), self.params)

  @pytest.mark.slow
  def test_one_delta_is_subtracted(self):
    sent = message(0)
    compression = deltas_lib.compression(common()[0])
    moved = sparseloco.decompress(sent, LIKE, compression)
    merged = self.merger.merge(self.params, [sent], [3], scale=0.5)
    for name in LIKE:
      np.testing.assert_allclose(
        merged[name], self.params[name] - 0.5 * moved[name], atol=1e-6
      )

  def test_sequences_are_weights(self):
    """One and three sequences of opposite directions: half of the second."""
    merged = self.merger.merge(self.params, [message(0), flipped(0)], [1, 3])
    alone = self.merger.merge(self.params, [flipped(0)], [4], scale=0.5)
    for name in LIKE:
      np.testing.assert_allclose(merged[name], alone[name], atol=1e-6)


class InspectorTest(absltest.TestCase):
  def inspect(self, *others):
    honest = [delta(n, message(n)) for n in range(6)]
    draw = np.random.default_rng(0)
    return common()[2].inspect([*honest, *others], draw)

  def test_honest_deltas_are_valid(self):
    self.assertEqual(self.inspect(), dict.fromkeys(range(6), Verdict.VALID))

  def test_one_of_each_fault(self):
    found = self.inspect(
      delta(10, message(10, direction=-0.5)),
      delta(11, message(11, direction=0.0)),
      delta(12, message(3), at=1.0),
      delta(13, message(13, direction=50.0)),
      delta(14, message(14, direction=0.005, noise=0.01)),
    )
    self.assertEqual(found[10], Verdict.APART)
    self.assertEqual(found[11], Verdict.APART)
    self.assertEqual(found[12], Verdict.COPY)
    self.assertEqual(found[13], Verdict.HUGE)
    self.assertEqual(found[14], Verdict.TINY)
    self.assertEqual({found[n] for n in range(6)}, {Verdict.VALID})

  def test_a_recomputation_agrees_with_itself_only(self):
    inspector = common()[2]
    self.assertTrue(inspector.agrees(message(0), message(0)))
    self.assertFalse(inspector.agrees(message(0), message(1)))


if __name__ == '__main__':
  absltest.main()
