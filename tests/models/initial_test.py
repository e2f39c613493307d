import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.models import initial
from tests.reference import protocol


class InitialTest(parameterized.TestCase):
  @parameterized.parameters(((7,),), ((5, 9),), ((3, 4, 6),))
  def test_equals_the_reference(self, shape):
    seed = jax.random.key_data(jax.random.key(5))
    got = jax.jit(initial.normal, static_argnums=(1, 2, 3))(
      seed, 'layers/0/up', shape, 0.02
    )
    want = protocol.initial(5, 'layers/0/up', shape, 0.02)
    np.testing.assert_array_equal(got, want)

  def test_threefry_of_the_paper(self):
    # The known answers of the authors' distribution (Random123, kat_vectors).
    zero, ones = jnp.uint32(0), jnp.uint32(0xFFFFFFFF)
    self.assertEqual(
      tuple(map(int, initial.threefry(zero, zero, zero, zero))),
      (0x6B200159, 0x99BA4EFE),
    )
    self.assertEqual(
      tuple(map(int, initial.threefry(ones, ones, ones, ones))),
      (0x1CB996FC, 0xBB002BE7),
    )

  @pytest.mark.slow
  def test_is_nearly_normal(self):
    x = np.asarray(initial.normal(jnp.zeros(2, jnp.uint32), 'x', (512, 512), 1))
    self.assertAlmostEqual(float(x.mean()), 0, delta=0.01)
    self.assertAlmostEqual(float(x.std()), 1, delta=0.01)
    within = np.mean(np.abs(x) < 1)
    self.assertBetween(float(within), 0.66, 0.69)  # of a normal 0.683
    self.assertLess(abs(np.corrcoef(x[0], x[1])[0, 1]), 0.15)

  @pytest.mark.slow
  def test_shards_are_parts_of_the_whole(self):
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axes)
    seed = jnp.zeros(2, jnp.uint32)
    make = lambda: initial.normal(seed, 'x', (3, 16, 8), 0.02)  # noqa: E731
    placed = jax.NamedSharding(mesh, jax.P(None, 'a', 'b'))
    got = jax.jit(make, out_shardings=placed)
    np.testing.assert_array_equal(got(), make())
    for kind in ('all-gather', 'all-reduce', 'collective-permute'):
      self.assertNotIn(kind, got.lower().compile().as_text())


if __name__ == '__main__':
  absltest.main()
