"""Layers lie on the devices of hosts as well as they can."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import island_costs
from covenant.plan import memory
from covenant.plan import partition
from covenant.plan import planner
from tests import helpers
from tests.plan import toy


class StagesTest(parameterized.TestCase):
  @parameterized.product(
    counts=[(2, 0), (3, 1), (2, 2), (1, 3)], layers=[3, 5], sizes=[(12, 6)]
  )
  def test_layers_lie_as_well_as_they_can(self, counts, layers, sizes):
    """Every way to lay the layers is tried."""
    speeds = (3.0, 7.0)
    config = toy.make('', layers=layers)
    groups = hardware.parse_inventory(
      ', '.join(
        toy.any_of(1, speed, f'with {size} MB', toy.FAST)
        for speed, size in zip(speeds, sizes, strict=True)
      ),
      config.plan,
    )
    devices = [i for i, n in enumerate(counts) for _ in range(n)]
    depth = len(devices)
    of = partition._model(config)
    shortest = []
    for head in range(depth):
      for lie in itertools.product(range(layers + 1), repeat=depth):
        if sum(lie) != layers or not lie[head]:
          continue
        times = []
        for i, (k, held) in enumerate(zip(devices, lie, strict=True)):
          size = groups[k].device.memory
          if held > partition._fit(config, size, i == head):
            break
          work = held * of.layer_flops + (i == head) * of.table_flops
          times.append(work / groups[k].device.peak / 0.25)
        else:
          shortest.append(max(times))
    found = partition.cut(config, groups, counts)
    assert found is not None
    self.assertAlmostEqual(found.slot / min(shortest), 1, delta=1e-6)
    self.assertEqual(sum(found.layers), layers)

  def test_stages_are_the_model(self):
    config = toy.make('', layers=3)
    of, whole = partition._model(config), memory.shards(config)
    self.assertEqual(3 * of.layer.params + of.tables.params, whole.params)
    flops = 3 * of.layer_flops + of.table_flops
    terms = island_costs.terms(config)
    # The forward pass is computed twice.
    self.assertAlmostEqual(flops / (terms.flops * config.data.context), 4 / 3)

  def test_a_stage_holds_the_embeddings_and_what_they_predict(self):
    """A gaming card holds no stage of 72b, whose table is 8.6 GB."""
    config = config_lib.load(str(helpers.CONFIGS / '72b.py'))
    held = [partition._fit(config, s, False) for s in (24e9, 80e9, 141e9)]
    self.assertEqual(held[0], -1)
    layer = 4 * partition._model(config).layer.params
    # What more memory is there holds further layers: parameters, their copy
    # and two gradients, two moments, outer momentum, and the error feedback.
    more = (held[2] - held[1]) * 8 * layer
    self.assertAlmostEqual(more / (0.94 * 61e9), 1, delta=0.15)
    self.assertEqual(partition._fit(config, 24e9, True), -1)

  def test_the_head_needs_memory_for_the_payloads(self):
    config = config_lib.load(str(helpers.CONFIGS / '72b.py'))
    payloads = config.plan.peers * memory.shards(config).payload_bytes
    for host, holds in ((30 * payloads, True), (payloads, False)):
      found = partition._fit(config, 192e9, True, host)
      self.assertEqual(found > 0, holds)

  def test_who_cannot_hold_it_is_no_pipeline(self):
    config = toy.make('', layers=5)
    groups = hardware.parse_inventory(
      toy.any_of(4, 3, toy.WEAK, toy.FAST), config.plan
    )
    self.assertIsNone(partition.cut(config, groups, (4,)))

  def test_no_link_carries_more_than_it_can(self):
    # Devices so fast that links decide.
    config = toy.make(toy.any_of(3, 60_000, toy.WEAK, 'on 20 kb/s'), peers=2)
    plan = planner.plan(config)
    (work,) = plan.works
    self.assertEqual(work.island.bits, 4)
    # Half of all bytes leave the head, which passes on what others send.
    carried = work.inside / (2 * 2500.0 * plan.terms.window)
    self.assertBetween(carried, 0.6, 1.0)

  def test_slow_links_send_less_of_the_width(self):
    process_group = []
    for link in ('on 1 Gb/s', 'on 5 kb/s'):
      (work,) = planner.plan(toy.make(toy.any_of(3, 60, toy.WEAK, link))).works
      self.assertEqual((work.kind, work.island.stages), ('pipeline', 3))
      process_group.append(work.island.rank)
    self.assertEqual(process_group[0], 60)  # an eighth of the bytes
    self.assertBetween(process_group[1], 1, 8)


if __name__ == '__main__':
  absltest.main()
