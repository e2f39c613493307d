import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import exact
from covenant.optim import quantize
from tests import helpers

GOLDEN = helpers.GOLDEN / 'quantizer.npz'
# One program a shape and quantizer, not one an operation and test.
ENCODE = jax.jit(
  lambda quantizer, values: quantizer.encode(values), static_argnums=0
)
DECODE = jax.jit(
  lambda quantizer, *message: quantizer.decode(*message), static_argnums=0
)
SOURCES = (
  'gauss', 'bimodal', 'smallscale', 'shifted', 'laplace', 'zeros', 'const',
  'two', 'pm', 'ramp',
)  # fmt: skip


class StatisticalTest(parameterized.TestCase):
  """Numbers measured from the reference system, described in templar.md 9."""

  @parameterized.product(source=SOURCES, bits=(2, 4, 8))
  @pytest.mark.rows(6)
  def test_matches_the_reference_system(self, source, bits):
    with np.load(GOLDEN) as golden:
      want = {
        name: golden[f'{source}_b{2**bits}_{name}']
        for name in ('x', 'q', 'shift', 'lookup', 'deq')
      }
    values = jnp.asarray(want['x']).reshape(-1, want['x'].shape[-1])
    quantizer = quantize.Statistical(bits=bits)
    codes, scales = ENCODE(quantizer, values)
    self.assertEqual(scales.shape, quantizer.scale_shape(values.shape[0]))
    if source in ('const', 'zeros'):
      # No spread: any bin decodes to the one value; rounding picks the bin.
      got = DECODE(quantizer, codes, scales)
      np.testing.assert_allclose(got, want['deq'].reshape(values.shape), 1e-6)
      return
    np.testing.assert_array_equal(codes, want['q'].reshape(values.shape))
    # Means of both signs cancel: 1e-6 of the largest value.
    atol = 1e-6 * np.abs(want['x']).max()
    np.testing.assert_allclose(scales[0, 0], want['shift'], 1e-6, atol)
    np.testing.assert_allclose(scales[0, 1:], want['lookup'], 1e-6, atol)
    np.testing.assert_allclose(
      DECODE(quantizer, codes, scales),
      want['deq'].reshape(values.shape),
      rtol=1e-6,
      atol=atol,
    )

  @parameterized.parameters(0.0, 3.0)
  def test_one_value_is_its_own_codebook(self, value):
    """The deviation of one value is 0 / 0: the width becomes 1."""
    quantizer = quantize.Statistical()
    codes, scales = quantizer.encode(jnp.full((1, 1), value))
    np.testing.assert_array_equal(codes, [[2]])
    np.testing.assert_array_equal(quantizer.decode(codes, scales), [[value]])


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

  def test_one_scale_a_tensor(self):
    quantizer = quantize.Sign(per='tensor')
    codes, scales = quantizer.encode(jnp.array([[1.0, -3.0], [2.0, -2.0]]))
    self.assertEqual(scales.shape, quantizer.scale_shape(2))
    got = quantizer.decode(codes, scales)
    np.testing.assert_array_equal(got, [[2.0, -2.0], [2.0, -2.0]])


class LinearTest(absltest.TestCase):
  def test_decodes_to_the_grid(self):
    """The deviation of +-2, four times each, is sqrt(32 / 7), not 2."""
    values = jnp.array([[2.0, -2.0] * 4])
    quantizer = quantize.Linear()
    codes, scales = quantizer.encode(values)
    width = 1.5 * np.sqrt(32 / 7)
    np.testing.assert_allclose(scales, [[0.0, width]], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[3, 1] * 4])
    got = quantizer.decode(codes, scales)
    np.testing.assert_allclose(got, [[width, -width] * 4], rtol=1e-6)


