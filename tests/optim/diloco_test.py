import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from covenant.optim import diloco


class DilocoTest(absltest.TestCase):
  def test_two_peers_by_hand(self):
    """Two peers, one parameter, H = 2, inner SGD 0.1, outer (0.7, 0.9).

    Constant gradients 1 and 3. Round 1: the peers go from 10 to 9.8 and 9.4;
    the mean delta is 0.4; m = 0.4; theta = 10 - 0.7 * (0.4 + 0.9 * 0.4) =
    9.468. Round 2: again 0.4; m = 0.9 * 0.4 + 0.4 = 0.76; theta = 9.468 -
    0.7 * (0.4 + 0.9 * 0.76) = 8.7092.
    """
    tx = diloco.diloco(optax.sgd(0.1), inner_steps=2, axis_name='peers')

    def run(gradient):
      params = jnp.float32(10.0)
      state, seen = tx.init(params), []
      for _ in range(4):
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
      return jnp.stack(seen)

    seen = jax.vmap(run, axis_name='peers')(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(
      seen,
      [[9.9, 9.468, 9.368, 8.7092], [9.7, 9.468, 9.168, 8.7092]],
      rtol=1e-6,
    )


if __name__ == '__main__':
  absltest.main()
