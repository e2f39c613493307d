import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from covenant.optim.baselines import diloco


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

  def test_follows_the_paper_in_numpy(self):
    """Algorithm 1 of arXiv 2311.08105, three peers, step by step."""
    peers, steps, rounds, rate = 3, 4, 3, 0.05
    rng = np.random.default_rng(0)
    targets, start = rng.standard_normal((peers, 6)), rng.standard_normal(6)
    tx = diloco.diloco(
      optax.sgd(rate, momentum=0.5), inner_steps=steps, axis_name='peers'
    )

    def run(target):
      params = jnp.asarray(start, jnp.float32)
      state, seen = tx.init(params), []
      for _ in range(rounds * steps):
        updates, state = tx.update(params - target, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
      return jnp.stack(seen)

    got = jax.jit(jax.vmap(run, axis_name='peers'))(
      jnp.asarray(targets, jnp.float32)
    )
    theta, outer = start.copy(), np.zeros(6)
    trace = np.zeros((peers, 6))  # inner momentum lives through the rounds
    for r in range(rounds):
      local = np.stack([theta] * peers)
      for h in range(steps):
        trace = 0.5 * trace + (local - targets)
        local = local - rate * trace
        if h < steps - 1:
          np.testing.assert_allclose(
            got[:, r * steps + h], local, rtol=1e-4, atol=1e-5
          )
      delta = np.mean(theta - local, axis=0)
      outer = 0.9 * outer + delta
      theta = theta - 0.7 * (delta + 0.9 * outer)
      np.testing.assert_allclose(
        got[:, r * steps + steps - 1],
        np.stack([theta] * peers),
        rtol=1e-4,
        atol=1e-5,
      )


if __name__ == '__main__':
  absltest.main()
