"""Attacks on a pool, in virtual time."""

import functools

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from experiments import pool_workers
from experiments.chaos import pool_sockets
from experiments.chaos import pools
from tests import helpers

# `python -m experiments.reliability` runs all kinds.
CHOSEN = ('squatter with new keys', 'echo', 'timed echo', 'malformed')


@functools.cache
def suite():
  base = config_lib.load(f'{helpers.CONFIGS}/tiny.py')
  return pools.PoolSuite(pools.get_config(base))


@pytest.mark.chaos
class PoolSuiteTest(parameterized.TestCase):
  @parameterized.parameters(*CHOSEN)
  def test_bad_workers_cost_the_others_nothing(self, kind):
    outcome = suite().run(pools.PoolScenario(kind))
    self.assertEqual(outcome.wrong, '')
    self.assertGreater(outcome.leases, 0)
    self.assertLess(outcome.pay, 0.8)

  def test_without_anything_bad_it_fails(self):
    outcome = suite().run(pools.PoolScenario('honest'))
    self.assertIn('nothing bad', outcome.wrong)

  def test_all_kinds_are_scenarios(self):
    kinds = {scenario.kind for scenario in pools.scenarios()}
    self.assertEqual(kinds, {*pool_workers.KINDS} - {'honest'})


@pytest.mark.chaos
class PoolServerTest(parameterized.TestCase):
  @parameterized.parameters(*pool_sockets.ATTACKS)
  def test_strangers_cost_an_honest_worker_nothing(self, name):
    outcome = pool_sockets.run(name)
    self.assertEqual(outcome.wrong, '')
    self.assertGreater(outcome.struck, 1)

  def test_nobody_answers_in_a_pools_place(self):
    self.assertEqual(pool_sockets.impostor().wrong, '')


if __name__ == '__main__':
  absltest.main()
