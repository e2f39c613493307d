"""The transformation among types, schedules, meshes and checkpoints."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import absltest
from absl.testing import parameterized
from orbax.checkpoint import v1

from covenant.optim import diloco
from covenant.optim import sparseloco as sl
from covenant.optim.baselines import demo
from covenant.optim.baselines import sparta

P = jax.P
AUTO = jax.sharding.AxisType.Auto
EXPLICIT = jax.sharding.AxisType.Explicit
SMALL = sl.TopK(4, (8, 8))
# Adam mixes types implicitly, which these tests do not allow.
INNER = optax.sgd(1e-2, momentum=0.9)


def make(**arguments):
  arguments = dict(inner_steps=2, compression=SMALL) | arguments
  return sl.sparseloco(INNER, outer=sl.nesterov(0.7, 0.9), **arguments)


def train_step(tx, params, state):
  updates, state = tx.update(params, state, params)
  return optax.apply_updates(params, updates), state


def types(tree):
  return jax.tree.map(jax.typeof, tree)


METHODS = {
  'sparseloco': make,
  'exact': lambda: make(compression=sl.TopK(quantizer=sl.Exact())),
  'statistical': lambda: make(compression=sl.TopK(4, (8, 8), sl.Statistical())),
  'no_feedback': lambda: make(error_decay=None),
  'diloco': lambda: diloco.diloco(INNER, inner_steps=2),
  'streaming': lambda: diloco.streaming_diloco(
    INNER, inner_steps=2, fragments=2
  ),
  'demo': lambda: demo.demo(1e-2),
  'sparta': lambda: sparta.sparta(INNER),
}


class TypesTest(parameterized.TestCase):
  @parameterized.parameters('sparseloco', 'statistical', 'diloco', 'demo')
  @pytest.mark.slow
  def test_of_64_bits_stay(self, method):
    with jax.enable_x64(True):
      params = {
        'a': jnp.ones((16, 16)),
        'b': jnp.ones(3, jnp.bfloat16),
        'c': jnp.ones((), jnp.float32),
      }
      tx = METHODS[method]()
      state = tx.init(params)
      before = types((params, state))
      step = jax.jit(functools.partial(train_step, tx))
      for _ in range(3):
        params, state = step(params, state)
        self.assertEqual(types((params, state)), before)
      self.assertEqual(step._cache_size(), 1)
      self.assertEqual(params['a'].dtype, jnp.float64)

  @pytest.mark.slow
  def test_updates_of_other_types_than_the_parameters(self):
    with jax.numpy_dtype_promotion('standard'):
      params = {
        'narrow': jnp.ones(8, jnp.bfloat16),
        'wide': jnp.ones(8),
        'count': jnp.arange(3),
      }
      grads = {
        'narrow': jnp.ones(8),
        'wide': jnp.ones(8, jnp.bfloat16),
        'count': jnp.zeros(3, jnp.int32),
      }
      tx = sl.sparseloco(optax.sgd(0.3), inner_steps=2)
      state, kinds = tx.init(params), types(params)
      step = jax.jit(tx.update)
      for _ in range(2):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
      self.assertEqual(types(params), kinds)
      jax.tree.map(np.testing.assert_array_equal, params, state.anchor)

  def test_a_float32_anchor_of_bfloat16_parameters(self):
    """Outer steps of 2^-10 of a parameter add up in the anchor."""
    tx = sl.sparseloco(
      optax.sgd(2.0**-10),
      inner_steps=1,
      compression=sl.Dense(),
      anchor_dtype='float32',
    )
    params = {'w': jnp.ones(4, jnp.bfloat16)}
    state, ones = tx.init(params), {'w': jnp.ones(4, jnp.bfloat16)}
    self.assertEqual(state.anchor['w'].dtype, jnp.float32)
    self.assertEqual(tx.update(ones, state, params)[0]['w'].dtype, jnp.bfloat16)

  @pytest.mark.slow
  def test_a_choice_per_leaf(self):
    params = {'w': jnp.ones((16, 16)), 'norm': jnp.ones(16)}
    for choice in (
      lambda path, x: sl.Dense() if x.ndim < 2 else SMALL,
      {'w': SMALL, 'norm': sl.Dense()},
    ):
      tx = make(inner_steps=1, compression=choice)
      _, state = jax.jit(tx.update)(params, tx.init(params), params)
      self.assertEqual(float(jnp.abs(state.error['norm']).max()), 0)
      self.assertGreater(float(jnp.abs(state.error['w']).max()), 0)


class SchedulesTest(absltest.TestCase):
  @pytest.mark.slow
  def test_of_outer_rate_decay_and_inner_steps(self):
    def scheduled(rate, error_decay, inner_steps):
      return sl.sparseloco(
        optax.sgd(0.1),
        outer=sl.nesterov(rate, 0.9),
        error_decay=error_decay,
        inner_steps=inner_steps,
        compression=SMALL,
      )

    tx = optax.inject_hyperparams(scheduled)(
      rate=optax.linear_schedule(1.0, 0.5, 10),
      error_decay=optax.linear_schedule(0.95, 0.5, 10),
      inner_steps=lambda count: jnp.where(count < 4, 2, 4),
    )
    params = {'w': jnp.ones((16, 16))}
    state, step, seen = tx.init(params), jax.jit(tx.update), []
    for _ in range(12):
      _, state = step(params, state, params)
      seen.append(int(state.inner_state.exchanged))
    self.assertEqual(seen, [0, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 12])
    self.assertEqual(step._cache_size(), 1)


class FlushTest(absltest.TestCase):
  def test_exchanges_before_a_round_is_over(self):
    params = jnp.zeros((4, 16))
    grads = jnp.arange(4.0)[:, None] * jnp.ones((4, 16))
    tx = sl.sparseloco(
      optax.sgd(1.0),
      inner_steps=30,
      compression=sl.Dense(),
      axis_name='peers',
      clip='none',
    )

    def run(params, grads):
      updates, state = tx.update(grads, tx.init(params), params)
      params = optax.apply_updates(params, updates)
      updates, state = sl.flush(tx, state, params)
      params = optax.apply_updates(params, updates)
      again, _ = sl.flush(tx, state, params)
      return params, state.anchor, state.count - state.exchanged, again

    params, anchor, since, again = jax.jit(jax.vmap(run, axis_name='peers'))(
      params, grads
    )
    np.testing.assert_allclose(anchor, -1.5 * np.ones((4, 16)), rtol=1e-6)
    np.testing.assert_allclose(params, anchor, rtol=1e-6)
    np.testing.assert_array_equal(since, np.zeros(4))
    np.testing.assert_allclose(again, np.zeros((4, 16)), atol=1e-6)


class MeshTest(absltest.TestCase):
  def on_peers(self, f):
    def one(*arrays):
      mine = jax.tree.map(lambda x: x[0], arrays)
      return jax.tree.map(lambda x: x[None], f(*mine))

    return jax.jit(
      jax.shard_map(
        one, in_specs=P('peers'), out_specs=P('peers'), axis_names={'peers'}
      )
    )

  def trained(self, kinds):
    tx = make(axis_name='peers')
    mesh = jax.make_mesh((2, 4), ('peers', 'fsdp'), kinds)
    with jax.set_mesh(mesh):
      params = jax.device_put(
        {'w': jnp.ones((2, 64, 32)), 'n': jnp.ones((2, 8))},
        {
          'w': jax.NamedSharding(mesh, P('peers', 'fsdp')),
          'n': jax.NamedSharding(mesh, P('peers')),
        },
      )
      state = self.on_peers(tx.init)(params)
      step = self.on_peers(functools.partial(train_step, tx))
      for _ in range(4):
        params, state = step(params, state)
    return jax.device_get(params), step._cache_size()

  @pytest.mark.slow
  def test_automatic_shards_compile_once(self):
    _, programs = self.trained((AUTO, AUTO))
    self.assertEqual(programs, 1)

  @pytest.mark.slow
  def test_explicit_shards_under_automatic_peers(self):
    got, _ = self.trained((AUTO, EXPLICIT))
    want, _ = self.trained((EXPLICIT, EXPLICIT))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want
    )

  @pytest.mark.slow
  def test_the_anchor_leaves_as_replicated(self):
    mesh = jax.make_mesh((4,), ('peers',), (AUTO,), devices=jax.devices()[:4])
    tx = make(inner_steps=1, axis_name='peers')

    def anchor(grads):
      params = jnp.zeros((16, 16))
      return tx.update(grads[0], tx.init(params), params)[1].anchor

    f = jax.shard_map(anchor, mesh=mesh, in_specs=P('peers'), out_specs=P())
    self.assertEqual(jax.jit(f)(jnp.ones((4, 16, 16))).shape, (16, 16))


class CheckpointTest(parameterized.TestCase):
  @parameterized.parameters(*METHODS)
  def test_flax(self, method):
    state = self.state(method)
    restored = flax.serialization.from_bytes(
      state, flax.serialization.to_bytes(state)
    )
    jax.tree.map(np.testing.assert_array_equal, restored, state)

  @parameterized.parameters('sparseloco', 'exact', 'diloco', 'streaming')
  def test_orbax(self, method):
    state = self.state(method)
    folder = self.create_tempdir().full_path
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(f'{folder}/standard', state)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(f'{folder}/standard', state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)

  @parameterized.parameters('sparseloco', 'exact', 'diloco')
  @pytest.mark.slow
  def test_orbax_manager_and_v1(self, method):
    state = self.state(method)
    folder = self.create_tempdir().full_path
    with ocp.CheckpointManager(f'{folder}/manager') as manager:
      manager.save(0, args=ocp.args.StandardSave(state))
      manager.wait_until_finished()
      restored = manager.restore(0, args=ocp.args.StandardRestore(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    v1.save(f'{folder}/v1', state)
    restored = v1.load(f'{folder}/v1', state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)

  def state(self, method):
    params = {'w': jnp.ones((8, 8)), 'b': jnp.ones(4)}
    return METHODS[method]().init(params)


if __name__ == '__main__':
  absltest.main()
