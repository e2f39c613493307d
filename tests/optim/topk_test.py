import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import topk

# Few distinct values, so many ties; zeros of both signs, numbers that a
# flush to zero would lose, and the largest.
VALUES = [0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 2.0, -2.5, np.inf, -np.inf]

# Compiled once a shape, not once an example.
by_groups = jax.jit(topk.select_by_groups, static_argnums=1)


def reference(blocks_NxL: np.ndarray, k: int) -> np.ndarray:
  """A stable sort by falling magnitude: ties go to the lower index."""
  order = np.argsort(-np.abs(blocks_NxL), axis=1, kind='stable')
  return np.sort(order[:, :k], axis=1)


def tied(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
  return rng.choice(np.array(VALUES, np.float32), shape)


class TopKTest(parameterized.TestCase):
  @pytest.mark.slow
  @hypothesis.given(data=st.data(), n=st.integers(1, 3), size=st.integers(1, 9))
  def test_is_exact_and_ties_go_to_the_lowest_index(self, data, n, size):
    values = st.sampled_from(VALUES)
    x = np.array(
      data.draw(
        st.lists(values, min_size=n * size, max_size=n * size), label='x'
      ),
      np.float32,
    ).reshape(n, size)
    k = data.draw(st.integers(1, size), label='k')
    np.testing.assert_array_equal(
      topk.select(jnp.asarray(x), k), reference(x, k)
    )

  @pytest.mark.slow
  @hypothesis.given(
    st.lists(st.sampled_from(VALUES) | st.floats(width=32, allow_nan=False)),
    st.sampled_from([(8, 1), (24, 3), (320, 33)]),
    st.integers(0, 2**32 - 1),
  )
  @hypothesis.settings(max_examples=200)
  def test_groups_change_nothing(self, chosen, sizes, seed):
    """A few chosen values among others that all tie."""
    size, k = sizes
    rng = np.random.default_rng(seed)
    x = np.full((2, size), rng.choice(np.array(VALUES, np.float32)))
    place = rng.permutation(x.size)[: len(chosen)]
    x.reshape(-1)[place] = chosen[: x.size]
    np.testing.assert_array_equal(by_groups(jnp.asarray(x), k), reference(x, k))

  def test_large_inputs_take_the_groups(self):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 4096), np.float32)
    # Ties: by rounding, all the same, few values, all in one group and more.
    x[256:512] = np.round(x[256:512], 1)
    x[512:520] = 0
    x[520:528] = -1
    x[528:768] = tied(rng, (240, 4096))
    x[768, 100:170] = 1e-30
    x[768, 170:] = x[768, :100] = 0
    select = jax.jit(functools.partial(topk.select, k=64))
    self.assertIn('while', select.lower(jnp.asarray(x)).as_text())
    np.testing.assert_array_equal(select(jnp.asarray(x)), reference(x, 64))

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_agrees_with_lax_top_k(self, dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((8, 384)), tied(rng, (8, 384))])
    x[3, 7] = x[3, 99] = np.nan
    x = jnp.asarray(x, dtype)
    _, expected = jax.lax.top_k(jnp.abs(x), 24)
    np.testing.assert_array_equal(by_groups(x, 24), np.sort(expected, axis=1))

  @pytest.mark.slow
  def test_under_vmap_and_shard_map(self):
    x = tied(np.random.default_rng(0), (16, 128))
    expected = reference(x, 9)
    select = functools.partial(topk.select_by_groups, k=9)
    np.testing.assert_array_equal(
      jax.jit(jax.vmap(select))(x.reshape(4, 4, 128)).reshape(16, 9),
      expected,
    )
    mesh = jax.make_mesh(
      (8,), ('peer',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec('peer')
    sharded = jax.shard_map(select, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(sharded)(jnp.asarray(x)), expected)


if __name__ == '__main__':
  absltest.main()
