"""Tests for covenant.train.pipeline.activation_quantization."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.train.pipeline import activation_quantization


def some(dtype='float32'):
  draw = np.random.default_rng(0)
  scale = 10.0 ** draw.integers(-6, 6, (3, 5, 1))
  return jnp.asarray(draw.normal(size=(3, 5, 6)) * scale, dtype)


class CoarseTest(parameterized.TestCase):
  @parameterized.product(bits=(4, 8), dtype=('float32', 'bfloat16'))
  def test_is_small_and_near(self, bits, dtype):
    c = some(dtype)
    packed = activation_quantization.pack(c, bits)
    self.assertEqual(
      sum(x.nbytes for x in packed),
      c.shape[0]
      * c.shape[1]
      * activation_quantization.position_bytes(c.shape[2], bits, dtype),
    )
    got = np.asarray(activation_quantization.unpack(packed, dtype), np.float64)
    self.assertEqual(activation_quantization.unpack(packed, dtype).dtype, dtype)
    # Half a step, and what the step and, in bfloat16, the result are rounded
    # by: 2^-8 of the largest.
    most = np.max(np.abs(np.asarray(c, np.float64)), -1, keepdims=True)
    bound = most * (0.5 / (2 ** (bits - 1) - 1) + 2**-7)
    gap = np.abs(got - np.asarray(c, np.float64))
    self.assertTrue(np.all(gap <= bound), gap / bound)

  @parameterized.parameters(4, 8)
  def test_every_code_is_told_apart(self, bits):
    most = 2 ** (bits - 1) - 1
    c = jnp.arange(-most, most + 1, dtype=jnp.float32) / 8
    c = jnp.concatenate([c, c[:1]])  # an even number
    got = activation_quantization.unpack(
      activation_quantization.pack(c, bits), c.dtype
    )
    np.testing.assert_array_equal(got, c)

  @parameterized.parameters(4, 8)
  def test_nothing_is_nothing(self, bits):
    zeros = jnp.zeros((2, 4))
    np.testing.assert_array_equal(
      activation_quantization.unpack(
        activation_quantization.pack(zeros, bits), zeros.dtype
      ),
      zeros,
    )

  @parameterized.parameters(0, 4, 8)
  def test_the_gradient_comes_back_as_it_went(self, bits):
    c, g = some(), some()[::-1]
    got, back = jax.vjp(lambda c: activation_quantization.passed(c, bits), c)
    for x, sent in ((got, c), (back(g)[0], g)):
      want = (
        activation_quantization.unpack(
          activation_quantization.pack(sent, bits), sent.dtype
        )
        if bits
        else sent
      )
      np.testing.assert_array_equal(x, want)


if __name__ == '__main__':
  absltest.main()
