import dataclasses
import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import metrics
from covenant.report import comparison
from tests.report import reader
from tests.report import workdirs


class ComparisonTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    workdirs.write(self.root / 'short', rounds=4)
    workdirs.write(self.root / 'long', rounds=6, seed=7)

  def test_table_figures_and_page(self):
    made = comparison.write(
      [self.root / 'short', self.root / 'long'], self.root / 'new'
    )
    head, short, long = map(str.split, made.table.splitlines())
    self.assertEqual(head[0], 'run')
    self.assertEqual(short[:3], ['short', '1.2000', '4'])
    self.assertEqual(long[:4], ['long', '1.0857', '-0.1143', '6'])
    self.assertEqual(long[-1], '00:14')
    for path in made.figures:
      self.assertStartsWith(path.read_bytes(), b'\x89PNG')
    text = made.page.read_text()
    self.assertIn('Held-out loss against bytes', text)
    self.assertIn('Held-out loss minus that of short', text)
    # Two columns of numbers; a run has nothing where only the other was.
    self.assertIn('<td>1.2000</td><td>1.2000</td>', text)
    self.assertIn('<td></td><td>1.0857</td>', text)

  def test_fields_that_differ(self):
    made = comparison.write(
      [self.root / 'short', self.root / 'long'], self.root
    )
    fields = made.page.read_text().partition('Fields that differ')[2]
    self.assertIn('>seed</th><td>0</td><td>7</td>', fields)
    self.assertIn('>rounds</th><td>4</td><td>6</td>', fields)
    self.assertNotIn('>miners</th>', fields)

  def test_runs_of_one_name_are_told_apart(self):
    again = workdirs.write(self.root / 'other' / 'long', rounds=2)
    made = comparison.write([self.root / 'long', again], self.root)
    self.assertIn(str(again), made.table)

  def test_seeds_are_one_curve_with_a_band_against_a_baseline(self):
    names = ['a-0', 'a-1', 'a-2', 'b']
    for seed, name in enumerate(names[:3]):
      path = workdirs.write(self.root / name, rounds=4, seed=seed)
      file = path / 'metrics.jsonl'
      records = [
        dataclasses.replace(r, nats_per_byte=1.2 + seed / 10)
        if r.kind == 'evaluation' and r.round == 4
        else r
        for r in metrics.read(file)
      ]
      file.write_text(''.join(metrics.encode(r) + '\n' for r in records))
    workdirs.write(self.root / 'b', rounds=4, name='b')
    paths = [self.root / name for name in names]
    made = comparison.write(paths, self.root / 'new', baseline='b')
    group = 'a-0 (mean of 3 seeds)'
    line = next(x for x in made.table.splitlines() if x.startswith(group))
    self.assertEqual(line.split()[-4:], ['3', '1.3000', '0.1000', '+0.1000'])
    rows = reader.Reader(made.page.read_text()).rows
    start = rows.index(
      [
        'tokens trained, all miners', group, 'b',
        f'{group}, highest seed', f'{group}, lowest seed',
      ]
    )  # fmt: skip
    self.assertIn(
      ['8,192', '1.3000', '1.2000', '1.4000', '1.2000'], rows[start:][:5]
    )
    self.assertIn(['8,192', '+0.1000'], rows)  # the difference to b
    with self.assertRaisesRegex(
      config_lib.ConfigError, "--baseline: there is no run 'a-3'; did you mean"
    ):
      comparison.write(paths, self.root / 'new', baseline='a-3')

  @parameterized.parameters(
    (['long'], 'two runs or more, separated by commas; got 1'),
    ([], 'got 0'),
    (['long', 'none'], 'there is no folder .*none'),
    (['long', 'long'], 'a folder is named twice'),
    (['long', 'process'], 'with an evaluation; .*process has none'),
  )
  def test_what_cannot_be_compared(self, names, message):
    workdirs.events(self.root / 'process')
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      comparison.write([self.root / n for n in names], self.root / 'new')
    self.assertFalse((self.root / 'new').exists())


if __name__ == '__main__':
  absltest.main()
