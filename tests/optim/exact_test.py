import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import exact
from tests.reference import protocol


def draw(seed, shape, low=-20, high=20):
  rng = np.random.default_rng(seed)
  scale = np.ldexp(1.0, rng.integers(low, high, shape))
  return (rng.normal(size=shape) * scale).astype(np.float32)


class ExactTest(parameterized.TestCase):
  @parameterized.parameters((-20, 20), (-60, -40), (0, 60))
  def test_product_equals_the_reference(self, low, high):
    a, b = draw(0, 5000, low, high), draw(1, 5000, low, high)
    got = jax.jit(exact.product)(a, b)
    np.testing.assert_array_equal(got, protocol.product(a, b))

  @parameterized.parameters(
    ((1,),), ((3, 64),), ((4097,),), ((5000, 3),), ((2, 300, 4096),)
  )
  def test_norm_equals_the_reference(self, shape):
    x = draw(2, shape, -3, 3)
    got = jax.jit(lambda x: exact.norms([[x, -2 * x]]))(x)[0]
    if x.size < 1e5:
      self.assertEqual(got, protocol.norm([x, -2 * x]))
    want = np.sqrt(5 * np.sum(x.astype(np.float64) ** 2))
    np.testing.assert_allclose(got, want, rtol=3e-7)

  @parameterized.parameters(
    ([0.0],), ([1e-35],), ([1e30, 1e30],), ([3e-30] * 7,), ([1.0, 1e-3],)
  )
  def test_norm_of_special_values(self, values):
    x = np.array(values, np.float32)
    got = exact.norms([[x]])[0]
    self.assertEqual(got, protocol.norm([x]))

  def test_norms_of_many_at_once(self):
    xs = [draw(s, (7, 64)) for s in range(5)]
    want = [protocol.norm([x]) for x in xs]
    np.testing.assert_array_equal(exact.norms([[x] for x in xs]), want)

  def test_norm_of_more_values_than_one_sum_holds(self):
    x = np.zeros(2**23 + 5, np.float32)
    x[:9], x[-7:] = draw(7, 9, -3, 3), draw(8, 7, -3, 3)
    got = jax.jit(lambda x, y: exact.norms([[x], [y]]))(x, x[:9])
    want = protocol.norm([x[:9], x[-7:]]), protocol.norm([x[:9]])
    np.testing.assert_array_equal(got, want)
    full = jax.jit(lambda x: exact.norms([[x]]))(
      np.ones(2**23 + 2**20, np.float32)
    )
    np.testing.assert_array_equal(full, [3072])

  def test_norm_of_shards_is_that_of_the_whole(self):
    x = draw(4, (64, 32))
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axes)
    whole = jax.jit(lambda x: exact.norms([[x]])[0])(x)

    def local(x):
      return exact.norms([[x]], ('a', 'b'))[0]

    sharded = jax.shard_map(
      local, mesh=mesh, in_specs=jax.P('a', 'b'), out_specs=jax.P()
    )
    self.assertEqual(jax.jit(sharded)(x), whole)

  def test_quotient_equals_the_reference(self):
    a, b = np.abs(draw(5, 4000)), np.abs(draw(6, 4000))
    a[:3], b[:3] = (0, 0, 1), (0, 1, 0)
    a[3:900] = b[3:900] * np.random.default_rng(0).random(897, np.float32)
    got = jax.jit(exact.quotient)(a, b)
    want = [protocol.quotient(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(
      got[1:], np.minimum(1, a / np.maximum(b, 1e-30))[1:], atol=3e-7
    )

  def test_a_quotient_by_an_infinite_norm_is_zero(self):
    a, b = np.float32([0, 1, 2.0**60, 3.4e38, np.inf]), np.full(5, np.inf)
    b = b.astype(np.float32)
    for divide in exact.quotient, jax.jit(exact.quotient):
      np.testing.assert_array_equal(divide(a, b), [0, 0, 0, 0, 1])


if __name__ == '__main__':
  absltest.main()
