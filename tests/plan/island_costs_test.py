"""The rounds of islands end in time, and do as much as they can."""

import dataclasses

import hypothesis
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import strategies as st

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import hardware
from covenant.plan import island_costs
from covenant.plan import worth
from covenant.pool import deltas
from tests import helpers
from tests.plan import toy


def parse(config):
  return hardware.parse_inventory(config.plan.inventory, config.plan)


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
    terms = island_costs.terms(toy.make('1xH100'))
    # A sequence takes a second; a batch up to the run's own costs nothing.
    for window, chosen in ((80.0, (10, [8])), (40.0, (10, [4]))):
      self.assertEqual(
        island_costs.choose(
          [(1, island_costs.StepTime(1.0, 0.0, 0.0, 1))], terms, window
        ),
        chosen,
      )


class TermsTest(parameterized.TestCase):
  def test_the_windows_are_the_round(self):
    config = toy.make('1xH100')
    terms = island_costs.terms(config)
    phases, block = config.phases, config.network.block_seconds
    self.assertEqual(terms.window, 15 * 60)
    self.assertEqual(terms.put, phases.put_blocks * block)
    left = phases.round_blocks - phases.put_blocks - phases.select_blocks
    self.assertEqual(terms.window + terms.gather, left * block)
    self.assertEqual(terms.others, config.plan.peers - 1)
    own = config.optim.inner_steps
    self.assertEqual((terms.steps[0], terms.steps[-1]), (own // 2, 2 * own))

  @parameterized.parameters(0.0, 21.0, 500.0)
  def test_a_window_that_leaves_no_time_for_the_rest(self, minutes):
    config = toy.make('1xH100')
    config = dataclasses.replace(
      config, plan=dataclasses.replace(config.plan, compute_minutes=minutes)
    )
    with self.assertRaisesRegex(
      config_lib.ConfigError, f'fewer than 21.0.*got {minutes:g}'
    ):
      island_costs.terms(config)


class AloneTest(parameterized.TestCase):
  def test_a_round_of_a_replica(self):
    config = toy.make(toy.any_of(1, 60, toy.STRONG, toy.FAST))
    terms, groups = island_costs.terms(config), parse(config)
    work = island_costs.alone(terms, groups, 0)
    island = work.island
    self.assertEqual((work.kind, work.hosts, work.split), ('replica', (1,),
                     'whole'))  # fmt: skip
    self.assertEqual(
      work.tokens, island.steps * island.batch * config.data.context
    )
    weight = worth.of_batch(config, island.batch)
    self.assertEqual(work.value, work.tokens * weight)
    # All arithmetic is of tokens, so that the share that is busy is known.
    speed = 60e6 * config.plan.peak_fraction
    self.assertAlmostEqual(
      work.busy, work.tokens * terms.flops / speed / terms.window
    )
    self.assertBetween(work.computing, 0.85 * terms.window, terms.window)
    self.assertEqual(work.uploaded, terms.payload)
    self.assertEqual(work.downloaded, terms.others * terms.payload)
    self.assertAlmostEqual(work.upload, terms.payload / 50e3 + 0.05)
    self.assertAlmostEqual(work.gather, work.downloaded / 50e3 + 0.05)
    self.assertEqual(work.inside, 0)

  @parameterized.parameters(
    (toy.WEAK, toy.FAST),  # the model does not fit
    (toy.STRONG, 'on 200 b/s'),  # the payload is late
  )
  def test_a_host_that_cannot_take_part(self, memory, link):
    config = toy.make(toy.any_of(1, 60, memory, link))
    terms = island_costs.terms(config)
    self.assertIsNone(island_costs.alone(terms, parse(config), 0))


class PoolTest(parameterized.TestCase):
  def test_workers_share_a_payload(self):
    config = toy.make(
      f'{toy.any_of(2, 60, toy.STRONG, "on 4 Mb/s")}, '
      f'{toy.any_of(1, 120, toy.STRONG, "on 8 Mb/s")}'
    )
    terms, groups = island_costs.terms(config), parse(config)
    one, two = (island_costs.alone(terms, groups, g) for g in range(2))
    work = island_costs.pool(terms, groups, (2, 1))
    self.assertEqual((work.kind, work.hosts), ('pool', (2, 1)))
    self.assertEqual(work.uploaded, terms.payload)
    self.assertEqual(work.downloaded, terms.others * terms.payload)
    # Two workers fetch the parameters and send their deltas.
    each = 4 * llama.num_params(config.model)
    each += island_costs.pool_delta_bytes(config)
    self.assertEqual(work.inside, config.pool.subrounds * 2 * each)
    # As much as its members alone, less what the exchange between them takes.
    alone = 2 * one.tokens + two.tokens
    self.assertBetween(work.tokens / alone, 0.7, 1.0)
    self.assertLessEqual(work.computing, terms.window)

  def test_a_pool_pays_for_the_link_of_its_machine(self):
    config = toy.make(toy.any_of(3, 60, toy.STRONG, 'on 400 kb/s'))
    terms, groups = island_costs.terms(config), parse(config)
    work = island_costs.pool(terms, groups, (3,))
    (batch,) = work.of_groups
    pace = island_costs.shared_model(config, groups[0]).pace
    # Ten times two copies of 0.6 MB leave a link of 50 kB/s.
    state = 4 * llama.num_params(config.model)
    spent = config.pool.subrounds * (2 * state / 50e3 + 2 * 0.05)
    self.assertGreater(spent, 0.2 * terms.window)
    self.assertAlmostEqual(
      work.computing, work.island.steps * pace.seconds(batch) + spent
    )

  def test_the_delta_of_a_worker_is_that_of_the_pool(self):
    config = toy.make('')
    spec = deltas.spec(config, llama.abstract(config.model))
    self.assertEqual(island_costs.pool_delta_bytes(config), spec.payload_bytes)

  def test_a_pool_needs_two_that_hold_the_model(self):
    config = toy.make(
      f'{toy.any_of(2, 60, toy.STRONG, toy.FAST)}, '
      f'{toy.any_of(1, 60, toy.WEAK, toy.FAST)}'
    )
    terms, groups = island_costs.terms(config), parse(config)
    self.assertIsNotNone(island_costs.pool(terms, groups, (2, 0)))
    self.assertIsNone(island_costs.pool(terms, groups, (1, 0)))
    self.assertIsNone(island_costs.pool(terms, groups, (2, 1)))


class SharedModelTest(absltest.TestCase):
  def host(self, text):
    config = toy.make(text)
    (group,) = parse(config)
    return island_costs.shared_model(config, group)

  def test_a_model_that_fits_is_copied(self):
    each = 'with 60 MFLOP/s with 9 MB on 400 kb/s'
    alone, pair = (
      self.host(f'1xany {each}'),
      self.host(f'2xany in pairs {each}'),
    )
    self.assertEqual((alone.text, pair.text), ('whole', 'fsdp 1 x 2 copies'))
    one, two = alone.pace, pair.pace
    self.assertAlmostEqual(two.each, one.each / 2)
    # The copies' gradients are summed once per step.
    self.assertEqual((one.fixed, one.quantum), (0, 1))
    self.assertGreater(two.fixed, 0)
    self.assertEqual(two.quantum, 2)

  def test_a_host_without_memory_for_the_state_does_not_hold_it(self):
    each = '1xany with 60 MFLOP/s with 9 MB on 400 kb/s'
    self.assertIsNotNone(self.host(f'{each} with 4 MB RAM'))
    self.assertIsNone(self.host(f'{each} with 1 MB RAM'))

  def test_a_model_that_does_not_fit_is_cut(self):
    config = config_lib.load(str(helpers.CONFIGS / '72b.py'))
    large, small = (
      hardware.parse_inventory(text, config.plan)[0]
      for text in ('8xB200', '8xH100')
    )
    placed = island_costs.shared_model(config, large)
    self.assertEqual((placed.text, placed.pace.fixed), ('fsdp 8', 0))
    self.assertGreater(
      placed.pace.beside, 0
    )  # weights are gathered for each sequence
    self.assertIsNone(island_costs.shared_model(config, small))


if __name__ == '__main__':
  absltest.main()
