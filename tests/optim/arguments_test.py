import functools

import jax
import jax.numpy as jnp
import optax
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import diloco
from covenant.optim import sparseloco as sl

make = functools.partial(sl.sparseloco, optax.sgd(0.1))


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
    (lambda: make(axis_name=['a', 'b']), 'axis_name: expected a name'),
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
    (lambda: sl.nesterov(1.0, -0.5), 'momentum: expected 0 or more'),
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
      zeros = jnp.zeros_like(grads[0])
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
    with self.assertRaisesRegex(ValueError, 'weight: expected 0 to 1, got 2'):
      tx.update(params, state, params, weight=2)


if __name__ == '__main__':
  absltest.main()
