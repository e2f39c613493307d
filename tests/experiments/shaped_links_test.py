"""The plan's link model against shaped links and published measurements."""

from absl.testing import absltest

from covenant import config as config_lib
from covenant.plan import memory
from experiments import shaped_links


class PublishedTest(absltest.TestCase):
  def test_one_number_explains_sixteen(self):
    shares = shaped_links.published()
    self.assertLen(shares, 16)
    for share in shares:
      self.assertBetween(share.factor, 1 / 1.25, 1.25)
    # A longer round never computes a smaller part of it, and a faster link
    # neither.
    by = {(s.rate, s.steps): s.predicted for s in shares}
    self.assertLess(by[50, 1], by[50, 8])
    self.assertLess(by[50, 8], by[200, 8])


class TransfersTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.config = config_lib.load(shaped_links.CONFIG, shaped_links.SETS)

  def test_a_phase_takes_its_bytes(self):
    size = memory.shards(self.config).payload_bytes
    found = shaped_links.transfers(self.config)
    delay = shaped_links.LINK.delay
    self.assertAlmostEqual(found['upload'], delay + 8 * size / 1.5e6)
    self.assertAlmostEqual(found['apply'], delay + 2 * 8 * size / 3e6)
    self.assertAlmostEqual(found['collect'], delay + 3 * 8 * size / 3e6)

  def test_what_is_off_by_more_than_the_bar_is_missed(self):
    added = shaped_links.transfers(self.config)
    free = {name: [1.0, 0.5, 9.0] for name in shaped_links.PHASES}
    limited = {name: [1.0 + seconds] for name, seconds in added.items()}
    limited['apply'] = [2 * limited['apply'][0]]
    phases = shaped_links.compare(self.config, free, limited)
    self.assertAlmostEqual(phases[0].error, 0)
    self.assertAlmostEqual(phases[2].error, -0.5)
    lines = list(shaped_links.table(phases))
    self.assertTrue(lines[2].endswith('+0% | met |'), lines)
    self.assertTrue(lines[-1].endswith('-50% | MISSED |'), lines)


if __name__ == '__main__':
  absltest.main()
