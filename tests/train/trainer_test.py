"""A miner's rounds on several devices, against the same on one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import dataset
from covenant.data import receipt
from covenant.models import sharding
from covenant.optim import sparseloco
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from tests import helpers


@functools.cache
def _common(variant):
  config = config_lib.load(f'{helpers.CONFIGS}/tiny.py:{variant}')
  shared_model = shared_state_lib.SharedModel(config)
  return config, shared_model, dataset.load(config), shared_model.init().params


def two_rounds(variant, mesh=None, offload=False):
  """The works of a miner, its state at the end, from the same parameters."""
  config, shared_model, data, params = _common(variant)
  devices = dataclasses.replace(config.devices, offload=offload)
  config = dataclasses.replace(config, devices=devices)
  trainer = trainer_lib.Trainer(config, shared_model, data, mesh)
  private, works = trainer.init(params), []
  for r in range(2):
    task = local_lib.Task(1, r, b'seed', bytes(32))
    work, private = trainer.train(params, private, task, trainer.batches(task))
    works.append(work)
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))
  return works, private


@functools.cache
def alone(variant):
  return two_rounds(variant)


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


@pytest.mark.slow
class PipelineTest(parameterized.TestCase):
  def test_of_a_mixed_run_does_as_alone(self):
    changes = (
      'model.layers=2', 'optim.method=diloco', 'optim.compression.k=16',
    )  # fmt: skip
    works = []
    pipeline = 'stages=2,rank=4,bits=4'
    for islands in (pipeline, f'2x ; 1x {pipeline}'):
      config = config_lib.load(
        f'{helpers.CONFIGS}/tiny.py', [*changes, f'islands={islands}']
      )
      shared_model, data = (
        shared_state_lib.SharedModel(config),
        dataset.load(config),
      )
      trainer = trainer_lib.Trainer(config, shared_model, data)
      params = shared_model.init().params
      task = local_lib.Task(2, 0, b'seed', bytes(32))
      batches = trainer.batches(task)
      works.append(
        trainer.train(params, trainer.init(params), task, batches)[0]
      )
    one, two = works
    jax.tree.map(np.testing.assert_array_equal, one.message, two.message)
    self.assertEqual(one.receipt, two.receipt)

  def test_on_its_stages_does_as_on_one_device(self):
    """Up to rounding, as in `test_shards_do_as_one_device`."""
    changes = (
      'model.layers=2', 'optim.method=diloco', 'islands=stages=2,rank=3',
      'optim.inner.microbatch_size=2',
    )  # fmt: skip
    config = config_lib.load(f'{helpers.CONFIGS}/tiny.py', changes)
    shared_model, data = (
      shared_state_lib.SharedModel(config),
      dataset.load(config),
    )
    params = shared_model.init().params
    mesh = sharding.mesh(config_lib.Devices(stage=2), jax.devices()[2:])
    ends = []
    for where in (None, mesh):
      trainer = trainer_lib.Trainer(config, shared_model, data, where)
      private, works = trainer.init(params), []
      for r in range(2):
        task = local_lib.Task(1, r, b'seed', bytes(32))
        batches = trainer.batches(task)
        work, private = trainer.train(params, private, task, batches)
        works.append(work)
      ends.append((works, private))
    (works, private), (staged_works, staged) = ends
    for one, two in zip(works, staged_works, strict=True):
      self.assertAlmostEqual(one.loss, two.loss, delta=1e-5)
      self.assertEqual(one.receipt, two.receipt)
      gap = jax.tree.map(np.subtract, one.message, two.message)
      self.assertLess(norm(gap) / norm(one.message), 1e-4)
    # At rest it is as if it had never been split.
    self.assertEqual(
      jax.tree.map(np.shape, staged), jax.tree.map(np.shape, private)
    )
    gap = jax.tree.map(np.subtract, private.inner, staged.inner)
    self.assertLess(norm(gap) / norm(private.inner), 1e-4)


class TrainerTest(parameterized.TestCase):
  @parameterized.parameters(dict(fsdp=4), dict(data=2, fsdp=2))
  @pytest.mark.rows(1)
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
  @pytest.mark.rows(1)
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
  @pytest.mark.rows(1)
  def test_what_waits_in_host_memory_is_the_same(self, sizes):
    mesh = sizes and sharding.mesh(config_lib.Devices(**sizes), jax.devices())
    want, got = two_rounds('', mesh), two_rounds('', mesh, offload=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for x in jax.tree.leaves(got[1]._replace(joined=None)):
      self.assertEqual(x.sharding.memory_kind, 'pinned_host')

  def test_who_runs_out_of_time_sends_what_it_has(self):
    """As an island of as many steps, but for the learning rate's pace."""
    config, shared_model, data, params = _common('')
    trainer = trainer_lib.Trainer(config, shared_model, data)
    task, asked = local_lib.Task(1, 0, b'seed', bytes(32)), []

    def late():
      asked.append(True)
      return len(asked) == 2

    work, _ = trainer.train(
      params, trainer.init(params), task, trainer.batches(task, late)
    )
    self.assertEqual(work.sequences, 2 * config.optim.inner.batch_size)
    ids = local_lib.assigned_ids(config, task, data.train)[: work.sequences]
    want = receipt.of_sequences(data.train, ids, config.data.context)
    self.assertEqual(work.receipt, want)

  def test_islands_anneal_alike_and_share_programs(self):
    config, shared_model, data, params = _common('')
    islands = 'steps=3; steps=1; steps=6,batch=2; steps=1,batch=2'
    config = dataclasses.replace(
      config, islands=config_lib.read_islands(islands), miners=4
    )
    trainer, steps = trainer_lib.Trainer(config, shared_model, data), []
    self.assertLen(trainer._replicas, 2)
    for island, replica in trainer._replicas.items():

      def noting(*args, step=replica.step, batch=island.batch):
        steps.append((batch, int(args[3])))
        return step(*args)

      trainer._replicas[island] = replica._replace(step=noting)
    for uid in range(4):
      task = local_lib.Task(uid, 5, b'seed', bytes(32))
      private = trainer.init(params)
      work, _ = trainer.train(params, private, task, trainer.batches(task))
      self.assertEqual(work.sequences, (12, 4, 12, 2)[uid])
    self.assertEqual([s for b, s in steps if b == 4], [15, 16, 17, 15])
    self.assertEqual(
      [s for b, s in steps if b == 2], [15, 15, 16, 16, 17, 17, 15]
    )

  def test_an_island_must_not_train_on_more_than_it_is_assigned(self):
    config, shared_model, data, _ = _common('')
    config = dataclasses.replace(
      config, islands=(config_lib.Island(steps=4),), miners=1
    )
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'islands: .* uid 0 trains on 16 .* at most 12'
    ):
      trainer_lib.Trainer(config, shared_model, data)
    optim = dataclasses.replace(config.optim, most_sequences=16)
    config = dataclasses.replace(config, optim=optim)
    trainer_lib.Trainer(config, shared_model, data)

  @parameterized.parameters(False, True)
  @pytest.mark.rows(1)
  def test_overlapped_steps_are_each_in_one_delta(self, early):
    """What was sent and what is left of it are what all steps moved.

    Begun before the exchange or after it: the same steps, bit for bit.
    """
    config, _, data, params = _common('')
    compression = dataclasses.replace(
      config.optim.compression, quantizer='none', error_decay=1.0
    )
    optim = dataclasses.replace(
      config.optim, overlap=1, compression=compression
    )
    config = dataclasses.replace(config, optim=optim)
    shared_model = shared_state_lib.SharedModel(config)
    trainer = trainer_lib.Trainer(config, shared_model, data)
    ((island, replica),), moved = trainer._replicas.items(), []

    def noting(local, *args):
      before = jax.tree.map(np.copy, jax.device_get(local))
      local, *others = replica.step(local, *args)
      after = jax.tree.map(np.copy, jax.device_get(local))
      moved.append(jax.tree.map(np.subtract, before, after))
      return local, *others

    trainer._replicas[island] = replica._replace(step=noting)
    shared, private, sent = shared_model.init(), trainer.init(params), []
    for r in range(3):
      task = local_lib.Task(1, r, b'seed', bytes(32))
      begun, batches = None, trainer.batches(task)
      if early:
        begun, private = trainer.begin(private, task, batches)
        self.assertLen(begun.losses, 1)
      work, private = trainer.train(
        shared.params, private, task, batches, begun
      )
      self.assertEqual(work.sequences, 12)
      sent.append(
        sparseloco.decompress(
          work.message,
          shared_model.abstract_params,
          shared_model.method.compression,
        )
      )
      # Others move the shared parameters, too.
      params = jax.tree.map(lambda x: x - 0.01, shared.params)
      shared, _ = shared_model.apply_round(
        shared._replace(params=params), {1: work.message}
      )
    self.assertLen(moved, 9)
    total = jax.tree.map(lambda *x: sum(x), *sent, private.error)
    want = jax.tree.map(lambda *x: sum(x), *moved)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), total, want
    )

  def test_refuses_shards_that_are_no_blocks(self):
    config, shared_model, data, _ = _common('')
    mesh = sharding.mesh(config_lib.Devices(fsdp=4), jax.devices())
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'devices.fsdp: model.width = 32 .* 1, 2, got 4'
    ):
      trainer_lib.Trainer(config, shared_model, data, mesh)


if __name__ == '__main__':
  absltest.main()
