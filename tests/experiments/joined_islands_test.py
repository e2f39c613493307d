"""The network of all kinds of islands: its processes and its table."""

from absl.testing import absltest

from covenant import config as config_lib
from covenant.emulate import localnet
from covenant.pool import stage_process
from covenant.train import island as island_lib
from experiments import joined_islands


class JoinedIslandsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = config_lib.load(joined_islands.CONFIG, joined_islands.SETS)

  def test_a_head_and_a_pool_are_roles_of_two_miners(self):
    members = localnet.members(self.config)
    self.assertEqual([m.uid for m in members], [0, 1, 2, 3, None])
    plain = [m for m in members if not joined_islands.flags(m)]
    self.assertNotIn(members[joined_islands.POOL], plain)
    self.assertLen(plain, 3)
    flags = joined_islands.flags(members[joined_islands.PIPELINE])
    (island,) = (f for f in flags if f.startswith('--config.islands='))
    config = config_lib.edit(self.config, [island.removeprefix('--config.')])
    stages = stage_process.pipeline_of(config).stages
    self.assertLen(joined_islands.STAGES, stages)
    # All train on as much.
    whole = island_lib.of(self.config, 0).sequences
    self.assertEqual(island_lib.of(config, 2).sequences, whole)

  def test_what_is_off_by_more_than_the_bar_is_missed(self):
    rounds = [
      {'steps': 8, 'bypassed': [0, 0, 0], 'replaced': 0},
      {'steps': 5, 'bypassed': [0, 2, 0], 'replaced': 1},
    ]
    pool = [{'sequences': 60}]
    found = joined_islands.Result(True, 2.0, 1, rounds, pool, [])
    lines = list(
      joined_islands.table(
        self.config,
        found,
        [joined_islands.Emulated(x, 64) for x in (1.96, 1.98)],
      )
    )
    self.assertIn('| history and parameters of all members | | met |', lines)
    self.assertIn('| 2.0000; 1.9600 to 1.9800 (+1.52%) | met |', lines[3])
    self.assertTrue(lines[5].endswith(' with all steps | 2; 1 | |'), lines)
    self.assertTrue(lines[6].endswith('| 1; 2 | |'))
    found = found._replace(equal=False)
    lines = list(
      joined_islands.table(
        self.config, found, [joined_islands.Emulated(1.9, 64)]
      )
    )
    self.assertIn('MISSED', lines[2])
    self.assertIn('(+5.26%) | MISSED |', lines[3])


if __name__ == '__main__':
  absltest.main()
