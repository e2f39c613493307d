import json
import math

from absl.testing import absltest
from absl.testing import parameterized

from covenant.report import markup
from tests.report import reader

X = markup.Axis('tokens', '{:,.0f}'.format)
Y = markup.Axis('nats per token')


def _read(*series, x=X, **kwargs):
  text = markup.chart('loss', 'Loss', 'A note.', x, Y, series, **kwargs)
  read = reader.Reader(text)
  found = [v for name, v in read.attributes if name == 'data-chart']
  return read, [json.loads(v) for v in found], text


class ChartTest(parameterized.TestCase):
  def test_the_table_has_every_number_of_every_curve(self):
    read, (options,), _ = _read(
      markup.Series('a', [(1000, 2.0), (3000, 1.5)], 0),
      markup.Series('b', [(2000, 1.75), (3000, None)], None),
    )
    self.assertEqual(
      read.rows,
      [
        ['tokens', 'a', 'b'],
        ['1,000', '2.0000', ''],
        ['2,000', '', '1.7500'],
        ['3,000', '1.5000', ''],
      ],
    )
    self.assertEqual(options[0]['looks'], [0, None])
    self.assertEqual(options[0]['y'], 'nats per token')

  @parameterized.parameters(math.nan, math.inf, None)
  def test_what_is_not_finite_is_a_gap(self, value):
    read, _, _ = _read(markup.Series('a', [(0, 1.0), (1, value)], 0))
    self.assertEqual(read.rows[1:], [['0', '1.0000'], ['1', '']])

  def test_a_logarithmic_axis_has_no_zero(self):
    log = X._replace(log=True)
    read, (options,), _ = _read(
      markup.Series('a', [(0, 1.0), (1, 2.0)], 0), x=log
    )
    self.assertEqual(read.rows[1:], [['1', '2.0000']])
    self.assertTrue(options[0]['log'])

  @parameterized.parameters([()], [((0, math.nan),)])
  def test_nothing_to_draw(self, points):
    read, options, text = _read(markup.Series('a', points, 0))
    self.assertEqual((read.rows, options), ([], []))
    self.assertIn('No values were recorded.', text)

  def test_the_note_counts_values_that_are_cut_off(self):
    points = [(0, 9.0), (1, 5.0), (2, 1.0)]
    _, _, text = _read(markup.Series('a', points, 0), top=2.0)
    self.assertIn('Values above 2 are cut off: 2, up to 9.0000.', text)
    _, _, text = _read(markup.Series('a', points, 0), top=9.0)
    self.assertNotIn('cut off', text)

  def test_hostile_names_stay_text(self):
    name = '"><script>alert(1)</script>'
    read, (options,), _ = _read(
      markup.Series(name, [(0, 1.0)], 0), x=X._replace(label=name)
    )
    self.assertNotIn('script', read.tags)
    self.assertEqual(read.rows[0], [name, name])
    self.assertNotIn(name, options[0].values())

  def test_numbers_are_parsed_by_javascript(self):
    """page.js removes commas and calls Number."""
    points = [(-1e-5, -0.25), (12_345_678.9, 1e6)]
    read, _, _ = _read(markup.Series('a', points, 0))
    for row in read.rows[1:]:
      for cell in row:
        self.assertRegex(cell, r'^-?[0-9]{1,3}(,?[0-9]{3})*(\.[0-9]+)?$')


if __name__ == '__main__':
  absltest.main()
