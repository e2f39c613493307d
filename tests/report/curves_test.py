import pathlib

from absl.testing import absltest

from covenant import config as config_lib
from covenant.report import curves
from covenant.report import folder
from covenant.report import page
from tests.report import reader
from tests.report import workdirs


class CurvesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')

  def rows(self, **kwargs):
    path = page.write(workdirs.write(self.folder, **kwargs))
    return reader.Reader(path.read_text()).rows

  def test_every_curve_has_its_numbers_in_a_table(self):
    rows = self.rows(rounds=6, miners=4)
    for axis, last in (
      ('tokens trained, all miners', '12,288'),
      ('rounds completed', '6'),
      ('payload bytes sent, all miners', '24,000'),
      ('simulated hours', '2.300'),
      ('measured seconds', '14.000'),
    ):
      start = rows.index([axis, 'held-out', 'training, mean of miners'])
      self.assertIn([last, '2.1714', '2.1667'], rows[start : start + 8], axis)
    self.assertIn(
      ['rounds completed', '3: copier', '0', '1', '2'], rows, 'not named'
    )
    self.assertIn(['6', '2.1967', '2.1667', '2.1767', '2.1867'], rows)
    self.assertIn(['6', '1.3750', '1.0000', '1.1250', '1.2500'], rows)  # scores

  def test_time_by_links_where_the_config_says_them(self):
    plan = config_lib.Plan(
      inventory='4xany with 1 TFLOP/s with 1 GB on 1 kb/s',
      compute_minutes=15.0,
      peers=4,
    )
    rows = self.rows(rounds=6, plan=plan)
    head = ['held-out', 'training, mean of miners']
    (start,) = [
      i for i, row in enumerate(rows)
      if row[1:] == head and row[0].startswith('links-simulated')
    ]  # fmt: skip
    # 1000 bytes up and three times that down at 125 a second, 4 blocks of 12
    # seconds between, 2 latencies; steps take hardly anything.
    last = rows[start + 7]
    minutes = float(last[0]) if 'minutes' in rows[start][0] else 0.0
    self.assertAlmostEqual(minutes, 6 * (8 + 24 + 48 + 0.1) / 60, delta=0.02)
    self.assertEqual(last[1:], ['2.1714', '2.1667'])

  def test_time_of_a_run_whose_config_is_lost(self):
    workdirs.write(self.folder, rounds=3)
    (self.folder / 'config.json').unlink()
    run = folder.read(self.folder)
    seconds = curves.simulated_seconds(run)(run.rounds[-1])
    self.assertNotEqual(seconds, seconds)  # NaN: the chart stays empty
    self.assertEqual(curves.measured_seconds(run)(run.rounds[-1]), 7.0)
    self.assertIsNone(curves.linked_seconds(run))
    text = page.write(self.folder).read_text()
    self.assertNotIn('simulated hours', text)

  def test_weights_of_the_verdicts_where_metrics_have_none(self):
    workdirs.write(self.folder, rounds=3)
    path = self.folder / 'metrics.jsonl'
    weights = '"weights": [0.25, 0.25, 0.25, 0.25]'
    path.write_text(path.read_text().replace(weights, '"weights": []'))
    rows = reader.Reader(page.write(self.folder).read_text()).rows
    self.assertIn(['3', '0.1250', '0.1250', '0.1250', '0.1250'], rows)

  def test_an_absent_miner_leaves_a_gap(self):
    records = workdirs.records(4, 3, joins=3)
    workdirs.write(self.folder, rounds=4, miners=3)
    run = folder.read(self.folder)
    run = run._replace(rounds=[r for r in records if r.kind == 'round'])
    rows = reader.Reader(''.join(curves.miners(run))).rows
    self.assertEqual(rows[2], ['2', '', '3.5000', '3.5100'])  # uid 2 is named
    self.assertEqual(rows[3], ['3', '2.8533', '2.8333', '2.8433'])


if __name__ == '__main__':
  absltest.main()
