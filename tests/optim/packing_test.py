"""Tests for covenant.optim.packing: words of messages, and their size."""

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import block_groups
from covenant.optim import compression as compression_lib
from covenant.optim import packing
from covenant.optim import quantize

SHAPES = (100, 70), (2, 64, 64), (64,), (), (0, 3)
QUANTIZERS = (
  quantize.Sign(),
  quantize.SignMagnitude(),
  quantize.Statistical(bits=8),
  quantize.Exact(),
)


def words_of(compression, shape):
  x = jax.random.normal(jax.random.key(0), shape)
  part = jax.jit(compression.compress)(x)
  pack = jax.jit(lambda part: packing.pack(part, compression, shape))
  return part, pack(part)


class PackingTest(parameterized.TestCase):
  @parameterized.product(
    compression=[
      *(compression_lib.TopK(quantizer=q) for q in QUANTIZERS),
      compression_lib.TopK(k=3, block=(2, 5)),
      compression_lib.TopK(k=64, block=(8, 8)),  # all values
      compression_lib.TopK(k=4, block=(8, 8), layout='divisors'),
      compression_lib.Dense(),
    ]
  )
  @pytest.mark.slow
  def test_unpacks_what_was_packed(self, compression):
    for shape in SHAPES:
      divisors = getattr(compression, 'layout', '') == 'divisors'
      if divisors and min(shape, default=1) < 2:
        continue  # which it cannot cut
      part, words = words_of(compression, shape)
      self.assertEqual(words.dtype, np.uint32)
      unpack = jax.jit(
        lambda words, shape=shape: packing.unpack(words, compression, shape)
      )
      back = unpack(words)
      self.assertEqual(jax.tree.structure(back), jax.tree.structure(part))
      for want, got in zip(
        jax.tree.leaves(part), jax.tree.leaves(back), strict=True
      ):
        self.assertEqual(got.dtype, want.dtype)
        np.testing.assert_array_equal(got, want)

  @parameterized.parameters(quantize.Sign(), quantize.Exact())
  @pytest.mark.slow
  def test_blocks_of_several_sizes_take_no_more(self, quantizer):
    groups = tuple(
      block_groups.Group(*g) for g in [(3, 64, 8), (2, 20, 3), (1, 2, 1)]
    )
    one = block_groups.BlockGroups(groups, quantizer)
    part, words = words_of(one, one.shape)
    back = jax.jit(lambda w: packing.unpack(w, one, one.shape))(words)
    jax.tree.map(np.testing.assert_array_equal, back, part)
    alone = [block_groups.BlockGroups((g,), quantizer) for g in groups]
    sizes = [words_of(x, x.shape)[1].size for x in alone]
    self.assertLessEqual(words.size, sum(sizes))

  @parameterized.parameters(
    (quantize.Sign(), 9.5), (quantize.SignMagnitude(), 10.5),
    (quantize.Statistical(), 10.5),
  )  # fmt: skip
  def test_bits_per_value(self, quantizer, most):
    compression = compression_lib.TopK(quantizer=quantizer)
    _, words = words_of(compression, (512, 512))
    self.assertLessEqual(32 * words.size / (512 * 512 / 64), most)


if __name__ == '__main__':
  absltest.main()
