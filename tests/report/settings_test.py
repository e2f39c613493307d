import json
import pathlib

from absl.testing import absltest

from covenant import config as config_lib
from covenant.report import page
from tests.report import reader
from tests.report import workdirs


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
