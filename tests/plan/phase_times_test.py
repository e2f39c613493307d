import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import memory
from covenant.plan import phase_times
from covenant.protocol import round as round_lib
from tests import helpers


def load(name, *overrides):
  return config_lib.load(str(helpers.CONFIGS / f'{name}.py'), overrides)


def times(config):
  return phase_times.times(config, memory.shards(config).payload_bytes)


class PhaseTimesTest(parameterized.TestCase):
  @parameterized.parameters('8b', '72b', '1t')
  def test_the_configs_of_networks_can_keep_their_phases(self, name):
    config = load(name)
    self.assertEmpty([*phase_times.problems(config, times(config))])

  @parameterized.parameters('put_blocks', 'select_blocks', 'takeover_blocks')
  def test_a_phase_that_is_too_short_names_what_would_do(self, field):
    config = load('72b')
    least = phase_times.least_phases(config, times(config))
    needed = getattr(least, field.removesuffix('_blocks'))
    short = load('72b', f'phases.{field}={needed - 1}')
    (problem,) = [
      text
      for text in phase_times.problems(short, times(short))
      if not text.startswith('phases.round_blocks')
    ]
    self.assertStartsWith(
      problem, f'phases.{field}: expected at least {needed} '
    )
    self.assertEndsWith(problem, f'got {needed - 1}')
    enough = load('72b', f'phases.{field}={needed}', 'phases.round_blocks=120')
    self.assertEmpty([*phase_times.problems(enough, times(enough))])

  def test_covenants_setting_trains_97_percent_of_the_time(self):
    config = load('72b')
    plan = phase_times.round_plan(config, times(config))
    self.assertGreaterEqual(plan.utilization, 0.97)
    self.assertEqual(plan.compute, 20 * 60)
    alone = load('72b', 'optim.overlap=0')
    self.assertLess(
      phase_times.round_plan(alone, times(alone)).utilization, 0.8
    )

  def test_slower_links_need_longer_phases(self):
    config = load('72b', 'plan.upload=13.75', 'plan.download=62.5')
    found = times(config)
    fast, slow = (
      phase_times.least_phases(x, times(x)) for x in (load('72b'), config)
    )
    for one, other in zip(fast, slow, strict=True):
      self.assertLess(one, other)
    # 20 payloads of 1.379 GB at 62.5 MB/s.
    self.assertBetween(found.collect, 441, 446)
    made, plan = phase_times.least_round(config)
    self.assertEmpty([*phase_times.problems(made, times(made))])
    self.assertBetween(plan.utilization, 0.6, 0.8)

  def test_the_shortest_round_is_no_shorter_than_its_phases(self):
    config, plan = phase_times.least_round(load('8b', 'optim.overlap=5'))
    self.assertEmpty([*phase_times.problems(config, times(config))])
    shorter = dataclasses.replace(
      config.phases, round_blocks=config.phases.round_blocks - 1
    )
    with self.assertRaises((config_lib.ConfigError, AssertionError)):
      made = dataclasses.replace(config, phases=shorter)
      shorter.check()
      self.assertEmpty([*phase_times.problems(made, times(made))])
    self.assertLess(plan.utilization, 1)

  def test_votes_are_in_time_by_the_schedule(self):
    """The least phases, walked through block by block."""
    config = load('72b')
    found = times(config)
    least = phase_times.least_phases(config, found)
    schedule = round_lib.Schedule(config.phases, overlap=True)
    unsure, block = config.phases.confirmations, config.network.block_seconds
    sent = 1 + config.plan.finality_blocks
    collects = schedule.collection_block(0) + unsure  # as it is final
    proposes = collects + -(-found.collect // block)
    proposed = proposes + sent  # in a block that a validator sees
    voted = proposed + unsure + 1 + sent
    self.assertLessEqual(voted, schedule.start(1) + least.select)
    self.assertLessEqual(voted, schedule.decision_block(0))
    patience = (schedule.decision_block(0) - collects) / 2 * block
    self.assertGreaterEqual(patience, found.collect)

  def test_more_cores_decode_sooner(self):
    few, many = load('72b', 'plan.cores=4'), load('72b', 'plan.cores=64')
    self.assertGreater(times(few).collect, 1.5 * times(many).collect)
    self.assertGreater(times(few).fingerprint, 8 * times(many).fingerprint)


if __name__ == '__main__':
  absltest.main()
