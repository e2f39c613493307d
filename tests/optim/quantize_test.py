import pathlib

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import quantize

GOLDEN = pathlib.Path(__file__).parent.parent / 'golden' / 'quantizer.npz'
SOURCES = (
  'gauss', 'bimodal', 'smallscale', 'shifted', 'laplace', 'zeros', 'const',
  'two', 'pm', 'ramp',
)  # fmt: skip


class StatisticalTest(parameterized.TestCase):
  """Numbers measured from the reference system, described in templar.md 9."""

  @parameterized.product(source=SOURCES, bits=(2, 4, 8))
  def test_matches_the_reference_system(self, source, bits):
    with np.load(GOLDEN) as golden:
      want = {
        name: golden[f'{source}_b{2**bits}_{name}']
        for name in ('x', 'q', 'shift', 'lookup', 'deq')
      }
    values = jnp.asarray(want['x']).reshape(-1, want['x'].shape[-1])
    quantizer = quantize.Statistical(bits=bits)
    codes, scales = quantizer.encode(values)
    self.assertEqual(scales.shape, quantizer.scale_shape(values.shape[0]))
    if source in ('const', 'zeros'):
      # No spread: any bin decodes to the one value; rounding picks the bin.
      got = quantizer.decode(codes, scales)
      np.testing.assert_allclose(got, want['deq'].reshape(values.shape), 1e-6)
      return
    np.testing.assert_array_equal(codes, want['q'].reshape(values.shape))
    np.testing.assert_allclose(
      scales[0, 0], want['shift'], rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(
      quantizer.decode(codes, scales),
      want['deq'].reshape(values.shape),
      rtol=1e-5,
      atol=1e-6 * np.abs(want['x']).max(),
    )


class SignTest(parameterized.TestCase):
  def test_one_block_by_hand(self):
    values = jnp.array([[1.0, -3.0], [0.0, -2.0]])
    codes, scales = quantize.Sign().encode(values)
    np.testing.assert_array_equal(codes, [[1, 0], [1, 0]])
    np.testing.assert_array_equal(scales.astype(jnp.float32), [[2.0], [1.0]])
    np.testing.assert_array_equal(
      quantize.Sign().decode(codes, scales), [[2.0, -2.0], [1.0, -1.0]]
    )

  def test_sender_and_receiver_decode_with_the_rounded_scale(self):
    codes, scales = quantize.Sign().encode(jnp.full((1, 3), 1.001))
    self.assertEqual(scales.dtype, jnp.bfloat16)
    decoded = quantize.Sign().decode(codes, scales)
    np.testing.assert_array_equal(decoded, np.ones((1, 3)))


class ExactTest(absltest.TestCase):
  def test_keeps_every_bit(self):
    values = jnp.array([[1e-30, -3.14159]])
    np.testing.assert_array_equal(
      quantize.Exact().decode(*quantize.Exact().encode(values)), values
    )


if __name__ == '__main__':
  absltest.main()
