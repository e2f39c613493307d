import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import batch
from covenant.optim import compression
from covenant.optim import quantize

SHAPES = [(16, 24), (24,), (16, 24), (2, 9, 8), (), (0,)]
TILES = compression.TopK(4, (8, 8))
PER_TENSOR = compression.TopK(4, (8, 8), quantize.Statistical())


def leaves_of(shapes):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


class BatchesTest(parameterized.TestCase):
  @parameterized.parameters(TILES, PER_TENSOR, compression.Dense())
  @pytest.mark.rows(1)
  def test_merge_inverts_split(self, one):
    leaves = leaves_of(SHAPES)
    found = batch.Batches(leaves, [one] * 6, [()] * 6)
    merged, doubled = found.merge(
      found.split(leaves), [2 * x for x in found.split(leaves)]
    )
    for got, want in zip(merged, leaves, strict=True):
      np.testing.assert_array_equal(got, want)
    for got, want in zip(doubled, leaves, strict=True):
      np.testing.assert_array_equal(got, 2 * want)

  def test_blocks_of_one_size_are_one_batch(self):
    leaves = leaves_of([(16, 24), (8, 16), (64,)])
    found = list(batch.Batches(leaves, [TILES] * 3, [()] * 3))
    self.assertLen(found, 1)
    self.assertEqual(found[0].shape, (6 + 2 + 1, 1, 64))
    np.testing.assert_array_equal(found[0].owners, [0] * 6 + [1] * 2 + [2])

  def test_sizes_are_one_batch_where_little_is_padded(self):
    leaves = leaves_of([(16, 24), (24,), (3,), (16, 24)])
    (one,) = batch.Batches(leaves, [TILES] * 4, [()] * 4)
    self.assertEqual(one.shape, (14, 1, 64))
    self.assertEqual([g.size for g in one.compression.groups], [64, 24, 3])
    np.testing.assert_array_equal(one.owners, [0] * 6 + [3] * 6 + [1, 2])
    leaves = leaves_of([(8, 8), *[(3,)] * 4])
    found = batch.Batches(leaves, [TILES] * 5, [()] * 5)
    self.assertEqual([b.shape for b in found], [(1, 1, 64), (4, 1, 3)])

  @pytest.mark.slow
  def test_of_blocks_the_message_is_that_of_the_leaves(self):
    leaves = leaves_of([(16, 24), (20, 9), (100,)])
    found = batch.Batches(leaves, [TILES] * 3, [()] * 3)
    sent = [
      b.compression.decompress(b.compression.compress(x[0]), b.shape)[None]
      for b, x in zip(found, found.split(leaves), strict=True)
    ]
    for got, x in zip(found.merge(sent)[0], leaves, strict=True):
      want = TILES.decompress(TILES.compress(x), x.shape)
      np.testing.assert_array_equal(got, want)

  def test_statistics_of_tensors_and_shards_stay_apart(self):
    leaves = leaves_of([(8, 8), (8, 8), (16, 8), (8, 8)])
    shards = [(), (), (), ('fsdp',)]
    found = list(batch.Batches(leaves, [PER_TENSOR] * 4, shards))
    self.assertEqual([b.elements for b in found], [2, 1, 1])
    self.assertEqual(found[2].axes, ('fsdp',))
    tiles = list(batch.Batches(leaves, [TILES] * 4, shards))
    self.assertEqual([b.shape[0] for b in tiles], [4, 1])

  def test_slices_of_one_size_are_one_function(self):
    x = jnp.ones((8, 64))
    leaves = [x] * 12
    found = batch.Batches(leaves, [TILES] * 12, [()] * 12)
    merge = jax.jit(found.merge).lower(found.split(leaves)).as_text()
    self.assertNotRegex(merge, r'stablehlo\.slice')


class OnceTest(absltest.TestCase):
  def test_is_computed_in_a_branch_of_its_own(self):
    x = jnp.arange(4.0)
    f = jax.jit(lambda x: batch.once(jnp.cumsum, x))
    np.testing.assert_array_equal(f(x), np.cumsum(x))
    np.testing.assert_array_equal(
      jax.vmap(f)(jnp.stack([x, x])), [np.cumsum(x)] * 2
    )
    self.assertIn('conditional(', f.lower(x).compile().as_text())


class EachTest(absltest.TestCase):
  def test_maps_over_rows(self):
    x = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(
      batch.each(jnp.sum, (x,)), np.asarray(x).sum(1)
    )
    np.testing.assert_array_equal(batch.each(jnp.sum, (x[:1],)), [1.0])


if __name__ == '__main__':
  absltest.main()
