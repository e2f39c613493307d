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
from covenant.plan import partition
from covenant.plan import planner
from tests import helpers
from tests.plan import toy


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
    """Returns the best value of islands no larger than the last one."""
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
    toy.any_of,
    st.integers(1, 3),
    st.sampled_from([30, 40, 80, 240]),
    st.sampled_from([toy.STRONG, toy.WEAK, 'with 3 MB']),
    st.sampled_from([toy.FAST, toy.SLOW]),
  ),
  min_size=1,
  max_size=3,
)


class SearchTest(parameterized.TestCase):
  @hypothesis.given(groups_of, st.integers(1, 4))
  @hypothesis.settings(deadline=None)
  def test_near_the_best_of_all_partitions(self, pieces, peers):
    config = toy.make(', '.join(pieces), peers)
    bound = brute_force(config)
    plan = planner.plan(config)
    self.assertGreaterEqual(plan.value, 0.95 * bound)
    self.assertLessEqual(plan.value, bound * (1 + 1e-9))
    self.assertLessEqual(plan.busy, 1 + 1e-9)
    self.assertLessEqual(len(plan.works), peers)

  @hypothesis.given(groups_of)
  @hypothesis.settings(deadline=None)
  def test_what_is_promised_of_every_island(self, pieces):
    config = toy.make(', '.join(pieces))
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
    config = toy.make(
      f'{toy.any_of(3, 30, toy.WEAK, toy.FAST)}, '
      f'{toy.any_of(4, 80, toy.WEAK, toy.FAST)}'
    )
    plan = planner.plan(config)
    search = planner._Search(plan.terms, plan.groups)
    starts = [start for some in search._starts() for start in some]
    self.assertGreater(plan.value, 1.01 * max(map(search.total, starts)))

  def test_beats_equal_work(self):
    config = toy.make(
      ', '.join(
        toy.any_of(1, s, toy.STRONG, toy.FAST) for s in (30, 60, 120, 240)
      )
    )
    # So long a run has use for all their batches.
    config = dataclasses.replace(config, rounds=10**7)
    plan = planner.plan(config)
    # 1 + 2 + 4 + 8 parts of work, of which equal work does 2 x 4 or 1 x 8.
    self.assertBetween(plan.value / plan.equal, 1.7, 2.0)

  def test_who_is_too_many_is_pooled(self):
    plan = planner.plan(
      toy.make(toy.any_of(12, 60, toy.STRONG, 'on 40 Mb/s'), peers=3)
    )
    self.assertLessEqual({w.kind for w in plan.works}, {'pool', 'replica'})
    self.assertLessEqual(len(plan.works), 3)
    self.assertEqual(sum(w.hosts[0] for w in plan.works), 12)

  def test_who_is_not_heard_in_time_is_idle(self):
    plan = planner.plan(toy.make(toy.any_of(2, 60, toy.STRONG, 'on 200 b/s')))
    self.assertEqual((plan.works, plan.idle), ((), (2,)))
    self.assertIn('none of these hosts', island_table.text(toy.make(''), plan))

  def test_without_a_window_it_says_what_is_missing(self):
    config = toy.make('1xH100')
    config = dataclasses.replace(
      config, plan=dataclasses.replace(config.plan, compute_minutes=0.0)
    )
    with self.assertRaisesRegex(config_lib.ConfigError, 'fewer than 21.0'):
      planner.plan(config)


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
    self.assertBetween(max(tokens) / min(tokens), 13, 14)
    power = [0.0, 0.0]
    for work in plan.works:
      power[work.kind == 'pipeline'] += sum(
        n * group.device.peak
        for n, group in zip(work.hosts, plan.groups, strict=True)
      )
    self.assertEqual(power[0], power[1])


if __name__ == '__main__':
  absltest.main()
