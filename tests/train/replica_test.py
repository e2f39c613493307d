"""Tests for covenant.train.replica; tests of training are in trainer_test."""

import dataclasses

import jax
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import dataset
from covenant.models import sharding
from covenant.train import island as island_lib
from covenant.train import placement as placement_lib
from covenant.train import replica as replica_lib
from tests import helpers


def make(*changes, devices=None, stages=None):
  config = config_lib.load(f'{helpers.CONFIGS}/tiny.py', list(changes))
  islands = [island_lib.of(config, uid) for uid in range(config.miners)]
  mesh = devices and sharding.mesh(devices, jax.devices())
  return replica_lib.make(
    config,
    islands,
    placement_lib.Placement(mesh),
    dataset.load(config).train,
    stages and sharding.mesh(config_lib.Devices(stage=stages), jax.devices()),
  )


class KindTest(absltest.TestCase):
  def test_steps_change_no_program(self):
    island = island_lib.Island(steps=3, batch=4)
    other = dataclasses.replace(island, steps=5)
    self.assertEqual(replica_lib.kind(island), replica_lib.kind(other))
    for change in (dict(batch=2), dict(stages=2, rank=4)):
      other = dataclasses.replace(island, **change)
      self.assertNotEqual(replica_lib.kind(island), replica_lib.kind(other))

  def test_stages_without_a_rank_are_a_full_replica(self):
    island = island_lib.Island(steps=3, batch=4)
    other = dataclasses.replace(island, stages=2)
    self.assertEqual(replica_lib.kind(island), replica_lib.kind(other))


class MakeTest(parameterized.TestCase):
  def test_islands_of_a_kind_share_a_replica(self):
    self.assertLen(make(), 1)
    found = make('islands=2x steps=1; batch=2', 'miners=3')
    self.assertLen(found, 2)

  def test_gradient_methods_have_no_optimizer_at_the_miner(self):
    (replica,) = make('optim.method=ddp', 'optim.inner_steps=1').values()
    self.assertIsNone(replica.rest(None))
    self.assertIsNone(replica.keep(None))

  @parameterized.parameters(
    (
      dict(stages=2),
      'devices.stage: expected an island with stages=2 and a rank',
    ),
    (
      dict(islands='stages=2,rank=4', overlap=1),
      'islands: expected rank=0 with optim.overlap=1, got rank=4',
    ),
    (
      dict(
        islands='stages=2,rank=4',
        devices=config_lib.Devices(fsdp=2),
      ),
      'islands: a stage of a miner with a rank is one device',
    ),
    (
      dict(islands='stages=2,rank=4', kind='muon', stages=2),
      "devices.stage: expected optim.inner.kind='adamw'.*got 'muon'",
    ),
  )
  def test_refuses(self, case, message):
    changes = [
      'model.layers=2',
      f'islands={case.get("islands", "")}',
      f'optim.overlap={case.get("overlap", 0)}',
      f'optim.inner.kind={case.get("kind", "adamw")}',
    ]
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      make(*changes, devices=case.get('devices'), stages=case.get('stages'))


if __name__ == '__main__':
  absltest.main()
