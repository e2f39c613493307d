"""The parts of the soak, without its processes."""

import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import files
from covenant.emulate import localnet
from covenant.node import miner as miner_lib
from experiments.chaos import nan_miner
from experiments.chaos import soak
from experiments.chaos import soak_faults

MEMBER = localnet.Member('miner', 1)


class SoakTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.parameters(30, 75, 400)
  def test_the_story_has_time_for_each_part(self, rounds):
    """An amendment must be adopted before the run ends, or a disk is full."""
    plan = soak.story(rounds)
    proposals = [plan.amend, plan.rollback, plan.extend]
    self.assertEqual(proposals, sorted(proposals))
    self.assertLess(plan.amend + soak._AHEAD, plan.miner_disk[0] + soak._AHEAD)
    self.assertGreater(plan.rollback, plan.miner_disk[1])
    self.assertLess(plan.extend + soak._AHEAD, plan.rounds)
    self.assertLess(plan.rounds, plan.extended)
    for first, last in (plan.miner_disk, plan.validator_disk):
      self.assertLess(first, last)
    self.assertEqual(soak.get_config(plan.rounds).rounds, plan.rounds)

  def test_what_a_member_has_adopted(self):
    self.assertEqual(soak.adopted(self.folder), [])
    lines = [{'changes': {'rounds': ['4', '6']}}, {'changes': {'restore': 1}}]
    files.append_jsonl(self.folder / 'amendments.jsonl', *lines)
    self.assertEqual(soak.adopted(self.folder), ['rounds', 'restore'])

  @parameterized.parameters(
    ('in use by (host, pid 7, since)', 1, (1, 0, 0)),
    ('  disk: 0.0 GB free in x', 1, (0, 1, 0)),
    ('in use by (host, pid 8, since)', 1, (0, 0, 1)),
    ('in use by (host, pid 7, since)', 0, (0, 0, 1)),
  )
  def test_the_words_of_twins(self, said, code, want):
    text = f'import sys; print({said!r}); sys.exit({code})'
    network = types.SimpleNamespace(
      command=lambda member: [sys.executable, '-c', text],
      process=lambda member: types.SimpleNamespace(pid=7),
    )
    twins = soak_faults.Twins(network, self.folder)
    twins.start(MEMBER)
    self.assertIn(MEMBER, twins)
    twins._running[MEMBER].wait()
    twins.look()
    self.assertEqual(
      (twins.refused, twins.without_room, len(twins.wrong)), want
    )
    self.assertNotIn(MEMBER, twins)
    twins.end()

  def test_a_disk_that_is_full_for_some_rounds(self):
    disk = soak_faults.Disk(self.folder / 'disk')
    with disk.mounted():
      if not disk.is_mounted:
        self.skipTest('a mount needs root')
      disk.look(1, (2, 4))
      (self.folder / 'disk' / 'a').write_text('a')
      for completed in 2, 3:
        disk.look(completed, (2, 4))
        with self.assertRaises(OSError):
          (self.folder / 'disk' / 'b').write_text('b')
      disk.look(4, (2, 4))
      (self.folder / 'disk' / 'b').write_text('b')
    self.assertTrue(disk.was_full)
    mounts = subprocess.run(['mount'], capture_output=True, check=True)
    self.assertNotIn(str(self.folder), mounts.stdout.decode())

  def test_some_rounds_are_trained_from_no_numbers(self):
    seen = []

    def train(node, task, params, batches):
      seen.append(params)
      return miner_lib.Future.done(None)

    honest = miner_lib.HONEST._replace(train=train)
    policy = nan_miner.spoiled(honest, seed=0, rate=0.5)
    params = {'x': np.ones(3, np.float32)}
    for number in range(40):
      task = types.SimpleNamespace(uid=1, round=number)
      policy.train(None, task, params, ())
    lost = [bool(np.isnan(jax.tree.leaves(p)[0]).all()) for p in seen]
    self.assertBetween(sum(lost), 10, 30)
    self.assertTrue(np.isfinite(params['x']).all())


if __name__ == '__main__':
  absltest.main()
