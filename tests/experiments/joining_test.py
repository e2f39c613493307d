"""The study of joiners takes from miners what it says, and nothing else."""

import pathlib

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.data import dataset
from covenant.emulate import host as host_lib
from experiments import joining
from experiments import runner
from experiments import study
from tests import experiments_test


class PlanTest(parameterized.TestCase):
  @parameterized.parameters(*joining.STEPS)
  def test_all_cells_have_the_same_steps(self, steps):
    setting = joining.Setting(joining.SPARSELOCO, 2, steps)
    for way in joining.ways(setting.method):
      config = study.make_config(setting.cell(way, 0))
      self.assertEqual(config.rounds * config.optim.inner_steps, joining.TOTAL)
      self.assertEqual(
        config.optim.inner.rejoin_steps, 0 if way == joining.RESET else 30
      )

  def test_as_many_values_are_sent_per_step(self):
    rates = {k / steps for steps, k in joining.STEPS.items()}
    self.assertLess(max(rates) / min(rates), 1.01)

  def test_miners_are_replaced_in_turn(self):
    some = joining.Restarts(error=True, every=2)
    found = [some.uids(4, completed) for completed in range(1, 11)]
    self.assertEqual(found, [[], [0], [], [1], [], [2], [], [3], [], [0]])
    self.assertEqual(joining.Restarts(error=True).uids(3, 1), [0, 1, 2])


class JudgeTest(absltest.TestCase):
  def runs(self, **losses):
    """Returns runs whose loss is that of carry, times a factor of the way."""
    return [
      study.Run(
        cell.name, cell.seed, '', 1, 1, 1, 1,
        (2 + 0.1 * cell.seed) * losses.get(cell.name.rsplit(', ', 1)[-1], 1.0),
        1.0, 'cpu', '',
      )
      for cell in joining.plan([], 3)
    ]  # fmt: skip

  def test_a_reset_that_costs_and_a_warm_up_that_does_not(self):
    runs = self.runs(reset=1.02)
    found = {v.claim: v for v in joining.judge(runs, study.RESULTS)}
    self.assertEqual(found['J4, DiLoCo, H = 30'].outcome, 'PASS')
    self.assertIn('+2.00 %', found['J4, DiLoCo, H = 30'].measured)
    self.assertEqual(found['J1, SparseLoCo, H = 100'].outcome, 'PASS')
    self.assertEqual(found['J2, DiLoCo, H = 30'].outcome, 'PASS')
    planned = {run.cell for run in runs}
    for verdict in found.values():
      self.assertContainsSubset(verdict.cells, planned, verdict.claim)

  def test_the_published_numbers_stand_beside_ours(self):
    table = joining.table(self.runs())
    self.assertLen(table.splitlines(), 2 + 24 + 18 + 3)
    row = '| DiLoCo, 2 miners, H = 30 | reset | 2.1000 | +0.00 % '
    self.assertIn(row, table)
    self.assertIn('| +2.23 % |', table)

  def test_the_figure_is_drawn(self):
    path = pathlib.Path(self.create_tempdir()) / 'joining.png'
    joining.draw(self.runs(reset=1.02), path)
    self.assertTrue(path.read_bytes().startswith(b'\x89PNG'))


class RestartsTest(absltest.TestCase):
  @pytest.mark.slow
  def test_nothing_lost_is_what_nodes_do(self):
    work = pathlib.Path(self.create_tempdir())
    cell = study.Cell('tiny', 0)
    nodes = runner.execute(cell, experiments_test.TINY, work)
    never = joining.Restarts(error=True, every=100)
    found = runner.execute(
      cell._replace(program=never), experiments_test.TINY, work
    )
    self.assertNotEqual(found.config, nodes.config)
    same = nodes._replace(config=found.config, seconds=found.seconds)
    self.assertEqual(found, same)

  @pytest.mark.slow
  def test_moments_are_lost_and_the_error_if_asked(self):
    config = study.make_config(study.Cell('tiny', 0), experiments_test.TINY)
    host = host_lib.Host(config, dataset.load(config))
    self.addCleanup(host.tools.close)
    host.round()
    before = [m.role.miner_state.result() for m in host.miners]
    joining.Restarts(error=False).restart(host, 0, 1)
    joining.Restarts(error=True).restart(host, 1, 1)
    kept, lost = (m.role.miner_state.result() for m in host.miners)
    for state in kept, lost:
      self.assertEqual(state.joined, 1)
      for x in jax.tree.leaves(state.inner):
        self.assertFalse(np.any(x))
    self.assertTrue(np.any(jax.tree.leaves(before[0].inner)[1]))
    jax.tree.map(np.testing.assert_array_equal, kept.error, before[0].error)
    self.assertTrue(any(np.any(x) for x in jax.tree.leaves(before[1].error)))
    self.assertFalse(any(np.any(x) for x in jax.tree.leaves(lost.error)))


if __name__ == '__main__':
  absltest.main()
