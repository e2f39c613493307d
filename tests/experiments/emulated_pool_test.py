"""Pools of emulated workers, some of whom are bad."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant.data import dataset
from covenant.train import local as local_lib
from experiments import emulated_pool as emulated_pool_lib
from experiments import pool_workers
from tests import helpers


@functools.cache
def kit():
  config = config_lib.load(
    f'{helpers.CONFIGS}/tiny.py',
    [
      'miners=2',
      'optim.inner_steps=16',
      'optim.inner.batch_size=8',
      'optim.inner.learning_rate=0.01',
      'pool.subrounds=4',
      'pool.steps=2',
      'pool.batch=1',
      'pool.audits=3',
      'pool.fee=0.1',
      'pool.deposit=1',
      'gauntlet.sequences=32',
    ],
  )
  return emulated_pool_lib.Kit(config, dataset.load(config))


class PoolTest(absltest.TestCase):
  @pytest.mark.slow
  def test_cheaters_are_paid_nothing_and_spoil_nothing(self):
    kinds = [k for k in pool_workers.KINDS if k not in pool_workers.ATTACKS]
    found = emulated_pool_lib.trial(kit(), workers=30, bad=0.34, rounds=2)
    self.assertEqual(set(found.kinds.values()), set(kinds))
    self.assertGreater(sum(found.gains), 0.85 * sum(found.honest_gains))
    earned = found.totals.pop('earned')
    self.assertGreater(earned, 2 * 10**9)
    self.assertEqual(sum(found.totals.values()), earned)
    for worker, kind in found.kinds.items():
      if kind in pool_workers.CHEATS:
        self.assertEqual(found.paid[worker], 0, kind)
    paid = sum(n for w, n in found.paid.items() if found.kinds[w] == 'honest')
    self.assertGreater(paid, 0)
    self.assertNotIn('FALSE', found.refused['honest'])
    self.assertLess(
      sum(n for v, n in found.refused['honest'].items() if v != 'VALID'),
      0.1 * found.refused['honest']['VALID'],
    )

  @pytest.mark.slow
  def test_to_the_network_a_pool_is_a_miner(self):
    """Its work says what a miner's would, and is the same every time."""
    shared = kit().shared_model.init()
    crowd = pool_workers.members(4, bad=0.0, seed=1)
    pool = emulated_pool_lib.Emulation(kit(), 1, crowd)
    work, outcome = pool.round(shared, 0, b'seed')
    again, _ = emulated_pool_lib.Emulation(kit(), 1, crowd).round(
      shared, 0, b'seed'
    )
    jax.tree.map(np.testing.assert_array_equal, work.message, again.message)
    task = local_lib.Task(1, 0, b'seed', bytes(32))
    trainer = kit().trainer
    mined, _ = trainer.train(
      shared.params, trainer.init(shared.params), task, trainer.batches(task)
    )
    self.assertEqual(work.sequences, mined.sequences)
    self.assertEqual(work.receipt, mined.receipt)
    self.assertLen(outcome.work, 4)


if __name__ == '__main__':
  absltest.main()
