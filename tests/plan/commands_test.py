"""The commands of a plan are those of its machines, and can be run."""

import collections
import itertools
import shlex

from absl.testing import absltest

from covenant import config as config_lib
from covenant.plan import commands
from covenant.plan import island_table
from covenant.plan import planner
from covenant.train import island as island_lib
from tests import helpers
from tests.plan import toy


def planned(*pieces, **kwargs):
  config = toy.make(', '.join(pieces), **kwargs)
  return config, planner.plan(config)


REPLICA = toy.any_of(1, 240, toy.STRONG, toy.FAST)
PIPELINE = toy.any_of(3, 60, toy.WEAK, 'on 4 Mb/s')


class CommandsTest(absltest.TestCase):
  def test_every_machine_of_a_plan_has_its_own(self):
    for config, plan in (
      planned(REPLICA, PIPELINE),
      planned(toy.any_of(6, 60, toy.STRONG, 'on 40 Mb/s'), peers=2),
      planned('2xany in pairs with 60 MFLOP/s with 9 MB on 400 kb/s'),
    ):
      found = commands.of_plan(config, plan)
      self.assertEqual({c.uid for c in found}, set(range(len(plan.works))))
      for uid, work in enumerate(plan.works):
        own = [c for c in found if c.uid == uid]
        roles = collections.Counter()
        for c in own:
          roles[c.flags[0].removeprefix('--role=')] += c.count
        self.assertEqual(
          roles,
          {
            'replica': {'miner': 1},
            'pool': {'pool': 1, 'worker': sum(work.hosts)},
            'pipeline': {'pool': 1, 'stage': work.island.stages},
          }[work.kind],
        )

  def test_each_is_of_a_valid_config(self):
    kinds = set()
    for config, plan in (
      planned(REPLICA, PIPELINE),
      planned(toy.any_of(6, 60, toy.STRONG, 'on 40 Mb/s'), peers=2),
    ):
      for command in commands.of_plan(config, plan):
        role, *edits = command.flags
        work = plan.works[command.uid]
        kinds.add((work.kind, role))
        made = config_lib.edit(
          config, [e.removeprefix('--config.') for e in edits]
        )
        if role != '--role=worker':
          island = island_lib.of(made, command.uid)
          self.assertEqual(island.steps * island.batch * config.data.context,
                           work.tokens)  # fmt: skip
    self.assertEqual(
      kinds,
      {
        ('replica', '--role=miner'),
        ('pipeline', '--role=pool'),
        ('pipeline', '--role=stage'),
        ('pool', '--role=pool'),
        ('pool', '--role=worker'),
      },
    )

  def test_what_is_printed_is_what_a_shell_reads(self):
    config, plan = planned(REPLICA, PIPELINE)
    page = island_table.text(config, plan)
    _, _, text = page.partition('commands;')
    lines = text.splitlines()[2:]
    self.assertEmpty([line for line in lines if len(line) > 100])
    read = [
      ' '.join(line.removesuffix('\\') for line in entry)
      for is_title, entry in itertools.groupby(
        lines, lambda line: line.startswith('#')
      )
      if not is_title
    ]
    words = [shlex.split(line) for line in read]
    found = commands.of_plan(config, plan)
    self.assertEqual(words, [list(c.words) for c in found])

  def test_each_device_of_a_host_is_a_stage(self):
    config = config_lib.load(str(helpers.CONFIGS / 'hetero.py'))
    inventory = (
      '2xany in pairs with 20 MFLOP/s with 4.2 MB on 100 kb/s, '
      '1xany with 20 MFLOP/s with 4.2 MB on 100 kb/s'
    )
    config = config_lib.edit(
      config, [f'plan.inventory={inventory}', 'model.layers=3']
    )
    plan = planner.plan(config)
    (work,) = plan.works
    self.assertEqual((work.kind, work.hosts), ('pipeline', (1, 1)))
    stages = [
      c for c in commands.of_plan(config, plan) if '--role=stage' in c.flags
    ]
    self.assertCountEqual([c.device for c in stages], [0, 1, None])
    self.assertLen({c.flags for c in stages}, 3)  # keys of their own
    lines = [next(iter(list(c.lines())[1:])) for c in stages]
    self.assertLen(
      [line for line in lines if line.startswith('CUDA_VISIBLE_DEVICES=')], 2
    )
    self.assertEqual(work.island.stages, 3)


if __name__ == '__main__':
  absltest.main()
