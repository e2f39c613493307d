import json
import pathlib

from absl.testing import absltest

from covenant import config as config_lib
from covenant import metrics
from covenant.report import folder
from covenant.report import page
from tests.report import reader
from tests.report import workdirs


class FolderTest(absltest.TestCase):
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
    self.assertIn('4 of 9 rounds: stopped, or in progress', text)

  def test_a_torn_line_in_the_middle_is_counted(self):
    workdirs.write(self.folder, rounds=4)
    path = self.folder / 'verdicts.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join([lines[0][:-9] + lines[1], *lines[2:]]))
    run = folder.read(self.folder)
    self.assertEqual((sorted(run.verdicts), run.unreadable), ([2, 3], 1))
    self.assertIn(
      'Torn lines that were skipped: 1', page.write(self.folder).read_text()
    )

  def test_secrets_of_a_config_are_not_shown(self):
    """One written by hand, or by a network whose processes need them."""
    workdirs.write(self.folder)
    path = self.folder / 'config.json'
    raw = json.loads(path.read_text())
    raw['network']['name'] = 'wss://rpc.example.org/v1/SECRET'
    raw['network']['bucket'] = 's3://runs?key_id=SECRET&secret=SECRET'
    path.write_text(json.dumps(raw))
    text = page.write(self.folder).read_text()
    self.assertIn('rpc.example.org/hidden', text)
    self.assertNotIn('SECRET', text)

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
    rows = reader.Reader(page.write(path).read_text()).rows
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
