"""The page of a plan has what was planned."""

from absl.testing import absltest

from covenant import config as config_lib
from covenant.plan import island_table
from covenant.plan import planner
from tests import helpers
from tests.plan import toy


class TableTest(absltest.TestCase):
  def test_72b(self):
    config = config_lib.load(
      str(helpers.CONFIGS / '72b.py'),
      ['plan.inventory=8xB200, 16xH100, 64xA100 in pairs, 12x4090 on 200 Mb/s'],
    )
    page = island_table.text(config, planner.plan(config))
    self.assertIn('replica', page)
    self.assertIn('8xB200: fsdp 8', page)
    self.assertIn('8xH100 + ', page)
    self.assertIn('200 Mb/s', page)
    long = [line for line in page.splitlines() if len(line) > 100]
    self.assertEmpty(long)

  def test_costs_of_devices_at_their_own_prices(self):
    inventory = '8xB200 at $4, 8xH100, 2x4090 on 200 Mb/s at $0.50'
    edits = [f'plan.inventory={inventory}', 'plan.device_price=2']
    config = config_lib.load(str(helpers.CONFIGS / '72b.py'), edits)
    plan = planner.plan(config)
    page = island_table.text(config, plan)
    # 103 blocks of 12 s; the hosts that take no part are paid, too.
    dollars = (8 * 4 + 8 * 2 + 2 * 0.5) * 20.6 / 60
    self.assertIn(f'~${dollars:.2f} of devices and ~$0.00 of egress', page)
    million = 1e6 * dollars / sum(work.tokens for work in plan.works)
    self.assertIn(f'~${million:,.4f} per million tokens', page)

  def test_every_island_and_every_host_is_there(self):
    config = toy.make(
      f'{toy.any_of(2, 60, toy.STRONG, toy.FAST)}, '
      f'{toy.any_of(3, 60, toy.WEAK, toy.FAST)}, '
      f'{toy.any_of(4, 60, toy.STRONG, "on 200 b/s")}'
    )
    plan = planner.plan(config)
    page = island_table.text(config, plan)
    self.assertIn(f'all {len(plan.works)} islands', page)
    self.assertEqual(plan.idle[2], 4)
    self.assertIn('in no island: 4 x any', page)
    for work in plan.works:
      self.assertIn(f'{work.island.steps:6}{work.island.batch:7}', page)
    # The flags at its end make the config that was planned.
    page, _, _ = page.partition('\n\ncommands')
    flags = ' '.join(page[page.index('--config.optim') :].split())
    most, islands = flags.split(' --config.islands=')
    text = islands.strip("'")
    edited = config_lib.edit(
      config, [most.removeprefix('--config.'), f'islands={text}']
    )
    self.assertEqual(
      config_lib.show_islands(edited.islands),
      config_lib.show_islands(plan.islands),
    )

  def test_without_an_island(self):
    config = toy.make(toy.any_of(2, 60, toy.STRONG, 'on 200 b/s'))
    page = island_table.text(config, planner.plan(config))
    self.assertIn('all 0 islands\n  none of these hosts', page)


if __name__ == '__main__':
  absltest.main()
