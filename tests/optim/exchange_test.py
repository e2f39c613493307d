"""Tests for covenant.optim.exchange, through the transformation."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import diloco
from covenant.optim import exchange
from covenant.optim import preset
from covenant.optim import sparseloco as sl
from covenant.optim.baselines import demo
from covenant.optim.baselines import sparta

PEERS = 4
P = jax.P


def make(**arguments):
  arguments = dict(inner_steps=2, axis_name='peers') | arguments
  return sl.sparseloco(optax.sgd(0.5), **arguments)


def params_of(layers=1):
  layer = lambda: {'w': jnp.zeros((16, 24)), 'b': jnp.zeros(24)}  # noqa: E731
  return {f'layer{i}': layer() for i in range(layers)}


def started(tx, params):
  """State and axes of peers that share an anchor, for `jax.vmap`."""
  axes = sl.state_axes(tx.init(params), None, 0)
  init = jax.vmap(
    lambda: tx.init(params),
    axis_name='peers',
    axis_size=PEERS,
    out_axes=axes,
  )
  return init(), axes


def grads_of(params, seed):
  keys = jax.random.split(jax.random.key(seed), PEERS)
  return jax.vmap(
    lambda k: jax.tree.map(lambda x: jax.random.normal(k, x.shape), params)
  )(keys)


def train(tx, params, steps, change=lambda i, g: g, weight=None):
  """Returns stacked parameters and the state after `steps` of four peers."""
  state, axes = started(tx, params)
  stacked = jax.tree.map(lambda x: jnp.stack([x] * PEERS), params)
  weight = jnp.ones(PEERS) if weight is None else jnp.asarray(weight)

  def one(p, s, g, w):
    updates, s = tx.update(g, s, p, weight=w)
    return optax.apply_updates(p, updates), s

  step = jax.jit(
    jax.vmap(
      one, axis_name='peers', in_axes=(0, axes, 0, 0), out_axes=(0, axes)
    )
  )
  for i in range(steps):
    grads = change(i, grads_of(params, i))
    stacked, state = step(stacked, state, grads, weight)
  return stacked, state


def poison(peer, steps):
  def change(i, grads):
    if i not in steps:
      return grads
    return jax.tree.map(lambda g: g.at[peer].set(jnp.nan), grads)

  return change


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(
    [[(0, 16, 8)]], [[(16, 8), (0, 4, 4)]], [[(16, 8), (4, 0), (5,)]]
  )
  def test_leaves_without_values_are_exchanged_with_others(self, shapes):
    like = [jax.ShapeDtypeStruct((PEERS, *s), jnp.float32) for s in shapes]
    parts = jax.ShapeDtypeStruct((PEERS,), jnp.int32)
    tops = [sl.TopK(4, (8, 8))] * len(shapes)

    def one(delta, error, parts):
      rules = exchange.Rules('peers', 0.95)
      free = [()] * len(shapes)
      return exchange.exchange(delta, error, parts, tops, rules, free)

    found = jax.eval_shape(jax.vmap(one, axis_name='peers'), like, like, parts)
    self.assertEqual([x.shape for x in found.delta], [x.shape for x in like])


class WeightsTest(absltest.TestCase):
  @pytest.mark.slow
  def test_a_peer_of_weight_zero_is_as_if_absent(self):
    params = params_of()
    weights = [1.0, 0.0, 1.0, 1.0]
    tx = make(compression=sl.TopK(4, (8, 8)))
    stacked, state = train(tx, params, 2, weight=weights)
    grads = [grads_of(params, i) for i in range(2)]
    delta = jax.tree.map(lambda a, b: 0.5 * (a + b), *grads)
    messages = [
      sl.compress(
        jax.tree.map(lambda d, r=r: d[r], delta),
        sl.init_error(params), sl.TopK(4, (8, 8)), 0.95,
      )[0]
      for r in (0, 2, 3)
    ]  # fmt: skip
    want = sl.aggregate(messages, params, sl.TopK(4, (8, 8)))
    jax.tree.map(
      lambda a, w: np.testing.assert_allclose(a, -w, atol=1e-6),
      state.anchor,
      want,
    )
    for x in jax.tree.leaves(state.error):
      self.assertEqual(float(jnp.abs(x[1]).max()), 0)  # it had none before
      self.assertGreater(float(jnp.abs(x[0]).max()), 0)
    for x, a in zip(
      jax.tree.leaves(stacked), jax.tree.leaves(state.anchor), strict=True
    ):
      np.testing.assert_allclose(x, jnp.stack([a] * PEERS), atol=1e-6)

  @pytest.mark.slow
  def test_weights_are_those_of_aggregate(self):
    params = params_of()
    parts = [64, 16, 0, 40]
    tx = make(inner_steps=1, compression=sl.TopK(4, (8, 8)))
    _, state = train(tx, params, 1, weight=np.array(parts) / 64)
    delta = jax.tree.map(lambda g: 0.5 * g, grads_of(params, 0))
    messages = [
      sl.compress(
        jax.tree.map(lambda d, r=r: d[r], delta),
        sl.init_error(params), sl.TopK(4, (8, 8)), 0.95,
      )[0]
      for r in range(PEERS)
    ]  # fmt: skip
    want = sl.aggregate(
      messages, params, sl.TopK(4, (8, 8)), weights=[p / 64 for p in parts]
    )
    jax.tree.map(
      lambda a, w: np.testing.assert_allclose(a, -w, atol=1e-6),
      state.anchor,
      want,
    )

  @pytest.mark.slow
  def test_a_tensor_that_half_of_the_peers_touch_moves(self):
    def change(_, grads):
      return jax.tree.map(lambda g: g.at[2:].set(0), grads)

    _, state = train(make(), params_of(), 2, change)
    for x in jax.tree.leaves(state.anchor):
      self.assertGreater(float(jnp.abs(x).max()), 0.1)


class NotFiniteTest(parameterized.TestCase):
  @parameterized.parameters((optax.sgd(0.5),), (optax.sgd(0.1, momentum=0.9),))
  @pytest.mark.slow
  def test_a_lost_round_costs_the_others_nothing(self, inner):
    params = params_of()
    tx = sl.sparseloco(inner, inner_steps=4, axis_name='peers')
    _, state = train(tx, params, 4, poison(3, (0, 1, 2)))
    _, without = train(tx, params, 4, weight=[1, 1, 1, 0])
    jax.tree.map(np.testing.assert_array_equal, state.anchor, without.anchor)
    for x in jax.tree.leaves(state.error):
      self.assertEqual(float(jnp.abs(x[3]).max()), 0)
    stacked, state = train(tx, params, 8, poison(3, (0, 1, 2)))
    for x in jax.tree.leaves((stacked, state.inner, state.error)):
      self.assertTrue(bool(jnp.isfinite(x).all()))
    for x in jax.tree.leaves(state.error):
      self.assertGreater(float(jnp.abs(x[3]).max()), 0)  # it takes part again

  @parameterized.parameters('streaming', 'demo', 'sparta')
  @pytest.mark.slow
  def test_other_methods(self, name):
    """Neither a peer's infinities nor its weight of 0 reach the others."""
    tx = {
      'streaming': diloco.streaming_diloco(
        optax.sgd(0.5), inner_steps=2, fragments=2, axis_name='peers'
      ),
      'demo': demo.demo(0.1, axis_name='peers'),
      'sparta': sparta.sparta(optax.sgd(0.5), p=1.0, axis_name='peers'),
    }[name]
    params = {'w': jnp.zeros((8, 8)), 'b': jnp.zeros(8)}
    stacked, _ = train(tx, params, 4, poison(3, (0, 1, 2)))
    for x in jax.tree.leaves(stacked):
      self.assertTrue(bool(jnp.isfinite(x).all()))
    first = []
    for other in 7.0, -9.0:

      def change(_, grads, x=other):
        return jax.tree.map(lambda g: g.at[1:].set(x), grads)

      stacked, _ = train(tx, params, 3, change, weight=[1, 0, 0, 0])
      first.append(jax.tree.map(lambda x: x[0], stacked))
    jax.tree.map(np.testing.assert_array_equal, *first)

  @pytest.mark.slow
  def test_a_parameter_that_overflows(self):
    """The update is finite and its sum with the parameter is not."""
    params = {'w': jnp.full((8, 8), 6e4, jnp.float16)}

    def change(_, grads):
      ones = jax.tree.map(lambda g: jnp.ones_like(g, jnp.float16), grads)
      return jax.tree.map(lambda g: g.at[3].set(-6e4), ones)

    stacked, state = train(make(), params, 2, change)
    for x in jax.tree.leaves((stacked, state.error)):
      self.assertTrue(bool(jnp.isfinite(x).all()))
    np.testing.assert_array_equal(stacked['w'][3], state.anchor['w'])

  @pytest.mark.slow
  def test_under_the_templar_preset(self):
    arguments = preset.templar()._asdict() | dict(inner_steps=2)
    tx = sl.sparseloco(optax.sgd(0.5), axis_name='peers', **arguments)
    params = {'w': jnp.zeros((16, 24))}
    _, early = train(tx, params, 4, poison(3, (0, 1, 2)))
    stacked, late = train(tx, params, 6, poison(3, (0, 1, 2)))
    for x in jax.tree.leaves((stacked, late.anchor, late.error)):
      self.assertTrue(bool(jnp.isfinite(x).all()))
    moved = jnp.abs(late.anchor['w'] - early.anchor['w']).max()
    self.assertGreater(float(moved), 0.1)

  @pytest.mark.slow
  def test_of_parameters_that_are_not_finite(self):
    """The delta itself is not finite: weight 0, and nothing spreads."""
    params = params_of()
    tx = make(inner_steps=1)
    state, axes = started(tx, params)
    broken = jax.tree.map(lambda x: jnp.stack([x, x, x, x * jnp.nan]), params)
    step = jax.vmap(
      lambda p, s, g: tx.update(g, s, p),
      axis_name='peers', in_axes=(0, axes, 0), out_axes=(0, axes),
    )  # fmt: skip
    _, state = step(broken, state, grads_of(params, 0))
    for x in jax.tree.leaves((state.anchor, state.error)):
      self.assertTrue(bool(jnp.isfinite(x).all()))


