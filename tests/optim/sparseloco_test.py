import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import collectives
from covenant.optim import sparseloco as sl

P = jax.P


def round_in_numpy(theta, ends, errors, k, decay):
  """One SparseLoCo round on a vector, from the equations, in float64."""
  sent = []
  for r, end in enumerate(ends):
    errors[r] = decay * errors[r] + (theta - end)
    keep = np.argsort(-np.abs(errors[r]), kind='stable')[:k]
    message = np.zeros_like(theta)
    message[keep] = errors[r][keep]
    errors[r] = errors[r] - message
    sent.append(message)
  return theta - np.mean(sent, axis=0)


def toy_params():
  """Ranks 0 to 3, odd shapes, two dtypes."""
  keys = jax.random.split(jax.random.key(0), 4)
  return {
    'scalar': jnp.float32(2.0),
    'vector': jax.random.normal(keys[0], (5,)),
    'matrix': jax.random.normal(keys[1], (100, 70)),
    'stack': jax.random.normal(keys[2], (2, 64, 64)),
    'half': jax.random.normal(keys[3], (8, 8)).astype(jnp.bfloat16),
  }


def toy_gradient(params, target):
  def loss(p):
    leaves = [x.astype(jnp.float32) - target for x in jax.tree.leaves(p)]
    return sum(jnp.sum(x * x) for x in leaves)

  return jax.grad(loss)(params)


def train(tx, steps, params, state, target):
  def step(_, carry):  # compiled once, not once a step
    params, state = carry
    updates, state = tx.update(toy_gradient(params, target), state, params)
    return optax.apply_updates(params, updates), state

  return jax.lax.fori_loop(0, steps, step, (params, state))


class PiecesTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_two_rounds_of_three_peers_follow_the_equations(self):
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(16)
    compression = sl.TopK(k=4, block=(4, 4), quantizer=sl.Exact())
    outer = sl.nesterov(1.0)
    params = jnp.asarray(theta, jnp.float32)
    errors_np = [np.zeros(16) for _ in range(3)]
    errors = [sl.init_error(params) for _ in range(3)]
    for _ in range(2):
      ends = [theta + 0.1 * rng.standard_normal(16) for _ in range(3)]
      messages = []
      for r, end in enumerate(ends):
        delta = sl.pseudo_gradient(params, jnp.asarray(end, jnp.float32))
        message, errors[r] = sl.compress(delta, errors[r], compression, 0.95)
        messages.append(message)
      delta = sl.aggregate(messages, params, compression, 'all', 'none')
      params, _ = sl.outer_update(outer, delta, outer.init(params), params)
      theta = round_in_numpy(theta, ends, errors_np, k=4, decay=0.95)
      np.testing.assert_allclose(params, theta, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(
        np.stack(errors), np.stack(errors_np), rtol=1e-4, atol=1e-6
      )

  @parameterized.parameters(sl.Sign(), sl.Statistical(), sl.Exact())
  @pytest.mark.rows(1)
  def test_what_is_sent_and_what_stays_add_up(self, quantizer):
    params = toy_params()
    delta = jax.tree.map(lambda p: 0.1 * p.astype(jnp.float32), params)
    compression = sl.TopK(k=64, quantizer=quantizer)

    @jax.jit
    def send(delta):
      message, error = sl.compress(
        delta, sl.init_error(params), compression, 0.95
      )
      return sl.decompress(message, params, compression), error

    sent, error = send(delta)
    jax.tree.map(
      lambda d, s, e: np.testing.assert_allclose(s + e, d, atol=1e-6),
      delta,
      sent,
      error,
    )

  def test_without_feedback_nothing_stays(self):
    delta = {'w': jnp.ones(64)}
    _, error = sl.compress(delta, None, sl.TopK(), 0.95)
    self.assertIsNone(error)


class TransformationTest(parameterized.TestCase):
  def test_is_the_inner_optimizer_between_exchanges(self):
    params = toy_params()
    tx = sl.sparseloco(optax.sgd(0.01), inner_steps=10)
    plain = optax.sgd(0.01)
    with jax.disable_jit():  # how XLA fuses the two may differ
      got, _ = train(tx, 3, params, tx.init(params), 0.5)
      want, _ = train(plain, 3, params, plain.init(params), 0.5)
    jax.tree.map(np.testing.assert_array_equal, got, want)

  @pytest.mark.slow
  def test_same_bits_by_vmap_on_a_mesh_and_op_by_op(self):
    """Equal messages give equal sums, clip factors and outer steps."""
    tx = sl.sparseloco(
      optax.sgd(1.0),
      outer=sl.nesterov(0.7, momentum=0.9),
      inner_steps=1,
      compression=sl.TopK(4, (8, 8), sl.Exact()),
      error_decay=None,  # a product and a sum, which a peer may contract
      axis_name='peers',
    )
    grads = jax.random.normal(jax.random.key(0), (4, 3, 24, 20))
    grads = grads * jnp.array([1, 5, 0.1, 1]).reshape(4, 1, 1, 1)

    def step(carry, grad):
      params, state = carry
      # Not what it adds but the exact parameters: the next delta is a gradient.
      _, state = tx.update(grad, state, params)
      return (state.anchor, state), None

    def run(grads):
      params = jnp.zeros((24, 20))
      carry = collectives.varying((params, tx.init(params)), 'peers')
      return jax.lax.scan(step, carry, grads)[0][0]

    by_peers = jax.vmap(run, axis_name='peers')
    want = jax.jit(by_peers)(grads)
    with jax.disable_jit():
      np.testing.assert_array_equal(by_peers(grads), want)
    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    on_mesh = jax.shard_map(
      lambda g: run(g[0])[None],
      mesh=mesh,
      in_specs=P('peers'),
      out_specs=P('peers'),
    )
    np.testing.assert_array_equal(jax.jit(on_mesh)(grads), want)

  @pytest.mark.slow
  def test_peers_of_vmap_and_of_a_mesh_agree_and_share_one_anchor(self):
    params, targets = toy_params(), jnp.arange(4.0)
    tx = sl.sparseloco(
      optax.sgd(0.02, momentum=0.9), inner_steps=2, axis_name='peers'
    )

    def run(params, target):
      return train(tx, 4, params, tx.init(params), target)

    stacked = jax.tree.map(lambda p: jnp.stack([p] * 4), params)
    by_vmap = jax.jit(jax.vmap(run, axis_name='peers'))(stacked, targets)
    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def one_peer(params, targets):
      params = jax.tree.map(lambda p: p[0], params)
      return jax.tree.map(lambda x: x[None], run(params, targets[0]))

    by_mesh = jax.jit(
      jax.shard_map(
        one_peer, mesh=mesh, in_specs=P('peers'), out_specs=P('peers')
      )
    )(stacked, targets)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
      jax.tree.map(lambda x: x.astype(jnp.float32), by_vmap),
      jax.tree.map(lambda x: x.astype(jnp.float32), by_mesh),
    )
    for leaf in jax.tree.leaves(by_mesh[1].anchor):
      np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * 4))

  @pytest.mark.slow
  def test_equals_the_pieces_that_miners_call(self):
    params, targets = toy_params(), (0.0, 1.0, 2.0)
    del params['half']  # how XLA fuses bfloat16 decides how often it rounds
    compression, outer = sl.TopK(), sl.nesterov(0.7, 0.5)
    inner = optax.sgd(0.05)
    tx = sl.sparseloco(
      inner,
      outer=outer,
      inner_steps=2,
      compression=compression,
      error_decay=0.9,
      axis_name='peers',
    )
    stacked = jax.tree.map(lambda p: jnp.stack([p] * 3), params)
    _, state = jax.jit(
      jax.vmap(lambda p, t: train(tx, 4, p, tx.init(p), t), axis_name='peers')
    )(stacked, jnp.array(targets))
    theta, outer_state = params, outer.init(params)
    errors = [sl.init_error(params)] * 3

    @jax.jit
    def contribute(theta, error, target):
      local, _ = train(inner, 2, theta, inner.init(theta), target)
      delta = sl.pseudo_gradient(theta, local)
      return sl.compress(delta, error, compression, 0.9)

    @jax.jit
    def advance(theta, outer_state, messages):
      delta = sl.aggregate(messages, theta, compression)
      return sl.outer_update(outer, delta, outer_state, theta)

    for _ in range(2):
      messages = []
      for r, target in enumerate(targets):
        message, errors[r] = contribute(theta, errors[r], target)
        messages.append(message)
      theta, outer_state = advance(theta, outer_state, messages)
    jax.tree.map(
      lambda got, want: np.testing.assert_allclose(
        got[0].astype(jnp.float32), want.astype(jnp.float32), atol=1e-5
      ),
      state.anchor,
      theta,
    )

  @pytest.mark.slow
  def test_only_the_message_crosses_the_axis(self):
    params = {'w': jnp.zeros((256, 256))}
    tx = sl.sparseloco(optax.sgd(0.1), inner_steps=1, axis_name='peers')
    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )

    def step(params, state, grads):
      one = jax.tree.map(lambda x: x[0], (params, state, grads))
      updates, state = tx.update(one[2], one[1], one[0])
      return jax.tree.map(lambda x: x[None], (updates, state))

    stacked = jax.tree.map(
      lambda x: jnp.stack([x] * 4), (params, tx.init(params), params)
    )
    text = (
      jax.jit(
        jax.shard_map(
          step, mesh=mesh, in_specs=P('peers'), out_specs=P('peers')
        )
      )
      .lower(*stacked)
      .compile()
      .as_text()
    )
    collectives = [
      line
      for line in text.splitlines()
      if any(f' {op}' in line for op in ('all-gather', 'all-reduce'))
    ]
    self.assertNotEmpty(collectives)
    for line in collectives:
      self.assertNotIn('256,256', line)
      self.assertNotIn('16,4096', line)

  def test_statistics_of_the_exchange_by_hand(self):
    """Offered (3, 4, 0, 0), top 1 sent as it is: 4 of 5 remain unsent 3."""
    compression = sl.TopK(k=1, block=(2, 2), quantizer=sl.Sign())
    tx = sl.sparseloco(optax.sgd(1.0), inner_steps=1, compression=compression)
    params = {'w': jnp.zeros(4)}
    _, state = tx.update(
      {'w': jnp.array([3.0, 4.0, 0.0, 0.0])}, tx.init(params), params
    )
    np.testing.assert_allclose(state.stats.relative_error, 3 / 5, rtol=1e-6)
    np.testing.assert_allclose(state.stats.energy_kept, 16 / 25, rtol=1e-6)
    np.testing.assert_allclose(state.stats.error_norm, 3.0, rtol=1e-6)
    np.testing.assert_array_equal(state.stats.code_counts, [0, 1])
    found = optax.tree.get(state, 'relative_error')
    np.testing.assert_array_equal(found, state.stats.relative_error)

  def test_composes_with_chain_and_compiles_once(self):
    params = {'w': jnp.ones((64, 64))}
    tx = optax.chain(
      optax.clip_by_global_norm(1.0), sl.sparseloco(optax.sgd(0.1))
    )
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    state = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    for _ in range(3):
      _, state = step(params, state, params)
    self.assertEqual(step._cache_size(), 1)

  @parameterized.parameters(
    (dict(inner_steps=0), 'inner_steps: expected at least 1, got 0'),
    (dict(error_decay=1.5), 'error_decay: expected 0 to 1, got 1.5'),
  )
  def test_refuses_what_makes_no_sense(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      sl.sparseloco(optax.sgd(0.1), **arguments)

  def test_needs_params(self):
    tx = sl.sparseloco(optax.sgd(0.1))
    params = {'w': jnp.ones(4)}
    with self.assertRaisesRegex(ValueError, 'needs params'):
      tx.update(params, tx.init(params))


if __name__ == '__main__':
  absltest.main()
