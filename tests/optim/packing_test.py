"""Tests for covenant.optim.packing: words of messages, and their size."""

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

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

  @pytest.mark.slow
  def test_unpacks_leaves_of_all_sizes_together(self):
    top = compression_lib.TopK
    chosen = [
      (top(), (100, 70)),
      (top(k=3, block=(2, 5)), (7, 5)),
      (top(quantizer=quantize.Exact()), (64,)),
      (compression_lib.Dense(), (5,)),
      (top(), ()),
    ]
    parts, words = zip(*(words_of(*one) for one in chosen), strict=True)
    unpack = jax.jit(
      lambda words: packing.unpack_all(words, *zip(*chosen, strict=True))
    )
    found = unpack(words)
    self.assertEqual(jax.tree.structure(found), jax.tree.structure(list(parts)))
    jax.tree.map(np.testing.assert_array_equal, found, list(parts))

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
