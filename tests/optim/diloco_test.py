import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import diloco
from covenant.optim import sparseloco as sl

P = jax.P


class DilocoTest(absltest.TestCase):
  @pytest.mark.slow
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

  @pytest.mark.slow
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


def toy_params():
  rng = np.random.default_rng(0)
  shapes = {'a': (3, 2), 'b': (), 'c': (4,), 'd': (2, 2), 'e': (5,)}
  return {
    name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }


def train(tx, params, target, steps):
  """Gradient descent on |x - target|^2 / 2; all parameters on the way."""
  state, seen = tx.init(params), []
  for _ in range(steps):
    gradients = jax.tree.map(lambda x: x - target.astype(x.dtype), params)
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return jax.tree.map(lambda *xs: jnp.stack(xs), *seen), state


def in_numpy(
  params, targets_R, steps, rate, outer, inner_steps, fragments, tau, alpha
):
  """Streaming DiLoCo, algorithm 2 of the paper, leaf by leaf in float64.

  Args:
    params: where all peers begin.
    targets_R: of each peer's gradients.
    steps: inner steps.
    rate: inner learning rate.
    outer: outer learning rate and Nesterov momentum.
    inner_steps: H.
    fragments: P.
    tau: the overlap.
    alpha: the peer's share.

  Returns:
    For each leaf the parameters of all peers after all steps, [R, T, ...].
  """
  rows = []
  for i, leaf in enumerate(jax.tree.leaves(params)):
    offset = (i % fragments) * inner_steps // fragments
    shared = np.asarray(leaf, np.float64)
    peers = [shared.copy() for _ in targets_R]
    momentum, in_flight, seen = np.zeros_like(shared), {}, []
    for t in range(1, steps + 1):
      peers = [
        x - rate * (x - target)
        for x, target in zip(peers, targets_R, strict=True)
      ]
      if t % inner_steps == offset % inner_steps:
        in_flight[t + tau] = np.mean([shared - x for x in peers], axis=0)
      if t in in_flight:
        delta = in_flight.pop(t)
        momentum = outer[1] * momentum + delta
        shared = shared - outer[0] * (delta + outer[1] * momentum)
        peers = [alpha * x + (1 - alpha) * shared for x in peers]
      seen.append(peers)
    rows.append(np.stack(seen, axis=1))
  return rows


