import dataclasses
import itertools

import hypothesis
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import strategies as st

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import island_costs
from covenant.plan import island_table
from covenant.plan import memory
from covenant.plan import partition
from covenant.plan import planner
from tests import helpers

# Fictitious devices for a model of three layers: WEAK hold one, STRONG all.
STRONG, WEAK = 'with 9 MB', 'with 4 MB'
_FAST, _SLOW = 'on 400 kb/s', 'on 30 kb/s'


def toy(text, peers=20, layers=3):
  config = config_lib.Config()
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, layers=layers),
    plan=config_lib.Plan(compute_minutes=15, inventory=text, peers=peers),
  )


def any_of(count, speed, memory_, link, latency=50):
  return f'{count}xany with {speed} MFLOP/s {memory_} {link} with {latency} ms'


def brute_force(config):
  """The most useful tokens of all partitions of the hosts into islands."""
  terms = island_costs.terms(config)
  groups = hardware.parse_inventory(config.plan.inventory, config.plan)
  values = {}

  def value(hosts):
    if hosts not in values:
      if sum(hosts) == 1:
        works = [island_costs.alone(terms, groups, hosts.index(1))]
      else:
        works = [
          island_costs.pool(terms, groups, hosts),
          partition.pipeline(terms, groups, hosts),
        ]
      values[hosts] = max((w.value for w in works if w), default=0.0)
    return values[hosts]

  def best(left, largest, places):
    """Of islands no larger, in order, than the last one."""
    if not any(left) or not places:
      return 0.0
    found = 0.0
    for hosts in itertools.product(*(range(n + 1) for n in left)):
      if any(hosts) and hosts <= largest and value(hosts):
        rest = tuple(n - m for n, m in zip(left, hosts, strict=True))
        found = max(found, value(hosts) + best(rest, hosts, places - 1))
    return found

  whole = tuple(group.hosts for group in groups)
  return best(whole, whole, config.plan.peers)


groups_of = st.lists(
  st.builds(
    any_of,
    st.integers(1, 3),
    st.sampled_from([30, 40, 80, 240]),
    st.sampled_from([STRONG, WEAK, 'with 3 MB']),
    st.sampled_from([_FAST, _SLOW]),
  ),
  min_size=1,
  max_size=3,
)


class SearchTest(parameterized.TestCase):
  @hypothesis.given(groups_of, st.integers(1, 4))
  @hypothesis.settings(deadline=None)
  def test_near_the_best_of_all_partitions(self, pieces, peers):
    config = toy(', '.join(pieces), peers)
    bound = brute_force(config)
    plan = planner.plan(config)
    self.assertGreaterEqual(plan.value, 0.95 * bound)
    self.assertLessEqual(plan.value, bound * (1 + 1e-9))
    self.assertLessEqual(plan.busy, 1 + 1e-9)
    self.assertLessEqual(len(plan.works), peers)

  @hypothesis.given(groups_of)
  @hypothesis.settings(deadline=None)
  def test_what_is_promised_of_every_island(self, pieces):
    config = toy(', '.join(pieces))
    plan = planner.plan(config)
    terms = plan.terms
    for work in plan.works:
      self.assertLessEqual(work.computing, terms.window * (1 + 1e-9))
      self.assertLessEqual(work.upload, terms.put)
      self.assertLessEqual(work.gather, terms.gather)
      steps, batch = work.island.steps, work.island.batch
      self.assertEqual(work.tokens, steps * batch * config.data.context)
      # Another step of this batch, or another sequence a step, has no room,
      # or is not allowed: nobody ends long before the window.
      if batch < terms.batch and steps > terms.steps[0]:
        self.assertGreater(work.computing, 0.85 * terms.window)
    used = [sum(n) for n in zip(*(w.hosts for w in plan.works), strict=True)]
    for g, group in enumerate(plan.groups):
      in_islands = used[g] if used else 0
      self.assertEqual(in_islands + plan.idle[g], group.hosts)

  def test_moves_go_beyond_every_start(self):
    inventory_ = '2x4090 in pairs, 16xH100, 12xA100 in pairs, 40x4090'
    config = config_lib.load(
      str(helpers.CONFIGS / '72b.py'), [f'plan.inventory={inventory_}']
    )
    plan = planner.plan(config)
    search = planner._Search(plan.terms, plan.groups)
    starts = [start for some in search._starts() for start in some]
    self.assertGreater(plan.value, 1.01 * max(map(search.total, starts)))

  def test_beats_equal_work(self):
    config = toy(
      ', '.join(any_of(1, s, STRONG, _FAST) for s in (30, 60, 120, 240))
    )
    plan = planner.plan(config)
    # 1 + 2 + 4 + 8 parts of work, of which equal work does 2 x 4 or 1 x 8.
    self.assertBetween(plan.value / plan.equal, 1.7, 2.0)

  def test_who_is_too_many_is_pooled(self):
    plan = planner.plan(toy(any_of(12, 60, STRONG, _FAST), peers=3))
    self.assertLessEqual({w.kind for w in plan.works}, {'pool', 'replica'})
    self.assertLessEqual(len(plan.works), 3)
    self.assertEqual(sum(w.hosts[0] for w in plan.works), 12)

  def test_who_is_not_heard_in_time_is_idle(self):
    plan = planner.plan(toy(any_of(2, 60, STRONG, 'on 200 b/s')))
    self.assertEqual((plan.works, plan.idle), ((), (2,)))
    self.assertIn('none of these hosts', island_table.text(toy(''), plan))

  def test_without_a_window_it_says_what_is_missing(self):
    config = toy('1xH100')
    config = dataclasses.replace(
      config, plan=dataclasses.replace(config.plan, compute_minutes=0.0)
    )
    with self.assertRaisesRegex(config_lib.ConfigError, 'fewer than 21.0'):
      planner.plan(config)


