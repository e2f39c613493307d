import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim.baselines import sparta

P = jax.P


def mesh_of_four():
  return jax.make_mesh(
    (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
  )


def train(tx, params, targets_T):
  """Gradient descent on |x - target|^2 / 2, a target a step."""

  def step(carry, target):
    params, state = carry
    gradients = jax.tree.map(lambda x: x - target, params)
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), targets_T)[0][0]


def toy_params():
  rng = np.random.default_rng(0)
  return {
    'matrix': jnp.asarray(rng.standard_normal((6, 7)), jnp.float32),
    'scalar': jnp.float32(2.0),
    'vector': jnp.asarray(rng.standard_normal(11), jnp.float32),
  }


def in_numpy(params, targets_RxT, rate, p, seed):
  """SPARTA in float64; only the choice of positions is read off the code."""
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
  peers = [[x.copy() for x in leaves] for _ in targets_RxT]
  for t in range(targets_RxT.shape[1]):
    key = jax.random.fold_in(jax.random.key(seed), t)
    for r, leaves in enumerate(peers):
      for x in leaves:
        x -= rate * (x - targets_RxT[r, t])
    for i, leaf in enumerate(peers[0]):
      count = max(1, round(p * leaf.size))
      at = np.asarray(
        sparta.positions(jax.random.fold_in(key, i), leaf.size, count)
      )
      mean = np.mean([leaves[i].flat[at] for leaves in peers], axis=0)
      for leaves in peers:
        leaves[i].flat[at] = mean
  return peers


class PositionsTest(absltest.TestCase):
  def test_are_distinct_in_range_and_fair(self):
    keys = jax.random.split(jax.random.key(0), 3000)
    at = np.asarray(
      jax.jit(jax.vmap(lambda key: sparta.positions(key, 11, 3)))(keys)
    )
    self.assertEqual(at.dtype, np.int32)
    self.assertTrue((np.diff(at, axis=1) > 0).all())
    # Strata of 4, 4 and 3: chances of 1/4 eight times and 1/3 three times.
    counts = np.bincount(at.ravel(), minlength=11)
    np.testing.assert_allclose(counts, [750] * 8 + [1000] * 3, atol=5 * 26)


class SpartaTest(parameterized.TestCase):
  def test_two_peers_by_hand(self):
    """Two parameters, p = 1, inner SGD 0.5; peers at (1, 2) and (3, 6).

    Gradients (2, 0) and (0, 4) lead to (0, 2) and (3, 4), averaged to (1.5,
    3). With p = 0.5 one of the two is averaged, the other is as it was.
    """

    def step(p, params, gradient):
      tx = sparta.sparta(optax.sgd(0.5), p=p, axis_name='peers')
      updates, _ = tx.update(gradient, tx.init(params), params)
      return params + updates

    params = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    gradients = jnp.array([[2.0, 0.0], [0.0, 4.0]])
    all_of_them, half = jax.jit(
      jax.vmap(
        lambda x, g: (step(1.0, x, g), step(0.5, x, g)), axis_name='peers'
      )
    )(params, gradients)
    np.testing.assert_allclose(all_of_them, [[1.5, 3], [1.5, 3]], rtol=1e-6)
    self.assertIn(half.tolist(), ([[1.5, 2], [1.5, 4]], [[0, 3], [3, 3]]))

  @pytest.mark.slow
  def test_five_steps_of_four_peers_follow_the_paper(self):
    params = toy_params()
    targets = np.random.default_rng(1).standard_normal((4, 5))
    tx = sparta.sparta(optax.sgd(0.1), p=0.2, axis_name='peers', seed=3)

    def peer(params, targets):
      return train(tx, params, targets)

    def peer_of_a_mesh(params, targets):
      one = jax.tree.map(lambda x: x[0], (params, targets))
      return jax.tree.map(lambda x: x[None], peer(*one))

    arguments = (
      jax.tree.map(lambda x: jnp.stack([x] * 4), params),
      jnp.asarray(targets, jnp.float32),
    )
    by_vmap = jax.jit(jax.vmap(peer, axis_name='peers'))(*arguments)
    by_mesh = jax.jit(
      jax.shard_map(
        peer_of_a_mesh,
        mesh=mesh_of_four(),
        in_specs=P('peers'),
        out_specs=P('peers'),
      )
    )(*arguments)
    want = in_numpy(params, targets, 0.1, 0.2, 3)
    for got in (by_vmap, by_mesh):
      for i, leaf in enumerate(jax.tree.leaves(got)):
        np.testing.assert_allclose(
          leaf, np.stack([peer[i] for peer in want]), rtol=1e-4, atol=1e-5
        )

  @pytest.mark.slow
  def test_only_the_chosen_values_cross_the_axis(self):
    params = {'w': jnp.zeros((100, 100)), 'b': jnp.zeros(1000)}
    tx = sparta.sparta(optax.sgd(0.1), axis_name='peers')

    def step(params):
      one = jax.tree.map(lambda x: x[0], params)
      updates, _ = tx.update(one, tx.init(one), one)
      return jax.tree.map(lambda x: x[None], updates)

    stacked = jax.tree.map(lambda x: jnp.stack([x] * 4), params)
    text = (
      jax.jit(
        jax.shard_map(
          step,
          mesh=mesh_of_four(),
          in_specs=P('peers'),
          out_specs=P('peers'),
        )
      )
      .lower(stacked)
      .compile()
      .as_text()
    )
    lines = [x for x in text.splitlines() if ' all-reduce' in x]
    self.assertNotEmpty(lines)
    self.assertNotIn(' all-gather', text)
    for line in lines:
      # 0.005 of 10,000 and of 1,000.
      self.assertIn('f32[50]', line)
      self.assertIn('f32[5]', line)
      self.assertNotIn('1000', line)

  def test_alone_it_is_the_inner_optimizer(self):
    params, targets = toy_params(), jnp.arange(3.0)
    inner = optax.sgd(0.1, momentum=0.9)
    got = jax.jit(lambda p: train(sparta.sparta(inner), p, targets))(params)
    want = jax.jit(lambda p: train(inner, p, targets))(params)
    jax.tree.map(np.testing.assert_array_equal, got, want)

  def test_composes_keeps_its_types_and_compiles_once(self):
    params = {
      'half': jnp.ones((1, 8, 8), jnp.bfloat16),
      'nothing': jnp.ones((1, 0)),
    }
    tx = optax.chain(
      optax.clip(1.0), sparta.sparta(optax.sgd(0.1), axis_name='peers')
    )
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(tx.update, axis_name='peers'))
    types = jax.tree.map(jax.typeof, (params, state))
    for _ in range(3):
      updates, state = step(params, state, params)
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual(jax.tree.map(jax.typeof, (updates, state)), types)

  @parameterized.parameters(0.0, 1.5)
  def test_refuses_a_fraction_that_is_none(self, p):
    with self.assertRaisesRegex(ValueError, f'p: expected .* 1, got {p}'):
      sparta.sparta(optax.sgd(0.1), p=p)

  def test_needs_params(self):
    tx = sparta.sparta(optax.sgd(0.1))
    params = {'w': jnp.ones(4)}
    with self.assertRaisesRegex(ValueError, 'needs params'):
      tx.update(params, tx.init(params))


if __name__ == '__main__':
  absltest.main()
