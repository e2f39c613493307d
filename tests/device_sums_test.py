"""Sums of several processes, as one process computes them."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import device_sums
from covenant.models import sharding

ALL = 'fsdp', 'tensor'


class DeviceSumsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices = config_lib.Devices(fsdp=4, tensor=2)
    self.mesh = sharding.mesh(devices, jax.devices())
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(8, 16, 12)).astype(np.float32)

  def both(self, f, out, **options):
    """Returns `f` of each device's [16, 12], by JAX and in order."""
    found = []
    lies = jax.device_put(self.x, jax.NamedSharding(self.mesh, jax.P(ALL)))
    for is_ordered in False, True:
      with mock.patch.object(
        device_sums,
        '_is_ordered_here',
        lambda is_ordered=is_ordered: is_ordered,
      ):
        program = jax.jit(
          jax.shard_map(
            lambda x: f(x[0]),
            mesh=self.mesh,
            in_specs=jax.P(ALL),
            out_specs=out,
            **options,
          )  # fmt: skip
        )
        found.append(jax.tree.map(np.asarray, program(lies)))
    return found

  @parameterized.parameters(True, False)
  def test_sums_and_means(self, check_vma):
    def f(x):
      sums = [device_sums.psum(x, axes) for axes in (ALL, 'fsdp', ('tensor',))]
      whole = device_sums.psum(jnp.round(x).astype(jnp.int32), ALL)
      sums[1] = device_sums.psum(sums[1], 'tensor')
      sums[2] = device_sums.psum(sums[2], 'fsdp')
      return sums, whole, device_sums.pmean(x, ALL)

    by_jax, ordered = self.both(f, jax.P(), check_vma=check_vma)
    jax.tree.map(np.testing.assert_array_equal, by_jax, ordered)
    np.testing.assert_allclose(by_jax[0][0], self.x.sum(axis=0), rtol=1e-5)

  def test_a_sum_that_is_cut(self):
    for axis in 0, 1:
      by_jax, ordered = self.both(
        lambda x, axis=axis: device_sums.psum_scatter(x, 'fsdp', axis),
        jax.P(ALL),
      )
      np.testing.assert_array_equal(by_jax, ordered)
      self.assertLen(by_jax, 8 * 16 // (1 if axis else 4))

  def test_gradients(self):
    def f(x):
      def loss(shard, whole):
        wide = device_sums.all_gather(shard, 'fsdp', 0)
        own = device_sums.vary(whole, ('fsdp', 'tensor'))
        parts = jnp.sum(jnp.sin(wide) * x[:, :1].T, axis=1).sum()
        return device_sums.psum(jnp.sum(own * x) + parts, ALL)

      shard, whole = x[:, 3], device_sums.pmean(x, ALL)
      return jax.value_and_grad(loss, argnums=(0, 1))(shard[:, None], whole)

    out = jax.P(), (jax.P(ALL), jax.P())
    by_jax, ordered = self.both(f, out)
    jax.tree.map(np.testing.assert_array_equal, by_jax, ordered)
    self.assertGreater(np.abs(by_jax[1][1]).max(), 0)


if __name__ == '__main__':
  absltest.main()
