"""The content of the page, and that text from others never becomes markup."""

import hashlib
import json
import pathlib
import platform
import re

import jax
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.report import page
from covenant.telemetry import provenance
from tests.report import reader
from tests.report import workdirs

HOSTILE = (
  '</td><script>alert(1)</script><img src=x onerror=alert(2)>"\' '
  'onfocus=alert(3) &\ud800'
)


class PageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')

  def page(self, **kwargs):
    path = page.write(workdirs.write(self.folder, **kwargs))
    self.assertEqual(path, self.folder / 'report.html')
    return path.read_text(encoding='utf-8')

  def assert_tame(self, read):
    """Asserts that the page has no markup but its own."""
    self.assertEqual(read.tags.count('script'), 1)
    self.assertNotIn('img', read.tags)
    self.assertEmpty([a for a, _ in read.attributes if a.startswith('on')])

  def test_numbers_of_the_run(self):
    text = self.page(rounds=6, planned=6)
    self.assertIn('6 of 6 rounds', text)
    self.assertNotIn('stopped, or in progress', text)
    facts = dict(re.findall(r'<dt>([^<]+)</dt><dd>([^<]+)</dd>', text))
    self.assertEqual(facts['held-out loss'], '1.0857')  # (1.6 + 4 / 7) / 2
    self.assertEqual(facts['training loss'], '2.1667')
    self.assertEqual(facts['tokens'], '12.3 k')
    self.assertEqual(facts['bytes sent'], '24.0 kB')
    # 6 rounds of 115 blocks of 12 seconds; 6 x 2 s, and 4 evaluations of 0.5.
    self.assertEqual(facts['simulated time'], '2:18:00')
    self.assertEqual(facts['measured time'], '00:14')

  def test_where_when_and_with_what(self):
    workdirs.write(self.folder, rounds=2)
    self.assertNotIn('Origin', page.write(self.folder).read_text())
    provenance.record(self.folder)
    rows = reader.Reader(page.write(self.folder).read_text()).rows
    start = next(i for i, row in enumerate(rows) if row[:1] == ['started'])
    found = dict(zip(*rows[start : start + 2], strict=True))
    self.assertEqual(found['host'], platform.node())
    self.assertIn(f'jax {jax.__version__}', found['versions'])
    self.assertRegex(found['started'], r'^\d{4}-\d\d-\d\d .* UTC$')

  def test_hostile_names_of_fields_stay_text(self):
    workdirs.write(self.folder)
    path = self.folder / 'config.json'
    raw = json.loads(path.read_text())
    raw[HOSTILE] = {'a': 1}  # the name of a section is in an attribute, too
    path.write_text(json.dumps(raw))
    read = reader.Reader(page.write(self.folder).read_text())
    self.assert_tame(read)

  @parameterized.parameters(
    {'detail': HOSTILE}, {'hotkey': HOSTILE}, {'verdict': HOSTILE},
    {'name': HOSTILE}, {'data': config_lib.Data(path=HOSTILE)},
  )  # fmt: skip
  def test_what_others_wrote_stays_text(self, **kwargs):
    text = self.page(rounds=2, **kwargs)
    self.assert_tame(reader.Reader(text))
    self.assertIn('&lt;script&gt;alert(1)', text)

  def test_errors_of_a_process_stay_text(self):
    workdirs.events(self.folder, error=HOSTILE)
    read = reader.Reader(page.write(self.folder).read_text())
    self.assert_tame(read)
    self.assertIn(['train', '1', '0'], read.rows)
    self.assertIn(['upload', '0', '1'], read.rows)

  def test_nothing_refers_to_elsewhere(self):
    read = reader.Reader(self.page())
    for name, value in read.attributes:
      if name in ('src', 'href', 'action', 'data'):
        self.assertRegex(value, '^(#|data:,$)')
      if name == 'style':
        self.fail('the policy of the page forbids it')
    # Without it, a browser requests one.
    self.assertIn(('rel', 'icon'), read.attributes)
    text = (self.folder / 'report.html').read_text()
    # The notice that the license of uPlot asks for is the only address.
    notice = '/*! https://github.com/leeoniya/uPlot (v1.6.32) */'
    self.assertEqual(text.count(notice), 1)
    text = text.replace(notice, '')
    self.assertNotRegex(text, r'https?://|@import|url\((?!#)')
    policies = [v for name, v in read.attributes if name == 'content']
    self.assertStartsWith(policies[0], "default-src 'none'; ")
    self.assertNotIn('unsafe', policies[0])

  def test_uplot_is_the_released_file(self):
    for name, digest in (
      ('uPlot.iife.min.js', '19c8d4c6ad88929a79f4ae49d6f71615'),
      ('uPlot.min.css', 'df630c6a8d6f8eeaff264b50f73ce5b1'),
    ):
      file = pathlib.Path(page.__file__).parent / 'uplot' / name
      found = hashlib.sha256(file.read_bytes()).hexdigest()
      self.assertStartsWith(found, digest)

  def test_a_long_run_is_thinned_out_and_says_so(self):
    workdirs.write(self.folder, rounds=900, miners=10)
    path = page.write(self.folder)
    text = path.read_text()
    self.assertLess(path.stat().st_size, 1_500_000)
    self.assertEqual(text.count('400 of 900 rounds are drawn and listed'), 14)
    self.assertIn('A mark may stand for up to 5 rounds.', text)

  @pytest.mark.slow
  def test_many_miners_stay_small(self):
    path = page.write(workdirs.write(self.folder, rounds=120, miners=256))
    self.assertLess(path.stat().st_size, 1_500_000)

  def test_a_short_run_is_smaller_than_a_picture(self):
    self.page()
    size = (self.folder / 'report.html').stat().st_size
    self.assertLess(size, 150_000)

  def test_equal_runs_make_equal_pages(self):
    first = self.page()
    self.assertEqual(first, self.page())


class SettingsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')

  def rows(self, **kwargs):
    path = page.write(workdirs.write(self.folder, **kwargs))
    return reader.Reader(path.read_text()).rows

  def test_phases_in_blocks_and_seconds(self):
    phases = config_lib.Phases(
      origin=7, round_blocks=50, put_blocks=5, select_blocks=3,
      takeover_blocks=2,
    )  # fmt: skip
    network = config_lib.Network(block_seconds=2.0)
    rows = [row[:3] for row in self.rows(phases=phases, network=network)]
    for row in (
      ['train', '1-44', '88'],
      ['put window', '45-49', '10'],
      ['upload, check, vote', '50-52', '6'],
      ['takeover', '53-54', '4'],
    ):
      self.assertIn(row, rows)
    text = (self.folder / 'report.html').read_text()
    self.assertIn('viewBox="0 0 55 1"', text)  # the timeline of all phases
    self.assertIn('<path d="M45 0H50V1H45z">', text)

  def test_config_says_what_is_not_the_default(self):
    rows = self.rows()
    self.assertIn(['adversaries', '["copier"]', '[]'], rows)
    self.assertIn(['optim.compression.k', '64', ''], rows)
    self.assertIn(['optim.compression.block', '[64, 64]', ''], rows)

  def test_config_of_another_version(self):
    workdirs.write(self.folder)
    path = self.folder / 'config.json'
    raw = json.loads(path.read_text())
    raw['model']['lanes'] = 3
    raw['phases']['nap_blocks'] = 1
    raw['adversaries'] = ['unheard-of']
    path.write_text(json.dumps(raw))
    rows = reader.Reader(page.write(self.folder).read_text()).rows
    self.assertIn(['model.lanes', '3', 'not a field of this version'], rows)
    self.assertIn(['rounds completed', '0', '1', '2', '3'], rows)

  def test_every_field_is_listed_once(self):
    names = [row[0] for row in self.rows() if len(row) == 3]
    fields = config_lib.flatten(config_lib.Config())
    self.assertEqual([n for n in names if n in fields], list(fields))


if __name__ == '__main__':
  absltest.main()