class StreamingTest(parameterized.TestCase):
  def test_two_peers_by_hand(self):
    """H = 2, tau = 1, alpha = 0.5, inner SGD 0.1, outer SGD 1; gradients 1, 3.

    From 10: after 9.9, 9.7 come 9.8, 9.4, when the mean delta 0.4 is sent. One
    step later, at 9.7, 9.1, the anchor is 10 - 0.4 = 9.6, so the peers go to
    (9.7 + 9.6) / 2 = 9.65 and (9.1 + 9.6) / 2 = 9.35. Next 9.55, 9.05: sent is
    9.6 - 9.3 = 0.3; then 9.45, 8.75 meet the anchor 9.3: 9.375 and 9.025.
    """
    tx = diloco.streaming_diloco(
      optax.sgd(0.1),
      outer=sl.nesterov(1.0),
      inner_steps=2,
      overlap=1,
      mixing=0.5,
      axis_name='peers',
    )

    def run(gradient):
      params = jnp.float32(10.0)
      state, seen = tx.init(params), []
      for _ in range(5):
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
      return jnp.stack(seen), state.fragments[0].anchor

    seen, anchors = jax.jit(jax.vmap(run, axis_name='peers'))(
      jnp.array([1.0, 3.0])
    )
    np.testing.assert_allclose(
      seen,
      [[9.9, 9.8, 9.65, 9.55, 9.375], [9.7, 9.4, 9.35, 9.05, 9.025]],
      rtol=1e-6,
    )
    np.testing.assert_allclose(anchors, [9.3, 9.3], rtol=1e-6)

  def test_fragments_take_turns_by_hand(self):
    """H = 4, two fragments of one leaf each: 'b' at 2, 6, 'a' at 4, 8.

    One peer, inner SGD 1, gradient 1, outer SGD 0.5: a synchronization takes
    back half of what was done since the last. 'b' falls to -2 and is set to
    -1; four steps later -5 is set to -3. 'a' falls to -4, then from -2.
    """
    tx = diloco.streaming_diloco(
      optax.sgd(1.0), outer=sl.nesterov(0.5), inner_steps=4, fragments=2
    )

    def run(params):
      state, seen = tx.init(params), []
      for _ in range(8):
        updates, state = tx.update({'a': 1.0, 'b': 1.0}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
      return jax.tree.map(lambda *xs: jnp.stack(xs), *seen)

    seen = jax.jit(run)({'a': jnp.float32(0), 'b': jnp.float32(0)})
    np.testing.assert_array_equal(seen['a'], [-1, -2, -3, -2, -3, -4, -5, -4])
    np.testing.assert_array_equal(seen['b'], [-1, -1, -2, -3, -4, -3, -4, -5])

  @pytest.mark.slow
  def test_eleven_steps_of_four_peers_follow_the_paper(self):
    params, targets = toy_params(), np.array([-1.0, 0.5, 1.0, 3.0])
    tx = diloco.streaming_diloco(
      optax.sgd(0.1),
      inner_steps=4,
      fragments=3,
      overlap=2,
      mixing=0.25,
      axis_name='peers',
    )

    def run(target):
      return train(tx, params, target, 11)

    stacked = jnp.asarray(targets, jnp.float32)
    by_vmap = jax.jit(jax.vmap(run, axis_name='peers'))(stacked)

    def one_peer(targets):
      return jax.tree.map(lambda x: x[None], run(targets[0]))

    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    by_mesh = jax.jit(
      jax.shard_map(
        one_peer, mesh=mesh, in_specs=P('peers'), out_specs=P('peers')
      )
    )(stacked)
    want = in_numpy(params, targets, 11, 0.1, (0.7, 0.9), 4, 3, 2, 0.25)
    for seen, state in (by_vmap, by_mesh):
      for got, leaf in zip(jax.tree.leaves(seen), want, strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)
      for anchor in jax.tree.leaves([f.anchor for f in state.fragments]):
        np.testing.assert_array_equal(anchor, np.stack([anchor[0]] * 4))

  @pytest.mark.slow
  def test_in_one_piece_and_at_once_it_is_diloco(self):
    params, targets = toy_params(), jnp.arange(4.0)
    run = functools.partial(train, params=params, steps=6)
    arguments = dict(inner_steps=3, axis_name='peers')
    inner = optax.sgd(0.1, momentum=0.9)
    (got, _), (want, _) = (
      jax.jit(jax.vmap(lambda t, tx=tx: run(tx, target=t), axis_name='peers'))(
        targets
      )
      for tx in (
        diloco.streaming_diloco(inner, **arguments),
        diloco.diloco(inner, **arguments),
      )
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)

  def test_composes_keeps_its_types_and_compiles_once(self):
    params = {'w': jnp.ones((4, 4), jnp.bfloat16), 'b': jnp.ones(3)}
    tx = optax.chain(
      optax.clip(1.0),
      diloco.streaming_diloco(
        optax.sgd(0.1), inner_steps=2, fragments=2, overlap=1, mixing=0.5
      ),
    )
    state = tx.init(params)
    step = jax.jit(tx.update)
    types = jax.tree.map(jax.typeof, (params, state))
    for _ in range(5):
      updates, state = step(params, state, params)
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual(jax.tree.map(jax.typeof, (updates, state)), types)

  def test_state_types_are_those_a_scan_in_a_mesh_needs(self):
    tx = diloco.streaming_diloco(
      optax.sgd(0.1), inner_steps=2, fragments=2, overlap=1, axis_name='peers'
    )

    def one_peer(params):
      def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

      return jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0]

    mesh = jax.make_mesh(
      (4,), ('peers',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    params = {'a': jnp.ones(4), 'b': jnp.ones(8)}
    out = jax.eval_shape(
      jax.shard_map(
        one_peer, mesh=mesh, in_specs=P('peers'), out_specs=P('peers')
      ),
      params,
    )
    self.assertEqual(out['a'].shape, (4,))

  @parameterized.parameters(
    (dict(inner_steps=0), 'inner_steps: expected at least 1, got 0'),
    (dict(fragments=3), 'fragments: expected 1 to inner_steps = 2, got 3'),
    (dict(overlap=2), 'overlap: expected 0 to inner_steps - 1 = 1, got 2'),
    (dict(mixing=-0.5), 'mixing: expected 0 to 1, got -0.5'),
  )
  def test_refuses_what_makes_no_sense(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      diloco.streaming_diloco(optax.sgd(0.1), **{'inner_steps': 2, **arguments})

  def test_refuses_more_fragments_than_leaves(self):
    tx = diloco.streaming_diloco(optax.sgd(0.1), fragments=2)
    with self.assertRaisesRegex(ValueError, 'fragments: .* 1 leaves .* got 2'):
      tx.init({'w': jnp.ones(4)})

  def test_needs_params(self):
    tx = diloco.streaming_diloco(optax.sgd(0.1))
    params = {'w': jnp.ones(4)}
    with self.assertRaisesRegex(ValueError, 'needs params'):
      tx.update(params, tx.init(params))


if __name__ == '__main__':
  absltest.main()
