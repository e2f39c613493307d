"""Tests for covenant.models.attention; llama_test.py has more."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from covenant.models import attention


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