class ProgramTest(parameterized.TestCase):
  def compiled(self, tx, layers, peers=8):
    return self.lowered(tx, layers, peers).compile().as_text()

  def lowered(self, tx, layers, peers=8):
    mesh = jax.make_mesh((peers,), ('peers',), (jax.sharding.AxisType.Auto,))
    params = params_of(layers)
    own = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731

    def one(params, grads):
      first = jax.tree.map(lambda x: x[0], (params, grads))
      updates, new = tx.update(first[1], tx.init(first[0]), first[0])
      return own(updates), new.anchor

    stacked = jax.tree.map(lambda x: jnp.stack([x] * peers), params)
    f = jax.jit(
      jax.shard_map(
        one, mesh=mesh, in_specs=P('peers'), out_specs=(P('peers'), P('peers'))
      )
    )
    return f.lower(stacked, stacked)

  @pytest.mark.slow
  def test_does_not_grow_with_peers_and_little_with_leaves(self):
    """Counted in operations; benchmarks/exchange.py measures seconds."""

    def size(layers, peers):
      text = self.lowered(make(inner_steps=1), layers, peers).as_text()
      return text.count(' = ')

    base = size(1, 2)
    self.assertLess(size(1, 8), 1.01 * base)
    leaf = (size(8, 2) - base) / (7 * len(params_of(1)))
    self.assertLess(leaf, base / 20)

  @pytest.mark.slow
  def test_collectives_do_not_grow_with_leaves(self):
    for layers in 1, 6:
      text = self.compiled(make(inner_steps=1), layers)
      found = re.findall(
        r' (all-gather|all-reduce|collective-permute|all-to-all)(?:-start)?\(',
        text,
      )
      self.assertLessEqual(len(found), 4, found)

  @parameterized.parameters((sl.Sign(), 9.5), (sl.SignMagnitude(), 10.5))
  @pytest.mark.rows(1)
  def test_bits_that_cross_the_axis(self, quantizer, most):
    tx = make(inner_steps=1, compression=sl.TopK(64, (64, 64), quantizer))
    mesh = jax.make_mesh((8,), ('peers',), (jax.sharding.AxisType.Auto,))
    x = jnp.zeros((8, 512, 512))
    one = lambda g: tx.update(g[0], tx.init(g[0]), g[0])[0][None]  # noqa: E731
    f = jax.shard_map(one, mesh=mesh, in_specs=P('peers'), out_specs=P('peers'))
    text = jax.jit(f).lower(x).compile().as_text()
    sizes = re.findall(r'= (\w+)\[([\d,]+)\]\S* all-gather', text)
    bits = sum(
      32 * math.prod(map(int, dims.split(','))) / 8
      for kind, dims in sizes
      if kind in ('u32', 's32', 'f32')
    )
    self.assertLen(sizes, 1)
    self.assertLessEqual(bits / (512 * 512 / 64), most)

  @parameterized.parameters(sl.sparseloco, diloco.streaming_diloco)
  def test_vmap_exchanges_only_when_due(self, method):
    params = params_of()
    tx = method(optax.sgd(0.5), inner_steps=3, axis_name='peers')
    state, axes = started(tx, params)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * PEERS), params)
    step = jax.vmap(
      lambda g, s, p: tx.update(g, s, p),
      axis_name='peers', in_axes=(0, axes, 0), out_axes=(0, axes),
    )  # fmt: skip
    program = jax.make_jaxpr(step)(grads_of(params, 0), state, stacked)
    # The exchange has a `cond` of its own, which lies in a branch of another.
    branches = [
      str(e.params['branches'])
      for e in program.eqns
      if e.primitive.name == 'cond'
    ]
    self.assertTrue(any('cond[' in x for x in branches))


if __name__ == '__main__':
  absltest.main()
