import dataclasses
import math

import jax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.node import preflight
from covenant.plan import memory
from covenant.train import step
from tests import helpers

LADDER = ('150m', '512m', '1b', '8b', '72b', '1t')
STATE = {'parameters', 'AdamW moments', 'error feedback', 'outer momentum'}


def load(name, *overrides):
  return config_lib.load(str(helpers.CONFIGS / f'{name}.py'), overrides)


def phases(config, offload=False):
  cut = memory.shards(config)
  return {p.name: p for p in memory.phases(config, cut, offload)}


def on_a_device(tree):
  """Bytes of one device's share of arrays that say where they are."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


class StateTest(parameterized.TestCase):
  @parameterized.parameters(*LADDER)
  @pytest.mark.rows(1)
  def test_is_what_the_inner_step_takes(self, name):
    config = load(name)
    mesh = sharding.abstract_mesh(config.devices)
    params, state, *_ = step.arguments(config, mesh)
    work = phases(config)['inner step'].device
    self.assertEqual(on_a_device(params), work['parameters of this round'])
    count = 4  # how many updates there were
    self.assertEqual(on_a_device(state), work['AdamW moments'] + count)

  def test_72b_by_hand(self):
    """70.6 B parameters: an eighth of 4 bytes each is 35.3 GB."""
    parts = phases(load('72b'))['inner step'].device
    in_gb = {name: round(size / 1e9, 1) for name, size in parts.items()}
    self.assertEqual(in_gb['parameters'], 35.3)
    self.assertEqual(in_gb['AdamW moments'], 70.6)
    self.assertEqual(in_gb['error feedback'], 35.3)
    self.assertEqual(in_gb['outer momentum'], 35.3)
    plain = phases(load('72b', 'optim.outer.momentum=0.0'))['inner step']
    self.assertNotIn('outer momentum', plain.device)

  @parameterized.parameters('72b', '1t')
  def test_offload_moves_state_and_loses_none(self, name):
    config = load(name)
    there, away = phases(config), phases(config, offload=True)
    for phase in there:
      if phase == 'checkpoint':  # it copies
        continue
      state = (
        'parameters',
        'AdamW moments',
        'error feedback',
        'outer momentum',
      )
      for part in set(state) & set(there[phase].device):
        places = (away[phase].device, away[phase].host)
        self.assertEqual(sum(part in place for place in places), 1)
      self.assertLess(away[phase].total, there[phase].total)
      self.assertLess(
        set(away[phase].device), set(there[phase].device), msg=phase
      )

  @parameterized.parameters(
    ('diloco', 2, 0, 1), ('demo', 0, 1, 0), ('ddp', 0, 0, 2)
  )
  def test_of_other_methods(self, method, moments, errors, outer):
    optim = config_lib.Optim(
      method=method, outer=config_lib.Outer(momentum=0.9)
    )
    self.assertEqual(memory.moments(optim), moments)
    self.assertEqual(memory.errors(optim), errors)
    self.assertEqual(memory.outer_moments(optim), outer)

  def test_checkpoint_is_all_that_is_private_and_shared(self):
    params = llama.num_params(load('72b').model)
    size = memory.checkpoint_bytes(load('72b'))
    self.assertEqual(size, params * 4 * (1 + 2 + 1 + 1))


class EstimateTest(parameterized.TestCase):
  # GB a device of the whole inner step of 72b, by XLA's TPU compiler (libtpu
  # 0.0.52, topology v5p:2x2x2, jax 0.10.2, 2026-11-22): it refused them all,
  # saying what they needed.
  @parameterized.parameters((1, 165.9), (2, 169.7), (4, 180.9), (8, 198.7))
  def test_agrees_with_a_compiler_that_knows(self, sequences, measured):
    config = load('72b', f'optim.inner.microbatch_size={sequences}')
    total = phases(config, offload=True)['inner step'].total / 1e9
    self.assertAlmostEqual(total / measured, 1, delta=0.02)

  @parameterized.parameters(
    ('model.attention=cudnn', 'optim.inner.microbatch_size=8'),
    ('model.remat=block', 'model.remat=none'),
    ('optim.inner.microbatch_size=1', 'optim.inner.microbatch_size=2'),
    ('model.loss_chunk=512', 'model.loss_chunk=0'),
    ('devices.tensor=2', 'devices.tensor=1'),
  )
  def test_knobs_turn_the_right_way(self, less, more):
    sizes = [
      sum(memory.activations(load('72b', edit)).values())
      for edit in (less, more)
    ]
    self.assertLess(*sizes)

  @parameterized.parameters((192, 0, 1, 8, (24, 1)), (192, 4, 2, 4, (4, 6)))
  def test_microbatches(self, batch, size, data, fsdp, want):
    inner = config_lib.Inner(batch_size=batch, microbatch_size=size)
    config = config_lib.Config(
      optim=config_lib.Optim(inner=inner),
      devices=config_lib.Devices(data=data, fsdp=fsdp),
    )
    self.assertEqual(memory.microbatch(config), want)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ('devices.fsdp=3', 'devices.fsdp'),
    ('devices.fsdp=256', 'devices.fsdp'),
    ('devices.tensor=16', 'devices.tensor'),
  )
  def test_a_mesh_that_does_not_divide(self, edit, field):
    with self.assertRaises(config_lib.ConfigError) as caught:
      memory.shards(load('72b', edit))
    self.assertStartsWith(str(caught.exception), field)
    self.assertNotIn('\n', str(caught.exception))


class NeedsTest(absltest.TestCase):
  def test_every_miner_more_needs_its_private_state(self):
    config = load('1b')
    params = llama.num_params(config.model)
    one, two = (preflight.memory_bytes(config, miners) for miners in (1, 2))
    self.assertEqual(two - one, params * 4 * 3)

  def test_what_is_missing_is_said_at_once(self):
    config = load('72b')
    config = dataclasses.replace(
      config, devices=dataclasses.replace(config.devices, fsdp=16)
    )
    with self.assertRaises(preflight.InsufficientResourcesError) as caught:
      preflight.check(config, 1)
    self.assertTrue(caught.exception.hardware)
    lines = str(caught.exception).splitlines()
    starts = ['72b cannot run here', '  devices: ', '  memory: ', '  data: ']
    for line, start in zip(lines, starts, strict=True):
      self.assertStartsWith(line, start)


if __name__ == '__main__':
  absltest.main()
