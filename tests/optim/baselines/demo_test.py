import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import sparseloco as sl
from covenant.optim import topk_variants
from covenant.optim.baselines import demo

P = jax.P


def in_numpy(thetas, gradients, rate, k, decay):
  """DeMo on one matrix of one block, from the paper, in float64.

  Args:
    thetas: the parameters of the peers, equal: [H, W].
    gradients: [T, R, H, W].
    rate: learning rate.
    k: coefficients sent.
    decay: beta.

  Returns:
    The parameters after each step, [T, H, W], and the momenta, [R, H, W].
  """
  theta = np.array(thetas, np.float64)
  momenta = np.zeros(gradients.shape[1:], np.float64)
  seen = []
  for gradients_R in gradients:
    total, senders = np.zeros(theta.shape), np.zeros(theta.shape)
    for r, gradient in enumerate(gradients_R):
      momenta[r] = decay * momenta[r] + rate * gradient
      coefficients = scipy.fft.dctn(momenta[r], norm='ortho')
      order = np.argsort(-np.abs(coefficients).ravel(), kind='stable')
      mask = np.zeros(theta.size)
      mask[order[:k]] = 1
      sent = mask.reshape(theta.shape) * coefficients
      momenta[r] -= scipy.fft.idctn(sent, norm='ortho')
      total += sent
      senders += mask.reshape(theta.shape)
    mean = scipy.fft.idctn(total / np.maximum(senders, 1), norm='ortho')
    theta = theta - rate * np.sign(mean)
    seen.append(theta)
  return np.stack(seen), momenta


def run(tx, params, gradients):
  state, seen = tx.init(params), []
  for g in gradients:
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return jnp.stack(seen), state


def two_of_a_pair():
  """One coefficient of each pair of elements."""
  return topk_variants.DCTTopK(k=1, block=(1, 2), quantizer=sl.Exact())


class DemoTest(parameterized.TestCase):
  def test_two_peers_by_hand(self):
    """Two elements, one coefficient sent, lr 0.1, beta 0.5, theta = [1, 1].

    Gradients [3, 1] and [-1, 9]: e = [0.3, 0.1] and [-0.1, 0.9], whose
    coefficients are (0.4, 0.2) and (0.8, -1.0) over sqrt(2). Sent: 0.4 at 0,
    -1.0 at 1; left: [0.1, -0.1] and [0.4, 0.4]. The mean over senders, (0.4,
    -1.0) / sqrt(2), is [-0.3, 0.7]; theta = [1 + 0.1, 1 - 0.1], although peer
    0 has a positive gradient everywhere.

    Zero gradients next: e = [0.05, -0.05] and [0.2, 0.2], coefficients (0,
    0.1) and (0.4, 0): all is sent, the mean [0.25, 0.15] over senders again,
    theta = [1.0, 0.8], and nothing is left.
    """
    tx = demo.demo(
      0.1, compression=two_of_a_pair(), error_decay=0.5, axis_name='peers'
    )
    gradients = jnp.array([[[3.0, 1.0], [0, 0]], [[-1.0, 9.0], [0, 0]]])
    seen, state = jax.jit(
      jax.vmap(lambda g: run(tx, jnp.ones(2), g), axis_name='peers')
    )(gradients)
    np.testing.assert_allclose(seen, [[[1.1, 0.9], [1.0, 0.8]]] * 2, rtol=1e-6)
    np.testing.assert_allclose(state.error, np.zeros((2, 2)), atol=1e-7)

  @pytest.mark.slow
  def test_six_steps_of_four_peers_follow_the_paper(self):
    gradients = np.random.default_rng(0).standard_normal((6, 4, 8, 4))
    theta = np.random.default_rng(1).standard_normal((8, 4))
    tx = demo.demo(
      0.01,
      compression=topk_variants.DCTTopK(5, (8, 4), sl.Exact()),
      error_decay=0.9,
      axis_name='peers',
    )

    def peer(params, gradients):
      def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state)
        params = optax.apply_updates(params, updates)
        return (params, state), params

      (_, state), seen = jax.lax.scan(
        step, (params, tx.init(params)), gradients
      )
      return seen, state.error

    arguments = (
      np.stack([theta] * 4).astype(np.float32),
      gradients.swapaxes(0, 1).astype(np.float32),
    )
    by_vmap = jax.jit(jax.vmap(peer, axis_name='peers'))(*arguments)
    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def peer_of_a_mesh(params, gradients):
      return jax.tree.map(lambda x: x[None], peer(params[0], gradients[0]))

    by_mesh = jax.jit(
      jax.shard_map(
        peer_of_a_mesh, mesh=mesh, in_specs=P('peers'), out_specs=P('peers')
      )
    )(*arguments)
    want, momenta = in_numpy(theta, gradients, 0.01, 5, 0.9)
    for seen, errors in (by_vmap, by_mesh):
      np.testing.assert_allclose(seen, [want] * 4, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(errors, momenta, rtol=1e-4, atol=1e-7)
      np.testing.assert_array_equal(seen, np.stack([seen[0]] * 4))

  @pytest.mark.slow
  def test_defaults_are_the_source_s(self):
    x = np.random.default_rng(2).standard_normal((64, 64), np.float32)
    tx = demo.demo()
    updates, state = jax.jit(lambda x: tx.update(x, tx.init(x)))(x)
    np.testing.assert_allclose(np.abs(updates), 1e-3, rtol=1e-6)
    # 32 of the 4096 coefficients have left the momentum.
    left = np.abs(scipy.fft.dctn(np.asarray(state.error), norm='ortho'))
    zero = 1e-6 * left.max()  # float32 tells no less of sums with the largest
    self.assertEqual(np.sum(left < zero), 32)
    _, later = jax.jit(tx.update)(np.zeros_like(x), state)
    later = np.abs(scipy.fft.dctn(np.asarray(later.error), norm='ortho'))
    np.testing.assert_allclose(
      np.sort(later.ravel())[64:],
      0.999 * np.sort(left.ravel())[32:-32],
      rtol=1e-3,
      atol=zero,
    )

  def test_the_rate_may_follow_a_schedule(self):
    """Rates 0.5, then 0.25: e = [1, 1], all sent; e = [0.5, 0.5], all sent."""
    tx = demo.demo(
      lambda count: jnp.where(count < 1, 0.5, 0.25),
      compression=two_of_a_pair(),
    )
    seen, state = jax.jit(lambda g: run(tx, jnp.zeros(2), g))(
      jnp.full((2, 2), 2.0)
    )
    np.testing.assert_allclose(seen, [[-0.5, -0.5], [-0.75, -0.75]])
    np.testing.assert_allclose(state.error, [0, 0], atol=1e-7)
    self.assertEqual(int(state.count), 2)

  def test_composes_keeps_its_types_and_compiles_once(self):
    params = {'w': jnp.ones((8, 8), jnp.bfloat16), 's': jnp.float32(1)}
    tx = optax.chain(optax.clip(1.0), demo.demo(0.1))
    step = jax.jit(tx.update)
    state = tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    for _ in range(3):
      updates, state = step(params, state, params)
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual(jax.tree.map(jax.typeof, state), types)
    self.assertEqual(
      jax.tree.map(jax.typeof, updates), jax.tree.map(jax.typeof, params)
    )

  def test_refuses_a_decay_beyond_one(self):
    with self.assertRaisesRegex(ValueError, 'error_decay: .* 0 to 1, got 1.5'):
      demo.demo(error_decay=1.5)


if __name__ == '__main__':
  absltest.main()
