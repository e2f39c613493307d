import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import blocks

_SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=11)
_BLOCK = st.tuples(st.integers(1, 5), st.integers(1, 5))


class BlocksTest(parameterized.TestCase):
  @hypothesis.given(_SHAPES, _BLOCK, st.sampled_from(blocks.LAYOUTS))
  def test_join_inverts_cut_and_no_element_is_lost_or_padded(
    self, shape, block, layout
  ):
    try:
      regions = blocks.regions(shape, block, layout)
    except ValueError:
      hypothesis.reject()
    x = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    parts = blocks.cut(x, block, layout)  # NumPy: nothing to compile
    self.assertEqual(
      [p.shape for p in parts], [(r.num_blocks, r.block_size) for r in regions]
    )
    every = np.concatenate([np.ravel(p) for p in parts])
    np.testing.assert_array_equal(np.sort(every), np.ravel(x))
    np.testing.assert_array_equal(blocks.join(parts, shape, block, layout), x)

  def test_blocks_are_tiles_of_the_matrix_in_row_major_order(self):
    x = jnp.arange(24).reshape(4, 6)
    (tiles,) = blocks.cut(x, (2, 3))
    np.testing.assert_array_equal(
      tiles, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11],
              [12, 13, 14, 18, 19, 20], [15, 16, 17, 21, 22, 23]],
    )  # fmt: skip

  def test_a_stack_is_cut_matrix_by_matrix(self):
    x = jnp.arange(2 * 4 * 4).reshape(2, 4, 4)
    (tiles,) = blocks.cut(x, (4, 4))
    np.testing.assert_array_equal(tiles, x.reshape(2, 16))

  @parameterized.parameters((4096, 64), (64, 1), (1, 1), (32, 1), (96, 2))
  def test_density_is_that_of_a_full_block(self, size, expected):
    self.assertEqual(blocks.block_k(64, (64, 64), size), expected)

  @parameterized.parameters((4096, 64), (64, 64), (50, 50), (2, 2), (3, 2))
  def test_divisors_keep_an_even_k_of_blocks_of_any_size(self, size, expected):
    got = blocks.block_k(64, (64, 64), size, 'divisors')
    self.assertEqual(got, expected)

  @parameterized.product(
    shape=[(0,), (0, 16), (16, 0), (0, 16, 8)], layout=blocks.LAYOUTS
  )
  def test_a_leaf_without_values_has_no_regions(self, shape, layout):
    self.assertEqual(blocks.regions(shape, (4, 4), layout), ())
    joined = blocks.join((), shape, (4, 4), layout)
    self.assertEqual(joined.shape, shape)

  def test_divisors_say_which_leaf_they_cannot_cut(self):
    with self.assertRaisesRegex(ValueError, r'shape \(127,\) has no divisor'):
      blocks.regions((127,), (64, 64), 'divisors')


if __name__ == '__main__':
  absltest.main()
