"""Tests for covenant.train.trainer: rounds on several devices and on one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import assignment
from covenant.data import dataset
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
  """Trains two rounds from the same parameters; returns rounds and state."""
  config, shared_model, data, params = _common(variant)
  devices = dataclasses.replace(config.devices, offload=offload)
  config = dataclasses.replace(config, devices=devices)
  trainer = trainer_lib.Trainer(config, shared_model, data, mesh)
  state, rounds = trainer.init(params), []
  for r in range(2):
    task = local_lib.Task(1, r, b'seed', bytes(32))
    trained, state = trainer.train(params, state, task, trainer.batches(task))
    rounds.append(trained)
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))
  return rounds, state


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
    rounds = []
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
      rounds.append(
        trainer.train(params, trainer.init(params), task, batches)[0]
      )
    one, two = rounds
    jax.tree.map(np.testing.assert_array_equal, one.message, two.message)
    self.assertEqual(one.receipt, two.receipt)

  def test_on_its_stages_does_as_on_one_device(self):
    """Equal up to rounding, as in `test_shards_do_as_one_device`."""
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
      state, rounds = trainer.init(params), []
      for r in range(2):
        task = local_lib.Task(1, r, b'seed', bytes(32))
        batches = trainer.batches(task)
        trained, state = trainer.train(params, state, task, batches)
        rounds.append(trained)
      ends.append((rounds, state))
    (rounds, state), (staged_rounds, staged) = ends
    for one, two in zip(rounds, staged_rounds, strict=True):
      self.assertAlmostEqual(one.loss, two.loss, delta=1e-5)
      self.assertEqual(one.receipt, two.receipt)
      gap = jax.tree.map(np.subtract, one.message, two.message)
      self.assertLess(norm(gap) / norm(one.message), 1e-4)
    # At rest it is as if it had never been split.
    self.assertEqual(
      jax.tree.map(np.shape, staged), jax.tree.map(np.shape, state)
    )
    gap = jax.tree.map(np.subtract, state.inner, staged.inner)
    self.assertLess(norm(gap) / norm(state.inner), 1e-4)


class TrainerTest(parameterized.TestCase):
  @parameterized.parameters(dict(data=2, fsdp=2), dict(fsdp=4))
  @pytest.mark.rows(0, 1)
  def test_shards_do_as_one_device(self, **sizes):
    """Equal up to rounding in L2, which Adam magnifies."""
    mesh = sharding.mesh(config_lib.Devices(**sizes), jax.devices())
    rounds, state = two_rounds('diloco', mesh)
    for one, two in zip(alone('diloco')[0], rounds, strict=True):
      self.assertAlmostEqual(one.loss, two.loss, delta=1e-5)
      self.assertEqual(one.receipt, two.receipt)
      gap = jax.tree.map(np.subtract, one.message, two.message)
      self.assertLess(norm(gap) / norm(one.message), 1e-4)
    # The moments stay in their shards, on one copy of the parameters.
    moment = state.inner[1].mu['embedding']
    self.assertEqual(moment.sharding.spec, jax.P('fsdp', None))
    self.assertLen(moment.sharding.device_set, sizes['fsdp'])

  @parameterized.parameters('', 'ddp')
  @pytest.mark.slow
  def test_a_mesh_of_one_device_is_that_device(self, variant):
    """Equal bit for bit, wherever the parameters are; all stays there."""
    there = jax.devices()[3]
    mesh = sharding.mesh(config_lib.Devices(), [there])
    rounds, state = two_rounds(variant, mesh)
    want_rounds, want = alone(variant)
    jax.tree.map(np.testing.assert_array_equal, rounds, want_rounds)
    jax.tree.map(np.testing.assert_array_equal, state, want)
    for x in jax.tree.leaves(state._replace(joined=None)):
      self.assertEqual(x.devices(), {there})

  @parameterized.parameters(dict(sizes=None), dict(sizes=dict(fsdp=2)))
  @pytest.mark.slow
  def test_what_waits_in_host_memory_is_the_same(self, sizes):
    if sizes is None:
      mesh, want = None, alone('')
    else:
      mesh = sharding.mesh(config_lib.Devices(**sizes), jax.devices())
      want = two_rounds('', mesh)
    got = two_rounds('', mesh, offload=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for x in jax.tree.leaves(got[1]._replace(joined=None)):
      self.assertEqual(x.sharding.memory_kind, 'pinned_host')

  def test_who_runs_out_of_time_sends_what_it_has(self):
    """It trains like an island of fewer steps, at another learning rate."""
    config, shared_model, data, params = _common('')
    trainer = trainer_lib.Trainer(config, shared_model, data)
    task, asked = local_lib.Task(1, 0, b'seed', bytes(32)), []

    def late():
      asked.append(True)
      return len(asked) == 2

    trained, _ = trainer.train(
      params, trainer.init(params), task, trainer.batches(task, late)
    )
    self.assertEqual(trained.sequences, 2 * config.optim.inner.batch_size)
    ids = local_lib.assigned_ids(config, task, data.train)[: trained.sequences]
    want = assignment.receipt_of(data.train, ids, config.data.context)
    self.assertEqual(trained.receipt, want)

  @pytest.mark.slow
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
      state = trainer.init(params)
      trained, _ = trainer.train(params, state, task, trainer.batches(task))
      self.assertEqual(trained.sequences, (12, 4, 12, 2)[uid])
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
  @pytest.mark.slow
  def test_overlapped_steps_are_each_in_one_delta(self, early):
    """Messages and error feedback add up to the changes of all steps.

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
    shared, state, sent = shared_model.init(), trainer.init(params), []
    for r in range(3):
      task = local_lib.Task(1, r, b'seed', bytes(32))
      begun, batches = None, trainer.batches(task)
      if early:
        begun, state = trainer.begin(state, task, batches)
        self.assertLen(begun.losses, 1)
      trained, state = trainer.train(shared.params, state, task, batches, begun)
      self.assertEqual(trained.sequences, 12)
      sent.append(
        sparseloco.decompress(
          trained.message,
          shared_model.abstract_params,
          shared_model.method.compression,
        )
      )
      # Others move the shared parameters, too.
      params = jax.tree.map(lambda x: x - 0.01, shared.params)
      shared, _ = shared_model.apply_round(
        shared._replace(params=params), {1: trained.message}
      )
    self.assertLen(moved, 9)
    total = jax.tree.map(lambda *x: sum(x), *sent, state.error)
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