class StagesTest(parameterized.TestCase):
  @parameterized.product(
    counts=[(2, 0), (3, 1), (2, 2), (1, 3)], layers=[3, 5], sizes=[(12, 6)]
  )
  def test_layers_lie_as_well_as_they_can(self, counts, layers, sizes):
    """Every way to lay the layers is tried."""
    speeds = (3.0, 7.0)
    config = toy('', layers=layers)
    groups = hardware.parse_inventory(
      ', '.join(
        any_of(1, speed, f'with {size} MB', _FAST)
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
        if sum(lie) != layers:
          continue
        times = []
        for i, (k, held) in enumerate(zip(devices, lie, strict=True)):
          size = groups[k].device.memory
          if held > partition._fit(config, size, i == head, depth):
            break
          work = held * of.layer_flops + (i == head) * of.table_flops
          times.append(work / groups[k].device.peak / 0.25)
        else:
          shortest.append(max(times))
    found = partition.cut(config, groups, counts, depth)
    assert found is not None
    self.assertAlmostEqual(found.slot / min(shortest), 1, delta=1e-6)
    self.assertEqual(sum(found.layers), layers)

  def test_stages_are_the_model(self):
    config = toy('', layers=3)
    of, whole = partition._model(config), memory.shards(config)
    self.assertEqual(3 * of.layer.params + of.tables.params, whole.params)
    flops = 3 * of.layer_flops + of.table_flops
    terms = island_costs.terms(config)
    self.assertAlmostEqual(flops / (terms.flops * config.data.context), 1)

  def test_more_in_flight_takes_more_memory(self):
    config = config_lib.load(str(helpers.CONFIGS / '72b.py'))
    held = [partition._fit(config, 24e9, False, n) for n in (1, 80, 200)]
    self.assertEqual(held, [1, 1, 0])
    self.assertEqual(partition._fit(config, 24e9, True, 1), -1)

  def test_who_cannot_hold_it_is_no_pipeline(self):
    config = toy('', layers=5)
    groups = hardware.parse_inventory(any_of(4, 3, WEAK, _FAST), config.plan)
    self.assertIsNone(partition.cut(config, groups, (4,), 4))

  def test_no_link_carries_more_than_it_can(self):
    # Devices so fast that links decide.
    config = toy(any_of(3, 60_000, WEAK, 'on 2 kb/s'), peers=2)
    plan = planner.plan(config)
    (work,) = plan.works
    self.assertEqual((work.island.rank, work.island.bits), (2, 4))
    carried = work.inside / (3 * 250.0 * plan.terms.window)
    self.assertBetween(carried, 0.6, 1.0)

  def test_slow_links_send_less_of_the_width(self):
    process_group = []
    for link in ('on 1 Gb/s', 'on 2 kb/s'):
      (work,) = planner.plan(toy(any_of(3, 60, WEAK, link))).works
      self.assertEqual((work.kind, work.island.stages), ('pipeline', 3))
      process_group.append(work.island.rank)
    self.assertEqual(process_group[0], 0)
    self.assertBetween(process_group[1], 1, 8)


class PaceTest(parameterized.TestCase):
  @hypothesis.given(
    st.floats(0.01, 2), st.floats(0, 2), st.floats(0, 5),
    st.integers(1, 8), st.floats(0.01, 100), st.integers(1, 64),
  )  # fmt: skip
  def test_most_is_the_most(self, each, beside, fixed, quantum, seconds, limit):
    pace = island_costs.StepTime(each, beside, fixed, quantum)
    batch = pace.most(seconds, limit)
    tried = [b for b in range(quantum, limit + 1, quantum)
             if pace.seconds(b) <= seconds]  # fmt: skip
    near = {max(tried, default=0)}
    # At the very edge either is right.
    near |= {b for b in range(0, limit + 1, quantum)
             if abs(pace.seconds(b) - seconds) < 1e-6}  # fmt: skip
    self.assertIn(batch, near)

  def test_steps_stay_near_those_of_the_run(self):
    terms = island_costs.terms(toy('1xH100'))
    # A sequence takes a second: 900 of them, 10 x 90 as well, 32 at most.
    self.assertEqual(
      island_costs.choose(
        [(1, island_costs.StepTime(1.0, 0.0, 0.0, 1))], terms, 160.0
      ),
      (10, [16]),
    )


class ConfigTest(absltest.TestCase):
  def test_hetero_is_what_is_planned(self):
    config = config_lib.load(str(helpers.CONFIGS / 'hetero.py'))
    plan = planner.plan(config)
    self.assertEqual(
      config_lib.show_islands(plan.islands),
      config_lib.show_islands(config.islands),
    )
    self.assertLen(plan.works, config.miners)
    tokens = [work.tokens for work in plan.works]
    self.assertBetween(max(tokens) / min(tokens), 8, 8.5)
    power = [0.0, 0.0]
    for work in plan.works:
      power[work.kind == 'pipeline'] += sum(
        n * group.device.peak
        for n, group in zip(work.hosts, plan.groups, strict=True)
      )
    self.assertEqual(power[0], power[1])


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


if __name__ == '__main__':
  absltest.main()
