"""Trackers in their offline modes: nothing leaves the folder."""

import contextlib
import importlib.util
import pathlib
import socket
import sqlite3
from unittest import mock

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant import extras
from covenant import plugins
from covenant.telemetry import trackers

_OWN = """
def make(run):
  class Tracker:
    def log(self, values):
      (run.folder / f'{values["step/loss"]}').touch()
    def finish(self):
      (run.folder / 'the end').touch()
  return Tracker()
"""


def _is_missing(name):
  return importlib.util.find_spec(name) is None


class TrackersTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def use(self, name):
    """Logs two records offline."""
    run = trackers.Run('project', 'run', self.folder, {'seed': 0}, False)
    config = config_lib.Telemetry(trackers=(name,))
    (tracker,) = trackers.open_trackers(config, run)
    for loss in (2.5, 2.25):
      tracker.log({'round': 1, 'step/loss': loss})
    tracker.finish()

  def no_connection(self, client, address):
    if client.family != socket.AF_UNIX and address[0] != '127.0.0.1':
      raise AssertionError(f'a tracker tried to reach {address}')
    return self.connect(client, address)

  def offline(self):
    self.connect = socket.socket.connect
    return mock.patch.object(
      socket.socket, 'connect', lambda *a: self.no_connection(*a)
    )

  @absltest.skipIf(_is_missing('wandb'), "needs the extra 'track'")
  @pytest.mark.slow
  def test_wandb(self):
    with self.offline():
      self.use('wandb')
    (file,) = self.folder.rglob('*.wandb')
    content = file.read_bytes()
    self.assertIn(b'step/loss', content)
    self.assertIn(b'2.25', content)

  @absltest.skipIf(_is_missing('trackio'), "needs the extra 'track'")
  def test_trackio(self):
    with (
      self.offline(),
      mock.patch.dict('os.environ', TRACKIO_SPACE_ID='a/b'),
      mock.patch.dict('os.environ', TRACKIO_DIR=str(self.folder / 'trackio')),
    ):
      self.use('trackio')
    file = next(self.folder.rglob('*.db'))
    with contextlib.closing(sqlite3.connect(file)) as database:
      rows = database.execute('SELECT CAST(metrics AS TEXT) FROM metrics')
      text = '\n'.join(row for (row,) in rows)
    self.assertIn('step/loss', text)
    self.assertIn('2.25', text)

  def test_a_tracker_of_ones_own(self):
    file = self.create_tempfile('own.py', _OWN).full_path
    self.use(f'{file}:make')
    self.assertCountEqual(
      [file.name for file in self.folder.iterdir()], ['2.5', '2.25', 'the end']
    )

  def test_gets_no_secret(self):
    config = config_lib.edit(
      config_lib.Config(),
      [
        'network.bucket=r2://a/b?secret=hush',
        'alerts.command=curl https://hooks.example.org/hush',
        'data.path=https://hush@example.org/x?token=hush',
      ],
    )
    run = trackers.run_of(config, 'miner', self.folder)
    self.assertEqual(run.config['optim.inner_steps'], 10)
    self.assertNotIn('hush', str(run))

  def test_missing_ones_are_named(self):
    with mock.patch.object(importlib.util, 'find_spec', return_value=None):
      with self.assertRaisesRegex(extras.MissingExtraError, r'\[track\]'):
        self.use('wandb')
    with self.assertRaisesRegex(plugins.PluginError, 'telemetry.trackers'):
      self.use('no_such_tracker')


if __name__ == '__main__':
  absltest.main()
