import dataclasses

from absl.testing import absltest

from covenant import config as config_lib
from covenant.train import island as island_lib
from covenant.train.pipeline import subspace

Island = config_lib.Island


def config_of(*islands, **kwargs):
  return dataclasses.replace(config_lib.Config(), islands=islands, **kwargs)


class IslandTest(absltest.TestCase):
  def test_no_island_is_that_of_the_run(self):
    config = config_lib.Config()
    island = island_lib.of(config, 5)
    self.assertEqual(island.steps, config.optim.inner_steps)
    self.assertEqual(island.batch, config.optim.inner.batch_size)

  def test_one_entry_is_for_every_uid(self):
    self.assertEqual(island_lib.of(config_of(Island(steps=7)), 93).steps, 7)

  def test_entries_are_in_the_order_of_uids(self):
    config = config_of(
      Island(count=2, steps=3), Island(steps=1), Island(batch=4), miners=4
    )
    found = [island_lib.of(config, uid) for uid in range(4)]
    self.assertEqual([island.steps for island in found], [3, 3, 1, 10])
    self.assertEqual([island.batch for island in found], [8, 8, 8, 4])
    self.assertEqual({island.count for island in found}, {1})

  def test_one_entry_per_miner(self):
    config = config_of(Island(count=3, steps=7))
    with self.assertRaisesRegex(config_lib.ConfigError, '8 miners, got 3'):
      island_lib.of(config, 0)

  def test_bits_are_those_that_pipelines_pass(self):
    for bits in (0, *subspace.BITS):
      config_lib.read_islands(f'stages=2,rank=4,bits={bits}')


if __name__ == '__main__':
  absltest.main()