def sent_values(scale_sigma):
  """The top 64 of each of 64 Gaussian blocks with log-normal scales."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((64, 4096), np.float32)
  x *= np.exp(scale_sigma * rng.standard_normal((64, 1), np.float32))
  order = np.argsort(-np.abs(x), axis=1)[:, :64]
  return jnp.asarray(np.take_along_axis(x, order, axis=1))


def relative_error(quantizer, values):
  error = quantizer.decode(*ENCODE(quantizer, values)) - values
  return float(jnp.sum(error * error) / jnp.sum(values * values))


class SignMagnitudeTest(parameterized.TestCase):
  @parameterized.product(scale_sigma=(0.0, 1.0), per=('block', 'tensor'))
  def test_loses_less_than_half_of_what_a_sign_does(self, scale_sigma, per):
    values = sent_values(scale_sigma)
    ours = relative_error(quantize.SignMagnitude(per), values)
    self.assertLess(ours, 0.5 * relative_error(quantize.Sign(per), values))
    self.assertLess(ours, relative_error(quantize.Statistical(), values))

  @parameterized.parameters('block', 'tensor')
  def test_every_code_is_the_nearest_of_those_there_are(self, per):
    values = sent_values(1.0)
    quantizer = quantize.SignMagnitude(per)
    codes, scales = ENCODE(quantizer, values)
    self.assertEqual(scales.shape, quantizer.scale_shape(len(values)))
    self.assertEqual(scales.dtype, quantizer.scale_dtype)
    every = jnp.stack(
      [
        quantizer.decode(jnp.full_like(codes, code), scales)
        for code in range(4)
      ]
    )
    nearest = jnp.min(jnp.abs(every - values[None]), axis=0)
    np.testing.assert_allclose(
      jnp.abs(quantizer.decode(codes, scales) - values),
      nearest,
      # A value in the middle of two levels may go to either.
      atol=1e-6 * float(jnp.abs(values).max()),
    )

  @parameterized.parameters(0.0, 2.0, -1e-30, 1e30)
  def test_of_one_magnitude_nothing_is_lost(self, value):
    values = jnp.full((2, 3), value)
    quantizer = quantize.SignMagnitude()
    got = quantizer.decode(*ENCODE(quantizer, values))
    np.testing.assert_allclose(got, values, rtol=2**-7)  # two bfloat16


class PerTest(parameterized.TestCase):
  @parameterized.parameters(quantize.Sign, quantize.SignMagnitude)
  def test_says_what_is_allowed(self, quantizer):
    with self.assertRaisesRegex(ValueError, "'block' or 'tensor', got 'row'"):
      quantizer(per='row')


class ExactTest(absltest.TestCase):
  def test_keeps_every_bit(self):
    values = jnp.array([[1e-30, -3.14159]])
    np.testing.assert_array_equal(
      quantize.Exact().decode(*quantize.Exact().encode(values)), values
    )


class CountedTest(parameterized.TestCase):
  @parameterized.product(
    quantizer=(
      quantize.Sign(), quantize.SignMagnitude('tensor'),
      quantize.SignMagnitude(), quantize.Statistical(),
    ),
    shape=((700, 64), (3, 128), (5, 200), (5, 1)),
  )  # fmt: skip
  def test_norm_has_the_bits_of_that_of_all_values(self, quantizer, shape):
    rng = np.random.default_rng(sum(shape))
    values = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))
    codes, scales = ENCODE(quantizer, values.astype(np.float32))
    counted = quantize.counted(quantizer, codes, scales)
    has_few_codes = shape[1] in (64, 128)
    self.assertEqual(isinstance(counted, exact.Counted), has_few_codes)
    self.assertEqual(
      exact.norms([[counted]]),
      exact.norms([[DECODE(quantizer, codes, scales)]]),
    )

  def test_a_code_that_is_not_there_sets_no_unit(self):
    """Else the norm of a tensor of small values would lose its bits."""
    scales = np.array([[1], [1e6], [1]], jnp.bfloat16)  # levels, a block
    codes = np.ones((1, 64), np.uint8)  # of the lower level
    counted = quantize.counted(quantize.SignMagnitude(), codes, scales)
    self.assertEqual(exact.norms([[counted]]), 8)


class ShardsTest(parameterized.TestCase):
  @parameterized.parameters(
    quantize.Exact(),
    quantize.Sign(),
    quantize.Sign('tensor'),
    quantize.SignMagnitude(iterations=2),
    quantize.SignMagnitude('tensor', iterations=2),
    quantize.Linear(),
    quantize.Statistical(),
  )
  def test_statistics_are_of_all_shards(self, quantizer):
    rng = np.random.default_rng(0)
    # Of other scales in other shards.
    values = rng.standard_normal((8, 6)) * np.arange(1, 9)[:, None]
    values = values.astype(np.float32)
    want, scales = ENCODE(quantizer, values)
    mesh = jax.make_mesh((4,), ('fsdp',))

    def shard(values):
      codes, scales = quantizer.encode(values, ('fsdp',))
      return codes, quantizer.decode(codes, scales)

    split = jax.P('fsdp')
    codes, decoded = jax.jit(
      jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=split,
        out_specs=split,
      )
    )(jax.device_put(values, jax.NamedSharding(mesh, split)))
    np.testing.assert_array_equal(codes, want)
    # One unit in the last place of a bfloat16 scale.
    rtol = 1e-5 if scales.dtype == np.float32 else 2**-7
    np.testing.assert_allclose(decoded, DECODE(quantizer, want, scales), rtol)


if __name__ == '__main__':
  absltest.main()
