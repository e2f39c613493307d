"""What the page says, and that nobody but us writes its markup."""

import html.parser
import json
import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import metrics
from covenant.report import folder
from covenant.report import page
from tests.report import workdirs

HOSTILE = (
  '</td><script>alert(1)</script><img src=x onerror=alert(2)>"\' '
  'onfocus=alert(3) &\ud800'
)


class _Reader(html.parser.HTMLParser):
  """The elements, attributes and tables of a page."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str | None]] = []
    self.rows: list[list[str]] = []
    self._cell = False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
      self._cell = True

  def handle_endtag(self, tag):
    self._cell = self._cell and tag not in ('td', 'th')

  def handle_data(self, data):
    if self._cell:
      self.rows[-1][-1] += data


class PageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')

  def page(self, **kwargs):
    path = page.write(workdirs.write(self.folder, **kwargs))
    self.assertEqual(path, self.folder / 'report.html')
    return path.read_text(encoding='utf-8')

  def rows(self, text):
    return _Reader(text).rows

  def assert_tame(self, read):
    """No markup is there that is not ours."""
    self.assertEqual(read.tags.count('script'), 1)
    self.assertNotIn('img', read.tags)
    self.assertEmpty([a for a, _ in read.attributes if a.startswith('on')])

  def test_numbers_of_the_run(self):
    text = self.page(rounds=6, planned=6)
    self.assertIn('6 of 6 rounds', text)
    self.assertNotIn('stopped, or under way', text)
    facts = dict(re.findall(r'<dt>([^<]+)</dt><dd>([^<]+)</dd>', text))
    self.assertEqual(facts['held-out loss'], '1.0857')  # (1.6 + 4 / 7) / 2
    self.assertEqual(facts['training loss'], '2.1667')
    self.assertEqual(facts['tokens'], '12.3 k')
    self.assertEqual(facts['bytes sent'], '24.0 kB')
    # 6 rounds of 115 blocks of 12 seconds; 6 x 2 s, and 4 evaluations of 0.5.
    self.assertEqual(facts['simulated time'], '2:18:00')
    self.assertEqual(facts['measured time'], '00:14')

  def test_every_curve_has_its_numbers_in_a_table(self):
    text = self.page(rounds=6, miners=4)
    rows = self.rows(text)
    for axis, last in (
      ('tokens trained, all miners', '12,288'),
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
    rows = self.rows(self.page(rounds=6, plan=plan))
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

  def test_who_was_refused_and_why(self):
    self.assertIn(
      [
        '3: copier', 'COPY', 'the message copies an earlier one', '3',
        '0, 2, 4', 'of uid 0',
      ],
      self.rows(self.page(rounds=6)),
    )  # fmt: skip

  def test_nobody_was_refused(self):
    text = self.page(rounds=2, verdict='VALID')
    self.assertIn('Nobody was refused or penalized in 2 rounds.', text)

  def test_penalties_are_told(self):
    workdirs.write(self.folder, rounds=2, verdict='VALID')
    path = self.folder / 'verdicts.jsonl'
    path.write_text(
      path.read_text().replace('"penalty": 1.0', '"penalty": 0.5')
    )
    rows = self.rows(page.write(self.folder).read_text())
    self.assertIn('PENALTY', {row[1] for row in rows if len(row) > 1})

  def test_phases_in_blocks_and_seconds(self):
    phases = config_lib.Phases(
      origin=7, round_blocks=50, put_blocks=5, select_blocks=3,
      takeover_blocks=2,
    )  # fmt: skip
    text = self.page(
      phases=phases, network=config_lib.Network(block_seconds=2.0)
    )
    rows = [row[:3] for row in self.rows(text)]
    for row in (
      ['train', '1-44', '88'],
      ['put window', '45-49', '10'],
      ['upload, check, vote', '50-52', '6'],
      ['takeover', '53-54', '4'],
    ):
      self.assertIn(row, rows)

  def test_config_says_what_is_not_the_default(self):
    rows = self.rows(self.page())
    self.assertIn(['adversaries', '["copier"]', '[]'], rows)
    self.assertIn(['optim.compression.k', '64', ''], rows)
    self.assertIn(['optim.compression.block', '[64, 64]', ''], rows)

  def test_config_of_another_version(self):
    workdirs.write(self.folder)
    path = self.folder / 'config.json'
    raw = json.loads(path.read_text())
    raw['model']['lanes'] = 3
    raw['phases']['nap_blocks'] = 1
    raw['adversaries'] = 'unheard-of'
    raw[HOSTILE] = {'a': 1}  # the name of a section is in an attribute, too
    path.write_text(json.dumps(raw))
    read = _Reader(page.write(self.folder).read_text())
    self.assert_tame(read)
    rows = read.rows
    self.assertIn(['model.lanes', '3', 'not a field of this version'], rows)
    self.assertIn(['rounds completed', '0', '1', '2', '3'], rows)

  @parameterized.parameters(
    {'detail': HOSTILE}, {'hotkey': HOSTILE}, {'verdict': HOSTILE},
    {'name': HOSTILE}, {'data': config_lib.Data(path=HOSTILE)},
  )  # fmt: skip
  def test_what_others_wrote_stays_text(self, **kwargs):
    text = self.page(rounds=2, **kwargs)
    self.assert_tame(_Reader(text))
    self.assertIn('&lt;script&gt;alert(1)', text)

  def test_errors_of_a_process_stay_text(self):
    workdirs.events(self.folder, error=HOSTILE)
    read = _Reader(page.write(self.folder).read_text())
    self.assert_tame(read)
    self.assertIn(['train', '1', '0'], read.rows)
    self.assertIn(['upload', '0', '1'], read.rows)

  def test_nothing_refers_to_elsewhere(self):
    read = _Reader(self.page())
    for name, value in read.attributes:
      if name in ('src', 'href', 'action', 'data'):
        self.assertRegex(value, '^(#|data:,$)')
      if name == 'style':
        self.fail('the policy of the page forbids it')
    self.assertIn(('rel', 'icon'), read.attributes)  # or a browser asks for one
    text = (self.folder / 'report.html').read_text()
    self.assertNotRegex(text, r'https?://|@import|url\((?!#)')
    policies = [v for name, v in read.attributes if name == 'content']
    self.assertStartsWith(policies[0], "default-src 'none'; ")

  def test_a_long_run_is_thinned_out_and_says_so(self):
    workdirs.write(self.folder, rounds=900, miners=10)
    path = page.write(self.folder)
    text = path.read_text()
    self.assertLess(path.stat().st_size, 1_500_000)
    # Seven figures, each for those who see it and for those who do not.
    self.assertEqual(text.count('400 of 900 rounds are drawn and listed'), 14)
    self.assertIn('A mark may stand for up to 3 rounds.', text)

  def test_many_miners_stay_small(self):
    path = page.write(workdirs.write(self.folder, rounds=120, miners=256))
    self.assertLess(path.stat().st_size, 1_500_000)
    self.assertIn('others in grey', path.read_text())

  def test_equal_runs_make_equal_pages(self):
    first = self.page()
    self.assertEqual(first, self.page())


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path, 'run')

  def test_torn_last_lines_are_of_a_run_under_way(self):
    workdirs.write(self.folder, rounds=4, planned=9)
    for name in ('metrics.jsonl', 'verdicts.jsonl'):
      path = self.folder / name
      path.write_text(path.read_text()[:-20])
    run = folder.read(self.folder)
    self.assertLen(run.rounds, 4)
    self.assertLen(run.verdicts, 3)
    self.assertEqual(run.unreadable, 0)
    text = page.write(self.folder).read_text()
    self.assertIn('4 of 9 rounds: stopped, or under way', text)

  def test_a_torn_line_in_the_middle_is_counted(self):
    workdirs.write(self.folder, rounds=4)
    path = self.folder / 'verdicts.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join([lines[0][:-9] + lines[1], *lines[2:]]))
    run = folder.read(self.folder)
    self.assertEqual((sorted(run.verdicts), run.unreadable), ([2, 3], 1))
    self.assertIn(
      'Torn lines, not read: 1', page.write(self.folder).read_text()
    )

  def test_the_first_validator_is_told_of(self):
    workdirs.write(self.folder, rounds=2)
    path = self.folder / 'verdicts.jsonl'
    other = path.read_text().replace('"validator": 4', '"validator": 5')
    path.write_text(path.read_text() + other.replace('COPY', 'LATE'))
    text = page.write(self.folder).read_text()
    self.assertIn('Found by the validator of uid 4.', text)
    self.assertNotIn('LATE', text)

  def test_before_the_first_round(self):
    path = page.write(workdirs.write(self.folder, rounds=0, planned=5))
    self.assertIn('No round yet.', path.read_text())

  def test_a_process_has_the_config_of_its_network(self):
    workdirs.write(self.folder)
    path = workdirs.events(self.folder / 'miner-0')
    self.assertEqual(folder.read(path).name, 'a-run')
    text = page.write(path).read_text()
    self.assertNotIn('>Summary<', text)  # there is nothing to sum up
    self.assertNotIn('To run it again', text)

  def test_what_an_evaluator_found(self):
    path = workdirs.events(self.folder)
    lines = '{"round": 3, "nats_per_byte": 2.5}\n{"round": 6, "nats_per'
    (path / 'evaluations.jsonl').write_text(lines)
    rows = _Reader(page.write(path).read_text()).rows
    self.assertIn(['3', '2.5000'], rows)

  def test_what_is_no_workdir(self):
    missing = self.folder / 'none'
    with self.assertRaisesRegex(config_lib.ConfigError, f'no folder {missing}'):
      page.write(missing)
    workdirs.events(self.folder / 'net' / 'miner-0')
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'has none of metrics.*processes have.*: miner-0'
    ):
      page.write(self.folder / 'net')
    self.assertFalse((self.folder / 'net' / 'report.html').exists())

  def test_malformed_files_are_named(self):
    workdirs.write(self.folder)
    (self.folder / 'config.json').write_text('{')
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'config.json: not JSON'
    ):
      page.write(self.folder)
    (self.folder / 'metrics.jsonl').write_text('{}\n')
    with self.assertRaisesRegex(metrics.MetricsError, 'metrics.jsonl:1: kind'):
      page.write(self.folder)


if __name__ == '__main__':
  absltest.main()
