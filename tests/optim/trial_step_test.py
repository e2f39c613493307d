import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import compression as compression_lib
from covenant.optim import outer_step as outer_step_lib
from covenant.optim import quantize
from covenant.optim import reduce
from covenant.optim import trial_step
from tests.optim import trees

RATE = 0.14
COMPRESSIONS = {
  'signs': compression_lib.TopK(4, trees.BLOCK),
  'statistical': compression_lib.TopK(4, trees.BLOCK, quantize.Statistical()),
  'dense': compression_lib.Dense(),
}


def message_of(compression, shapes=trees.SHAPES):
  compress = jax.jit(lambda tree: jax.tree.map(compression.compress, tree))
  return jax.device_get(compress(trees.random_tree(shapes, seed=1)))


def placed(params, mesh, specs):
  if mesh is None:
    return jax.tree.map(jax.numpy.array, params)
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)),
    params,
    specs,
  )


@functools.cache
def outer_step(kind):
  """Parameters, a message, and what an outer step of it alone makes of them."""
  compression = COMPRESSIONS[kind]
  params = trees.random_tree(trees.SHAPES, seed=0)
  message = message_of(compression)
  outer = reduce.nesterov(RATE)
  step = outer_step_lib.OuterStep(params, compression, outer, clip='none')
  whole = step.apply(params, outer.init(params), [message])
  return params, message, jax.device_get(whole.params)


class TrialStepTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_has_the_bits_of_an_outer_step_and_takes_it_back(self):
    self.same_bits('statistical', (2, 2), 128)

  @parameterized.product(
    kind=list(COMPRESSIONS),
    mesh=(None, (2, 2), (4, 1)),
    budget=(1 << 20, 128),  # whole leaves, and slices
  )
  @pytest.mark.slow
  def test_whatever_the_messages_the_mesh_and_the_slices(
    self, kind, mesh, budget
  ):
    self.same_bits(kind, mesh, budget)

  def same_bits(self, kind, mesh, budget):
    """Compares a step of one message with an outer step of it alone."""
    compression = COMPRESSIONS[kind]
    on = None if mesh is None else trees.mesh(*mesh)
    specs = None if on is None else trees.specs(trees.SHAPES, on)
    params, message, whole = outer_step(kind)
    trial = trial_step.TrialStep(params, compression, RATE, on, specs, budget)
    factors_P = np.ones(len(trees.SHAPES), np.float32)

    here = placed(params, on, specs)
    after, touched = trial.apply(here, message, factors_P)
    for name, x in after.items():
      np.testing.assert_array_equal(x, whole[name], err_msg=name)
      if on is not None:
        where = here[name].sharding
        self.assertTrue(x.sharding.is_equivalent_to(where, x.ndim))
    back = trial.undo(after, message, touched)
    for name, x in back.items():
      np.testing.assert_array_equal(x, params[name], err_msg=name)

  def test_remembers_the_touched_values_alone(self):
    compression = COMPRESSIONS['signs']
    params = trees.random_tree(trees.SHAPES, seed=0)
    trial = trial_step.TrialStep(params, compression, RATE)
    factors_P = np.ones(len(trees.SHAPES), np.float32)
    message = message_of(compression)
    after, touched = trial.apply(placed(params, None, None), message, factors_P)
    sent = sum(
      packet.indices.size for part in message.values() for packet in part
    )
    self.assertEqual(sum(x.size for x in jax.tree.leaves(touched)), sent)
    changed = sum(
      int(np.sum(np.asarray(after[name]) != x)) for name, x in params.items()
    )
    self.assertBetween(changed, 1, sent)

  def test_changes_the_parameters_in_place(self):
    compression = COMPRESSIONS['signs']
    shapes = trees.STACK
    params = trees.random_tree(shapes, seed=0)
    mesh = trees.mesh(2, 2)
    specs = trees.specs(shapes, mesh)
    trial = trial_step.TrialStep(
      params, compression, RATE, mesh, specs, budget=128
    )
    here = placed(params, mesh, specs)
    message = message_of(compression, shapes)
    after, _ = trial.apply(here, message, np.ones(1, np.float32))
    self.assertTrue(here['stack'].is_deleted())
    self.assertFalse(after['stack'].is_deleted())

  def test_factors_scale_each_tensor(self):
    compression = COMPRESSIONS['dense']
    params = trees.random_tree(trees.SHAPES, seed=0)
    trial = trial_step.TrialStep(params, compression, RATE)
    message = message_of(compression)
    factors_P = np.arange(len(trees.SHAPES), dtype=np.float32) / 4
    after, _ = trial.apply(placed(params, None, None), message, factors_P)
    for factor, name in zip(factors_P, sorted(params), strict=True):
      expected = params[name] - RATE * factor * message[name]
      np.testing.assert_allclose(after[name], expected, atol=1e-6)

  def test_norms_are_those_of_the_outer_step(self):
    compression = COMPRESSIONS['statistical']
    params = trees.random_tree(trees.SHAPES, seed=0)
    message = message_of(compression)
    expected = reduce.message_norms(message, params, compression)
    for budget in 1 << 20, 64:
      trial = trial_step.TrialStep(params, compression, RATE, budget=budget)
      np.testing.assert_array_equal(trial.norms(message), expected)


if __name__ == '__main__':
  absltest.main()
