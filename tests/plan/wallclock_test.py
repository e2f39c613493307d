import dataclasses

from absl.testing import absltest

from covenant import config as config_lib
from covenant import metrics
from covenant.plan import planner
from covenant.plan import wallclock
from tests import helpers


def hetero(**plan):
  config = config_lib.load(str(helpers.CONFIGS / 'hetero.py'))
  return dataclasses.replace(
    config, plan=dataclasses.replace(config.plan, **plan)
  )


def record(number, uids=range(9), payload=2276):
  count = len(uids)
  return metrics.Round(
    round=number, tokens=number, loss=1.0, miner_losses=[1.0] * count,
    uids=list(uids), learning_rate=1e-3, bytes_up=1, compression_ratio=1.0,
    bytes_round=payload * count, dense_bytes_round=1, delta_norm=1.0,
    error_norm=1.0, payloads=count, seconds=1.0, tokens_per_second=1.0,
  )  # fmt: skip


class ClockTest(absltest.TestCase):
  def test_a_planned_round_takes_what_the_plan_says(self):
    config = hetero()
    plan, found = planner.plan(config), wallclock.pace(config)
    agree = 4 * 12.0
    last = max(w.computing + w.upload for w in plan.works)
    gather = max(w.gather for w in plan.works)
    self.assertAlmostEqual(found.seconds, last + agree + gather, delta=0.01)
    (seconds,) = wallclock.clock(
      config, [record(1, payload=plan.terms.payload)]
    )
    self.assertAlmostEqual(seconds, found.seconds)

  def test_overlap_leaves_the_training(self):
    config = hetero()
    longest = max(w.computing for w in planner.plan(config).works)
    (seconds,) = wallclock.clock(config, [record(1)], overlap=True)
    self.assertBetween(seconds, longest, longest + 1)

  def test_larger_payloads_of_more_peers_take_longer(self):
    config = hetero()
    rounds = [
      wallclock.clock(config, [record(1, range(peers), payload)])[0]
      for peers, payload in ((3, 2000), (9, 2000), (9, 9000))
    ]
    self.assertEqual(rounds, sorted(set(rounds)))

  def test_links_that_vary_do_so_by_the_seed(self):
    config, records = hetero(jitter=0.5), [record(r) for r in (1, 2, 3)]
    first = wallclock.clock(config, records)
    self.assertLen(set(first), 3)
    self.assertEqual(wallclock.clock(config, records), first)
    other = dataclasses.replace(config, seed=1)
    self.assertNotEqual(wallclock.clock(other, records), first)

  def test_who_is_away_does_not_delay(self):
    records = [record(r) for r in range(1, 40)]
    calm = wallclock.clock(hetero(), records)
    away = wallclock.clock(hetero(churn=0.2), records)
    self.assertTrue(any(a < b for a, b in zip(away, calm, strict=True)))
    self.assertTrue(all(a <= b for a, b in zip(away, calm, strict=True)))

  def test_a_round_of_nobody_is_one_of_the_chain(self):
    (seconds,) = wallclock.clock(hetero(), [record(1, uids=[])])
    self.assertEqual(seconds, 115 * 12.0)

  def test_without_an_inventory_it_says_so(self):
    with self.assertRaisesRegex(config_lib.ConfigError, 'expected whose links'):
      wallclock.peers(config_lib.Config())


class WallclockTest(absltest.TestCase):
  def test_tokens_to_a_loss(self):
    curve = [(0, 4.0), (100, 2.0), (200, 2.1), (300, 1.0)]
    self.assertEqual(wallclock.tokens_to(curve, 2.0), 100)
    self.assertEqual(wallclock.tokens_to(curve, 3.0), 50)
    self.assertAlmostEqual(wallclock.tokens_to(curve, 1.55), 250)
    self.assertEqual(wallclock.tokens_to(curve, 5.0), 0)
    with self.assertRaisesRegex(ValueError, 'has reached, got 0.5'):
      wallclock.tokens_to(curve, 0.5)

  def test_a_planned_network_beats_its_fastest_devices(self):
    config, curve = hetero(), [(0, 5.0), (10**6, 2.0)]
    fast = wallclock.without(config, 40e6)
    self.assertEqual(fast.plan.inventory.count('any'), 1)
    all_, few = (wallclock.seconds_to(c, curve, 3.0) for c in (config, fast))
    rounds = curve[1][0] * 2 / 3 / wallclock.pace(config).tokens
    self.assertAlmostEqual(all_, rounds * wallclock.pace(config).seconds)
    self.assertGreater(few / all_, 3)

  def test_nothing_is_left(self):
    with self.assertRaisesRegex(config_lib.ConfigError, '1e\\+09 FLOP/s'):
      wallclock.without(hetero(), 1e9)


if __name__ == '__main__':
  absltest.main()
