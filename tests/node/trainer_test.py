"""A miner's rounds on several devices, against the same on one."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import dataset
from covenant.models import sharding
from covenant.node import replica as replica_lib
from covenant.node import trainer as trainer_lib

ROOT = pathlib.Path(__file__).parent.parent.parent


@functools.cache
def _common(variant):
  config = config_lib.load(f'{ROOT}/configs/tiny.py:{variant}')
  replica = replica_lib.Replica(config)
  return config, replica, dataset.load(config), replica.init().params


def two_rounds(variant, mesh=None, offload=False):
  """The works of a miner, its state at the end, from the same parameters."""
  config, replica, data, params = _common(variant)
  devices = dataclasses.replace(config.devices, offload=offload)
  config = dataclasses.replace(config, devices=devices)
  trainer = trainer_lib.Trainer(config, replica, data, mesh)
  private, works = trainer.init(params), []
  for r in range(2):
    task = trainer_lib.Task(1, r, b'seed', bytes(32))
    work, private = trainer.work(params, private, task, trainer.batches(task))
    works.append(work)
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))
  return works, private


@functools.cache
def alone(variant):
  return two_rounds(variant)


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


class TrainerTest(parameterized.TestCase):
  @parameterized.parameters(dict(fsdp=4), dict(data=2, fsdp=2))
  def test_shards_do_as_one_device(self, **sizes):
    """Up to rounding, whatever is sent whole; in L2, as Adam magnifies it."""
    mesh = sharding.mesh(config_lib.Devices(**sizes), jax.devices())
    works, private = two_rounds('diloco', mesh)
    for one, two in zip(alone('diloco')[0], works, strict=True):
      self.assertAlmostEqual(one.loss, two.loss, delta=1e-5)
      self.assertEqual(one.receipt, two.receipt)
      gap = jax.tree.map(np.subtract, one.message, two.message)
      self.assertLess(norm(gap) / norm(one.message), 1e-4)
    # The moments stay in their shards, on one copy of the parameters.
    moment = private.inner[1].mu['embedding']
    self.assertEqual(moment.sharding.spec, jax.P('fsdp', None))
    self.assertLen(moment.sharding.device_set, sizes['fsdp'])

  @parameterized.parameters('', 'ddp')
  def test_a_mesh_of_one_device_is_that_device(self, variant):
    """Bit for bit, wherever the parameters are, and it all stays there."""
    there = jax.devices()[3]
    mesh = sharding.mesh(config_lib.Devices(), [there])
    works, private = two_rounds(variant, mesh)
    want_works, want = alone(variant)
    jax.tree.map(np.testing.assert_array_equal, works, want_works)
    jax.tree.map(np.testing.assert_array_equal, private, want)
    for x in jax.tree.leaves(private._replace(joined=None)):
      self.assertEqual(x.devices(), {there})

  @parameterized.parameters(dict(sizes=None), dict(sizes=dict(fsdp=2)))
  def test_what_waits_in_host_memory_is_the_same(self, sizes):
    mesh = sizes and sharding.mesh(config_lib.Devices(**sizes), jax.devices())
    want, got = two_rounds('', mesh), two_rounds('', mesh, offload=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for x in jax.tree.leaves(got[1]._replace(joined=None)):
      self.assertEqual(x.sharding.memory_kind, 'pinned_host')

  def test_refuses_shards_that_are_no_blocks(self):
    config, replica, data, _ = _common('')
    mesh = sharding.mesh(config_lib.Devices(fsdp=4), jax.devices())
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'devices.fsdp: model.width = 32 .* 1, 2, got 4'
    ):
      trainer_lib.Trainer(config, replica, data, mesh)


if __name__ == '__main__':
  absltest.main()
