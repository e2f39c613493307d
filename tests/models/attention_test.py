"""Tests for covenant.models.attention; llama_test.py has more."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import attention


def gpu(capability='9.0', kind='NVIDIA H200'):
  return types.SimpleNamespace(device_kind=kind, compute_capability=capability)


class KernelTest(parameterized.TestCase):
  def kernel(self, devices, **changes):
    fields = {'attention': 'auto', 'compute_dtype': 'bfloat16', **changes}
    with mock.patch.object(attention.jax, 'devices', lambda: devices):
      return attention.kernel(config_lib.Model(**fields))

  def test_auto_is_fused_on_gpus_that_have_it(self):
    self.assertIs(self.kernel([gpu(), gpu('8.0')]), attention.attend_fused)

  @parameterized.parameters(
    ([gpu('7.5')], {}),
    ([gpu(), gpu(kind='AMD')], {}),
    ([types.SimpleNamespace(device_kind='TPU v5')], {}),
    ([gpu()], {'compute_dtype': 'float32'}),
    ([gpu()], {'width': 40, 'heads': 4, 'kv_heads': 4}),  # heads of 10
    ([gpu()], {'width': 512, 'heads': 2, 'kv_heads': 2}),  # heads of 256
    ([gpu()], {'attention': 'portable'}),
  )
  def test_elsewhere_it_is_portable(self, devices, changes):
    self.assertIs(self.kernel(devices, **changes), attention.attend)

  def test_here_auto_is_the_same_program_as_portable(self):
    models = [
      config_lib.Model(attention=name, compute_dtype='bfloat16')
      for name in ('auto', 'portable')
    ]
    kernels = {attention.kernel(model) for model in models}
    if jax.default_backend() == 'cpu':
      self.assertEqual(kernels, {attention.attend})


class DocumentsTest(absltest.TestCase):
  def test_each_document_attends_to_itself_as_if_alone(self):
    rng = np.random.default_rng(0)
    q, k, v = (
      jnp.asarray(rng.normal(size=(2, heads, 9, 4)), jnp.float32)
      for heads in (6, 2, 2)
    )
    document_BxL = jnp.asarray([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0] * 9])
    got = jax.jit(attention.attend)(q, k, v, document_BxL)
    alone = jax.jit(attention.attend)
    for row, starts in ((0, (0, 4, 6, 9)), (1, (0, 9))):
      for first, last in zip(starts[:-1], starts[1:], strict=True):
        part = np.s_[row : row + 1, :, first:last]
        np.testing.assert_allclose(
          got[part], alone(q[part], k[part], v[part]), rtol=1e-5, atol=1e-6
        )

  def test_one_document_is_plain_attention_bit_for_bit(self):
    rng = np.random.default_rng(1)
    q, k, v = (
      jnp.asarray(rng.normal(size=(1, 2, 8, 4)), jnp.float32) for _ in range(3)
    )
    attend = jax.jit(attention.attend)
    np.testing.assert_array_equal(
      attend(q, k, v, jnp.zeros((1, 8), jnp.int32)), attend(q, k, v)
    )


if __name__ == '__main__':
  absltest.main()
