"""Training methods from their configs, through a whole run."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import metrics
from covenant.emulate import emulation
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import inner as inner_lib
from covenant.optim import preset
from covenant.optim.baselines import demo
from covenant.train import shared_state as shared_state_lib
from tests import helpers

MUON = 'optim.inner.kind=muon'


def tiny(variant='', *overrides):
  return helpers.tiny('rounds=2', 'eval.every=1', *overrides, variant=variant)


@pytest.mark.slow
class RunTest(parameterized.TestCase):
  def run_whole(self, config):
    """The last state, of a run whose loss falls in every round."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    state = emulation.run(config, folder).state
    losses = [
      record.loss
      for record in metrics.read(folder / 'metrics.jsonl')
      if isinstance(record, metrics.Evaluation)
    ]
    self.assertLen(losses, 3)
    self.assertEqual(losses, sorted(losses, reverse=True))
    return state

  @parameterized.parameters(('demo',), ('', MUON))
  def test_learns_and_resumed_equals_uninterrupted(self, *arguments):
    config = tiny(*arguments)
    folder = pathlib.Path(self.create_tempdir().full_path)
    want = self.run_whole(config)
    asked = iter([True])
    emulation.run(config, folder, stop=lambda: next(asked))
    got = emulation.run(config, folder)
    # What the optimizers keep.
    got = got.state
    self.assertEqual(
      helpers.bits((got.shared, got.miners)),
      helpers.bits((want.shared, want.miners)),
    )

  @parameterized.parameters('diloco', 'ddp')
  def test_other_methods_learn_by_muon(self, variant):
    self.run_whole(tiny(variant, MUON))


class MethodTest(parameterized.TestCase):
  def test_the_deployed_system_is_within_a_config_s_reach(self):
    config = tiny(
      '',
      'optim.compression.block=(64, 64)',
      'optim.compression.k=64',
      'optim.compression.layout=divisors',
      'optim.compression.quantizer=statistical',
    )
    method, deployed = algorithm_lib.make(config), preset.templar()
    self.assertEqual(method.compression, deployed.compression)
    self.assertEqual(method.error_decay, deployed.error_decay)

  @parameterized.parameters(
    (('compression.layout=divisors', 'compression.k=1',
      'compression.block=(1, 7)'),
     r"^optim.compression: layout 'divisors': a leaf of shape "),
  )  # fmt: skip
  def test_says_what_cannot_carry_the_model(self, overrides, message):
    config = tiny('', *[f'optim.{o}' for o in overrides])
    if 'divisors' in message:
      # No divisor of 11 up to 7 but 1.
      model = dataclasses.replace(config.model, ffn_width=11)
      config = dataclasses.replace(config, model=model)
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      shared_state_lib.SharedModel(config)

  @parameterized.parameters(
    ('', ['optim.method=demo', 'optim.inner_steps=1'], 'compression.kind'),
    ('demo', ['optim.inner_steps=2'], 'optim.inner_steps'),
    ('demo', [MUON], 'optim.inner.kind'),
    ('', ['optim.compression.codec=pack12'], 'optim.compression.codec'),
    ('', ['optim.compression.layout=squares'], 'optim.compression.layout'),
    ('', ['optim.inner.kind=sgd'], 'optim.inner.kind'),
  )  # fmt: skip
  def test_a_config_that_cannot_be_names_the_field(self, variant, sets, field):
    with self.assertRaisesRegex(
      config_lib.ConfigError, f'{field}: expected|12'
    ):
      tiny(variant, *sets)

  def test_the_outer_step_of_demo_is_that_of_the_transformation(self):
    """Momentum, selection and mean are SparseLoCo's pieces, tested there."""
    params = {'w': jnp.array([1.0, -2.0, 3.0])}
    outer = demo.signed(optax.constant_schedule(0.1), weight_decay=0.5)
    state = outer.init(params)
    updates, _ = outer.update(
      {'w': jnp.array([5.0, 0.0, -1e-9])}, state, params
    )
    np.testing.assert_allclose(
      updates['w'], [-0.1 - 0.05, 0.1, 0.1 - 0.15], rtol=1e-6
    )


class MuonTest(absltest.TestCase):
  @pytest.mark.slow
  def test_updates_of_matrices_are_orthogonal_and_scaled_like_adam_s(self):
    inner = config_lib.Inner(kind='muon', weight_decay=0.0)
    tx = inner_lib.make(inner)
    params = {
      'embedding': jnp.zeros((16, 8)),
      'stack': jnp.zeros((2, 24, 8)),  # of two layers
    }
    keys = jax.random.split(jax.random.key(0))
    gradient = {
      'embedding': jax.random.rademacher(keys[0], (16, 8), jnp.float32),
      'stack': jax.random.normal(keys[1], (2, 24, 8)),
    }
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    for matrix, of in zip(updates['stack'], gradient['stack'], strict=True):
      values = np.linalg.svd(matrix, compute_uv=False)
      # Newton-Schulz leaves singular values between 0.7 and 1.2.
      self.assertBetween(values.min() / values.max(), 0.5, 1.0)
      self.assertBetween(np.sqrt(np.mean(matrix**2)), 0.1, 0.3)
      self.assertLess(np.sum(matrix * of), 0)  # downhill
    # An embedding maps no space to another: Adam's first step has one size.
    sizes = np.abs(updates['embedding'])
    np.testing.assert_allclose(sizes, np.mean(sizes), rtol=1e-5)


if __name__ == '__main__':
  absltest.main()
