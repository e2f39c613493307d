import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import topk


def reference(blocks_NxL: np.ndarray, k: int) -> np.ndarray:
  """A stable sort by falling magnitude: ties go to the lower index."""
  order = np.argsort(-np.abs(blocks_NxL), axis=1, kind='stable')
  return np.sort(order[:, :k], axis=1)


class TopKTest(parameterized.TestCase):
  @hypothesis.given(data=st.data(), n=st.integers(1, 3), size=st.integers(1, 9))
  @hypothesis.settings(deadline=None, max_examples=60)
  def test_is_exact_and_ties_go_to_the_lowest_index(self, data, n, size):
    # Few distinct values, zeros of both signs among them: many ties.
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.5])
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

  def test_on_blocks_of_the_real_size(self):
    x = np.random.default_rng(0).standard_normal((16, 4096), np.float32)
    np.testing.assert_array_equal(
      topk.select(jnp.asarray(x), 64), reference(x, 64)
    )


if __name__ == '__main__':
  absltest.main()
