from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.plan import timing

# What Covenant-72B's paper says: 500 Mb/s down, 110 Mb/s up, 70 s for both
# (arXiv 2603.08163). 14 bits a value, one value of 64.
PAYLOAD = 72_747_327_488 / 64 * 14 / 8
CONTRIBUTORS = 16.9  # on average


class PublishedTest(parameterized.TestCase):
  @parameterized.parameters(*timing.PUBLISHED)
  def test_utilization_comes_out_as_reported(self, name):
    run = timing.PUBLISHED[name]
    share = timing.utilization(run.compute, run.communication)
    self.assertEqual(round(share, 3), run.utilization)

  def test_only_megabytes_come_near_the_measured_time(self):
    measured = timing.PUBLISHED['Covenant-72B'].communication
    seconds = {}
    for name, unit in {'megabits': 1e6 / 8, 'megabytes': 1e6}.items():
      speeds = timing.Links(110 * unit, 500 * unit)
      times = timing.round_time(speeds, 1200, PAYLOAD, CONTRIBUTORS)
      seconds[name] = times.upload + times.gather
    self.assertBetween(seconds['megabytes'] / measured, 0.8, 1.2)
    self.assertGreater(seconds['megabits'] / measured, 9)

  def test_the_default_links_are_those_in_megabytes(self):
    speeds = timing.links_of(config_lib.Plan())
    self.assertEqual(speeds, timing.Links(110e6, 500e6))


class GatherTest(parameterized.TestCase):
  LINKS = timing.Links(100.0, 500.0)

  def test_direct(self):
    gather = timing.direct(self.LINKS, 1000.0, 21)
    self.assertEqual(gather, timing.Gather(20_000.0, 10.0 + 40.0))

  def test_a_round_is_its_phases_one_after_another(self):
    times = timing.round_time(self.LINKS, 50.0, 1000.0, 21)
    self.assertEqual(times, timing.RoundSeconds(50.0, 10.0, 40.0))
    self.assertEqual(times.total, 100.0)
    self.assertEqual(times.utilization, 0.5)

  @parameterized.parameters((1, 0.25), (2, 0.4375), (1000, 1.0))
  def test_union_of_random_choices(self, peers, share):
    self.assertAlmostEqual(timing.union_density(0.25, peers), share)

  def test_a_sum_does_not_grow_with_peers_for_ever(self):
    params = 1 << 20
    dense = params / 8 * 17
    sizes = [
      timing.aggregated(self.LINKS, 1.0, n, params, 1 / 64).fetched
      for n in (1, 100, 10_000)
    ]
    self.assertEqual(sizes, sorted(sizes))
    self.assertAlmostEqual(sizes[0], params / 8 * (1 + 16 / 64))
    self.assertAlmostEqual(sizes[2], dense, delta=dense / 1e6)

  def test_a_tree_of_one_level_is_one_gather_and_the_result(self):
    gather = timing.tree(self.LINKS, 1000.0, 20)
    self.assertEqual(gather.fetched, 1000.0)
    # Up; 19 down and up again; the sum down.
    self.assertEqual(gather.seconds, 10 + 38 + 10 + 2)

  def test_a_tree_has_as_many_levels_as_it_needs(self):
    seconds = [
      timing.tree(self.LINKS, 1000.0, n).seconds for n in (1, 20, 21, 400, 401)
    ]
    # 21 peers: two groups, then these two; 401: a third level.
    self.assertEqual(seconds, [12.0, 60.0, 72.0, 108.0, 120.0])


if __name__ == '__main__':
  absltest.main()
