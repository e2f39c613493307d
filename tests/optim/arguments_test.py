import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import diloco
from covenant.optim import sparseloco as sl
from covenant.optim.baselines import demo
from covenant.optim.baselines import sparta

make = functools.partial(sl.sparseloco, optax.sgd(0.1))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['weight', 'activation'],
  meta_fields=['use_bias'],
)
@dataclasses.dataclass
class Layer:
  """A layer as Equinox has them."""

  weight: jax.Array
  activation: Callable[[jax.Array], jax.Array] | None
  use_bias: bool


class ConstructionTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda: sl.sparseloco(1e-3), 'inner: expected an optax'),
    (lambda: sl.sparseloco(optax.adam), 'inner: expected an optax'),
    (lambda: sl.sparseloco(optax.sgd(1.0), 30), 'positional argument'),
    (lambda: diloco.diloco(optax.sgd(1.0), 500), 'positional argument'),
    (lambda: make(outer=0.7), 'outer: expected an optax'),
    (lambda: make(inner_steps=2.5), 'inner_steps: expected an integer'),
    (lambda: make(inner_steps=True), 'inner_steps: expected an integer'),
    (lambda: make(inner_steps=0), 'inner_steps: expected at least 1'),
    (lambda: make(error_decay=True), 'error_decay: expected a number'),
    (lambda: make(error_decay=1.5), 'error_decay: expected 0 to 1'),
    (lambda: make(mean_over='mean'), "mean_over: expected 'senders' or 'all'"),
    (lambda: make(clip='medain'), "clip: expected 'median' or 'none'"),
    (lambda: make(inner_steps=np.array(2.5)), 'inner_steps: expected an int'),
    (lambda: make(inner_steps=jnp.int32(0)), 'inner_steps: expected at least'),
    (lambda: make(error_decay=np.array(2.0)), 'error_decay: expected 0 to 1'),
    (lambda: make(axis_name=['a', 'b']), 'axis_name: expected a name'),
    (lambda: make(axis_name=('a', 'a')), 'axis_name: expected .* different'),
    (lambda: make(axis_name=''), 'axis_name: expected a name'),
    (lambda: make(anchor_dtype='int32'), 'anchor_dtype: expected a type of'),
    (lambda: make(anchor_dtype='float64'), 'anchor_dtype: .* jax_enable_x64'),
    (lambda: make(compression=[]), 'compression: expected a compressor'),
    (
      lambda: make(compression={'w': sl.TopK()}).init({'b': 1.0}),
      "compression: expected a tree like .*'b'.*'w'",
    ),
    (
      lambda: make(compression=lambda path, x: None).init({'b': 1.0}),
      r"compression of params\['b'\]: expected a compressor",
    ),
    (
      lambda: make().init({'b': jnp.zeros(2, jnp.complex64)}),
      r"params\['b'\]: expected real numbers, got complex64",
    ),
    (
      lambda: diloco.streaming_diloco(optax.sgd(0.1), fragments=2.5),
      'fragments: expected an integer',
    ),
    (lambda: demo.demo(compression=sl.TopK), 'compression: expected a comp'),
    (lambda: demo.demo(optax.adam(1e-3)), 'learning_rate: expected a number'),
    (lambda: sparta.sparta(1e-3), 'inner: expected an optax'),
    (lambda: sparta.sparta(optax.sgd(0.1), 0.5), 'positional argument'),
    (lambda: sl.Statistical(span=float('inf')), 'span: expected more than 0'),
    (lambda: sl.nesterov(np.array(-1.0)), 'learning_rate: expected 0 or more'),
    (lambda: sl.aggregate([], {}, sl.TopK(), clip='x'), 'clip: expected'),
    (
      lambda: sl.aggregate([], {}, sl.TopK(), weights=[1.0]),
      'weights: expected one for each of 0 messages',
    ),
    (lambda: make(compression=sl.TopK), 'compression: expected a compressor'),
    (lambda: make(compression='topk'), 'compression: expected a compressor'),
    (lambda: sl.TopK(k=0), 'k: expected an integer from 1 to 4096'),
    (lambda: sl.TopK(k=64.0), 'k: expected an integer from 1 to 4096'),
    (lambda: sl.TopK(k=5000), 'k: expected an integer from 1 to 4096'),
    (lambda: sl.TopK(block=64), 'block: expected a tuple of two integers'),
    (lambda: sl.TopK(block=[64, 64]), 'block: expected a tuple of two'),
    (lambda: sl.TopK(block=(0, 64)), 'block: expected a tuple of two'),
    (lambda: sl.TopK(block=(4, 4, 4)), 'block: expected a tuple of two'),
    (lambda: sl.TopK(quantizer='sign'), 'quantizer: expected one such as'),
    (lambda: sl.TopK(quantizer=sl.Sign), 'quantizer: expected one such as'),
    (lambda: sl.Statistical(bits=9), 'bits: expected an integer from 1 to 8'),
    (lambda: sl.Linear(bits=10), 'bits: expected an integer from 1 to 8'),
    (lambda: sl.Linear(bits=0), 'bits: expected an integer from 1 to 8'),
    (lambda: sl.Statistical(span=-1.0), 'span: expected more than 0'),
    (lambda: sl.SignMagnitude(iterations=-1), 'iterations: expected'),
    (lambda: sl.nesterov(-1), 'learning_rate: expected 0 or more'),
    (lambda: sl.nesterov('x'), 'learning_rate: expected a number'),
    (lambda: sl.nesterov(1.0, -0.5), 'momentum: expected 0 to 1'),
    (lambda: sl.compress({}, None, 'topk', None), 'compression: expected a'),
    (lambda: sl.compress({}, {}, sl.TopK, 0.9), 'compression: expected a'),
    (lambda: sl.compress({}, {}, sl.TopK(), 2.0), 'error_decay: expected 0 to'),
    (lambda: sl.decompress({}, {}, sl.TopK), 'compression: expected a comp'),
    (lambda: sl.aggregate([], {}, sl.TopK), 'compression: expected a comp'),
    (lambda: sl.outer_update(0.7, {}, (), {}), 'outer: expected an optax'),
  )
  def test_says_what_is_allowed(self, wrong, message):
    with self.assertRaisesRegex((TypeError, ValueError), message):
      wrong()


