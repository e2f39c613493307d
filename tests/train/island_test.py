import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.train import island as island_lib

Island = island_lib.Island


class IslandTest(parameterized.TestCase):
  def test_entries_are_read_in_order(self):
    islands = island_lib.parse(
      '2x steps=40, batch=16; steps=10,stages=2,rank=4'
    )
    self.assertEqual(
      islands,
      (
        Island(steps=40, batch=16),
        Island(steps=40, batch=16),
        Island(steps=10, stages=2, rank=4),
      ),
    )
    self.assertEqual(island_lib.parse(island_lib.describe(islands)), islands)

  def test_nothing_said_is_all_alike(self):
    self.assertEqual(island_lib.parse(''), ())
    config = config_lib.Config()
    island = island_lib.of(config, 5)
    self.assertEqual(island.steps, config.optim.inner_steps)
    self.assertEqual(island.batch, config.optim.inner.batch_size)

  def test_one_entry_is_for_every_uid(self):
    config = dataclasses.replace(config_lib.Config(), islands='steps=7')
    self.assertEqual(island_lib.of(config, 93).steps, 7)

  @parameterized.parameters(
    ('speed=4', 'speed=4'),
    ('steps=-1', 'steps=-1'),
    ('steps=1,steps=2', 'at most once'),
    ('2x 3x steps=1', '3x'),
    ('stages=0', '1 or more'),
    ('rank=4', 'stages=2'),
  )
  def test_what_cannot_be_is_named(self, text, named):
    with self.assertRaisesRegex(config_lib.ConfigError, named):
      island_lib.parse(text)

  def test_one_entry_a_miner(self):
    config = dataclasses.replace(config_lib.Config(), islands='3x steps=7')
    with self.assertRaisesRegex(config_lib.ConfigError, '8 miners, got 3'):
      island_lib.of(config, 0)


if __name__ == '__main__':
  absltest.main()
