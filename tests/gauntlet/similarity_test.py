import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from covenant.gauntlet import similarity
from covenant.optim import compression as compression_lib
from covenant.optim import sparseloco

LIKE = {
  'matrix': jax.ShapeDtypeStruct((64, 64), jnp.float32),
  'vector': jax.ShapeDtypeStruct((64,), jnp.float32),
}
COMPRESSION = compression_lib.TopK(k=8, block=(16, 16))


@functools.partial(jax.jit, static_argnames='compression')
def compress(delta, compression):
  return sparseloco.compress(delta, None, compression, None)[0]


def message(seed, compression=COMPRESSION, common=None, share=0.0):
  """Returns the message of a random delta that shares values with `common`."""
  draw = np.random.default_rng(seed)
  delta = {
    name: jnp.asarray(draw.normal(size=x.shape), jnp.float32)
    for name, x in LIKE.items()
  }
  if common is not None:
    delta = jax.tree.map(
      lambda a, b: share * a + (1 - share) * b, common, delta
    )
  sent = compress(delta, compression)
  return delta, jax.tree.map(np.asarray, sent)


class OverlapTest(absltest.TestCase):
  def similarities(self, messages, compression=COMPRESSION):
    sketcher = similarity.Sketcher(LIKE, compression)
    sketch_RxW = sketcher.sketch(dict(enumerate(messages)), b'seed')
    others = ~np.eye(len(messages), dtype=bool)
    shares = similarity.shared_fractions(sketch_RxW, sketch_RxW)
    return shares, similarity.similarities(shares, others)

  def test_chance(self):
    shares, alike = self.similarities([message(i)[1] for i in range(8)])
    others = ~np.eye(8, dtype=bool)
    self.assertAlmostEqual(shares[others].mean(), 8 / 256, delta=0.02)
    self.assertLess(np.abs(alike).max(), 0.2)

  def test_what_all_share_is_not_suspicious(self):
    common, _ = message(99)
    messages = [message(i, common=common, share=0.8)[1] for i in range(8)]
    shares, alike = self.similarities(messages)
    self.assertGreater(shares.min(), 0.5)
    self.assertLess(alike.max(), 0.5)

  def test_copy_stands_out_even_in_a_clique_of_two_thirds(self):
    copied = message(0)[1]
    messages = [copied] * 4 + [message(i)[1] for i in range(1, 3)]
    _, alike = self.similarities(messages)
    self.assertAlmostEqual(alike[0, 1], 1.0)
    self.assertLess(alike[0, 4:].max(), 0.3)

  def test_a_clique_does_not_pass_for_usual(self):
    overlaps = np.full((6, 6), 0.1)
    overlaps[:4, :4] = 0.8
    alike = similarity.similarities(overlaps, ~np.eye(6, dtype=bool))
    self.assertAlmostEqual(alike[0, 1], 7 / 9)

  @pytest.mark.slow
  def test_noise_on_the_values_hides_nothing(self):
    delta, original = message(0)
    noise = np.random.default_rng(1)
    kept = sparseloco.decompress(original, LIKE, COMPRESSION)
    noisy = jax.tree.map(
      lambda x: x * np.float32(1 + 0.3 * noise.normal(size=x.shape)), kept
    )
    copied = compress(noisy, COMPRESSION)
    others = [message(i)[1] for i in range(2, 6)]
    _, alike = self.similarities([original, copied, *others])
    self.assertGreater(alike[0, 1], 0.9)

  def test_with_few_peers_only_near_equality_counts(self):
    common, _ = message(99)
    alone = [message(i, common=common, share=0.7)[1] for i in range(2)]
    shares, alike = self.similarities(alone)
    self.assertGreater(shares[0, 1], 0.3)
    self.assertLess(alike[0, 1], 0.5)
    _, alike = self.similarities([alone[0], alone[0]])
    self.assertAlmostEqual(alike[0, 1], 1.0)

  def test_vectors_are_left_out(self):
    sent = message(0)[1]
    other = message(1)[1]
    mixed = {'matrix': other['matrix'], 'vector': sent['vector']}
    sketcher = similarity.Sketcher(LIKE, COMPRESSION)
    sketch = sketcher.sketch({0: other, 1: mixed}, b'')
    np.testing.assert_array_equal(sketch[0], sketch[1])

  def test_dense_messages_compare_signs(self):
    dense = compression_lib.Dense()
    messages = [message(i, dense)[1] for i in range(5)]
    shares, alike = self.similarities([*messages, messages[0]], dense)
    self.assertAlmostEqual(shares[0, 1], 0.5, delta=0.05)
    self.assertAlmostEqual(alike[0, 5], 1.0)

  def test_the_seed_decides_the_blocks(self):
    like = {'w': jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    draw = np.random.default_rng(0)
    delta = {'w': jnp.asarray(draw.normal(size=(256, 256)), jnp.float32)}
    sent = compress(delta, COMPRESSION)
    sketcher = similarity.Sketcher(like, COMPRESSION)
    first, again, other = (
      sketcher.sketch({0: sent}, seed) for seed in (b'1', b'1', b'2')
    )
    np.testing.assert_array_equal(first, again)
    self.assertFalse(np.array_equal(first, other))
    count = np.bitwise_count(first).sum()
    self.assertEqual(count, similarity.MAX_BLOCKS * 8)


if __name__ == '__main__':
  absltest.main()
