import dataclasses

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import evaluation
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.models import sharding
from tests import helpers

MESHES = {'fsdp': (1, 4, 1), 'tensor': (1, 2, 2), 'data': (2, 2, 1)}


def config_of(loss_chunk=0, microbatch=0, vocab_size=256):
  config = helpers.tiny(f'optim.inner.microbatch_size={microbatch}')
  model = dataclasses.replace(
    config.model, loss_chunk=loss_chunk, vocab_size=vocab_size, kv_heads=2
  )
  return dataclasses.replace(config, model=model)


def mesh_of(data, fsdp, tensor):
  devices = config_lib.Devices(data=data, fsdp=fsdp, tensor=tensor)
  return sharding.mesh(devices, jax.devices())


class EvaluationTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = config_of()
    key = jax.random.key(0)
    cls.params = jax.jit(lambda key: llama.init(config.model, key))(key)
    model = config.decoder
    cls.nats = staticmethod(
      jax.jit(lambda p, x: loss_lib.next_token_loss(model, p, x).nats)
    )
    draw = np.random.default_rng(0)
    size = 6, config.data.context + 1
    cls.tokens = draw.integers(0, config.model.vocab_size, size, np.int32)
    cls.tokens[1, 20:] = -1  # padding, which is no target

  def expected(self):
    return self.expected_of(self.tokens)

  def expected_of(self, tokens):
    return np.array([self.nats(self.params, row[None]) for row in tokens])

  def placed(self, mesh):
    return jax.device_put(self.params, sharding.shardings(self.params, mesh))

  @parameterized.parameters((0, 0), (16, 0), (16, 2), (24, 1))
  @pytest.mark.rows(1)
  def test_losses_of_sequences_on_one_device(self, chunk, microbatch):
    losses = evaluation.SequenceLosses(config_of(chunk, microbatch), parts=2)
    found = losses(self.params, self.tokens)
    self.assertEqual(found.shape, (6, 2))
    np.testing.assert_allclose(found.mean(1), self.expected(), atol=1e-5)
    # The same sequences with the targets of the first half only.
    left = self.tokens.copy()
    left[:, self.tokens.shape[1] // 2 + 1 :] = -1
    shares = np.sum(left[:, 1:] >= 0, 1) / np.sum(self.tokens[:, 1:] >= 0, 1)
    expected = 2 * shares * self.expected_of(left)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)

  @pytest.mark.slow
  def test_losses_of_sequences_on_a_mesh(self):
    """Six sequences, which four devices do not divide."""
    self.on_a_mesh('tensor')

  @parameterized.parameters('fsdp', 'data')
  @pytest.mark.slow
  def test_losses_of_sequences_on_other_meshes(self, name):
    self.on_a_mesh(name)

  def on_a_mesh(self, name):
    """Compares the losses on a mesh with those of one device."""
    mesh = mesh_of(*MESHES[name])
    losses = evaluation.SequenceLosses(config_of(16, 1), mesh)
    found = losses(self.placed(mesh), self.tokens)
    self.assertEqual(found.shape, (6, 1))
    np.testing.assert_allclose(found[:, 0], self.expected(), atol=1e-5)

  @pytest.mark.slow
  def test_loss_of_a_batch(self):
    self.of_a_batch('fsdp')

  @parameterized.parameters('tensor', 'data')
  @pytest.mark.slow
  def test_loss_of_a_batch_on_other_meshes(self, name):
    self.of_a_batch(name)

  def of_a_batch(self, name):
    """Compares the loss of a batch with the mean of its targets."""
    config = config_of(16, 1)
    targets = np.sum(self.tokens[:, 1:] >= 0, axis=1)
    mean = np.average(self.expected(), weights=targets)
    mesh = mesh_of(*MESHES[name])
    sharded = evaluation.BatchLoss(config, mesh)(self.placed(mesh), self.tokens)
    alone = evaluation.BatchLoss(config)(self.params, self.tokens)
    self.assertAlmostEqual(float(sharded), mean, places=5)
    self.assertAlmostEqual(float(alone), mean, places=5)

  @pytest.mark.slow
  def test_a_chunk_bounds_the_logits(self):
    """Compiled memory: the logits of a chunk, not those of the context."""

    def temporary(chunk):
      config = config_of(chunk, vocab_size=4096)
      losses = evaluation.SequenceLosses(config)
      params = llama.abstract(config.model)
      tokens = np.zeros((64, config.data.context + 1), np.int32)
      compiled = losses.program.lower(params, tokens).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    self.assertLess(temporary(4), 0.6 * temporary(0))

  def test_each_device_has_sequences_of_its_own(self):
    mesh = mesh_of(1, 4, 1)
    spread = evaluation.spread_out(self.tokens, mesh)
    self.assertEqual(spread.shape[0], 8)
    self.assertEqual({s.data.shape[0] for s in spread.addressable_shards}, {2})


if __name__ == '__main__':
  absltest.main()
