import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.report import comparison
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
    self.assertEqual(long[:3], ['long', '1.0857', '6'])
    self.assertEqual(long[-1], '00:14')
    for path in made.figures:
      self.assertStartsWith(path.read_bytes(), b'\x89PNG')
    text = made.page.read_text()
    self.assertIn('Held-out loss against bytes', text)
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