class UpdateTest(parameterized.TestCase):
  def mapped(self, axis_name):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ('dcn', 'ici'), kinds)
    spec = jax.P(('dcn', 'ici'))
    tx = make(inner_steps=1, axis_name=axis_name)

    def one(grads):
      zeros = 0 * grads[0]  # typed as varying over the peers, as parameters are
      return tx.update(grads[0], tx.init(zeros), zeros)[0][None]

    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))

  @parameterized.parameters(
    (None, r"the parameters vary along the mesh axes \['dcn', 'ici'\]"),
    ('peers', "there is no axis 'peers' here"),
    (('dcn', 'peers'), r"there is no axis \('dcn', 'peers'\) here"),
  )
  def test_names_the_axis(self, axis_name, message):
    with self.assertRaisesRegex(ValueError, message):
      self.mapped(axis_name)(jnp.ones((8, 8, 8)))

  @pytest.mark.slow
  def test_peers_on_two_axes(self):
    grads = jax.random.normal(jax.random.key(0), (8, 8, 8))
    tx = make(inner_steps=1, axis_name='peers')

    def one(grads):
      zeros = jnp.zeros_like(grads)
      return tx.update(grads, tx.init(zeros), zeros)[0]

    want = jax.jit(jax.vmap(one, axis_name='peers'))(grads)
    got = self.mapped(('dcn', 'ici'))(grads)
    self.assertLess(float(jnp.abs(got - want).max()), 1e-6)

  def test_trees_that_do_not_fit(self):
    tx, params = make(), {'a': jnp.ones(3)}
    state = tx.init(params)
    with self.assertRaisesRegex(ValueError, "updates: expected .*'a'.*'b'"):
      tx.update({'b': jnp.ones(3)}, state, params)
    with self.assertRaisesRegex(ValueError, 'state: expected a tree like'):
      tx.update({'b': jnp.ones(3)}, state, {'b': jnp.ones(3)})
    with self.assertRaisesRegex(
      ValueError, r"updates\['a'\]: .*\(3,\).*\(1,\)"
    ):
      tx.update({'a': jnp.ones(1)}, state, params)
    with self.assertRaisesRegex(TypeError, 'state: .* SparseLoCoState of init'):
      tx.update(params, params, params)

  @parameterized.parameters(
    (2,), (np.float32(2),), (np.array(-1.0),), (np.nan,)
  )
  def test_weight_is_from_0_to_1(self, weight):
    params = {'a': jnp.ones(3)}
    for tx in (
      make(),
      demo.demo(),
      sparta.sparta(optax.sgd(0.1)),
      diloco.streaming_diloco(optax.sgd(0.1)),
    ):
      state = tx.init(params)
      with self.assertRaisesRegex(ValueError, 'weight: expected 0 to 1, got'):
        tx.update(params, state, params, weight=weight)
      with self.assertRaisesRegex(TypeError, 'weight: expected a number'):
        tx.update(params, state, params, weight=jnp.ones(4))

  def test_flush_needs_rounds(self):
    params = {'a': jnp.ones(3)}
    for tx in optax.adam(0.1), demo.demo():
      with self.assertRaisesRegex(TypeError, 'flush: expected a state of'):
        sl.flush(tx, tx.init(params), params)
    tx = make()
    with self.assertRaisesRegex(TypeError, 'flush: expected True or False'):
      tx.update(params, tx.init(params), params, flush='no')

  @pytest.mark.slow
  def test_leaves_without_gradients(self):
    """A whole model of Equinox has functions as leaves, and static fields."""
    model = Layer(jnp.ones((3, 2)), jax.nn.relu, use_bias=False)
    arrays = dataclasses.replace(model, activation=None)
    tx = make(inner_steps=1)

    @jax.jit
    def step(weight, state):
      whole = dataclasses.replace(model, weight=weight)
      grads = jax.grad(
        lambda m: jnp.sum(whole.activation(m.weight) ** 2)
      )(dataclasses.replace(arrays, weight=weight))  # fmt: skip
      return tx.update(grads, state, whole)

    updates, state = step(model.weight, tx.init(arrays))
    self.assertIsNone(updates.activation)
    self.assertGreater(float(jnp.abs(updates.weight).max()), 0)
    self.assertEqual(
      jax.tree.structure(state.anchor), jax.tree.structure(arrays)
    )


if __name__ == '__main__':
  absltest.main()
