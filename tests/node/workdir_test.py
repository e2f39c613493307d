import contextlib
import dataclasses
import errno
import io
import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import files
from covenant import folder_lock
from covenant.node import base as node_lib
from covenant.node import workdir as workdir_lib


class LockTest(absltest.TestCase):
  def test_a_folder_is_of_one_process(self):
    folder = self.create_tempdir().full_path
    with workdir_lib.Workdir(folder, 'miner', '0'):
      in_use = folder_lock.FolderInUseError
      with self.assertRaisesRegex(in_use, 'another --workdir'):
        workdir_lib.Workdir(folder, 'validator', '1')
      with workdir_lib.Workdir(folder, 'miner', '0', rank=1):
        pass  # a folder of its own
      workdir_lib.Workdir(folder)  # of a program that only reads it
    with workdir_lib.Workdir(folder, 'miner', '0'):
      pass


class OwnerTest(absltest.TestCase):
  def test_data_may_move(self):
    folder = self.create_tempdir().full_path
    fields = {'source': 'text', 'path': '/a/x', 'digest': '0' * 64}
    config = config_lib.Config(data=config_lib.Data(**fields))
    with workdir_lib.Workdir(folder) as workdir:
      workdir.open_run(config, None, lambda record: None)
    workdir = workdir_lib.Workdir(folder)
    for path, digest, text in (
      ('/b/x', '0' * 64, None),
      ('/b/x', '1' * 64, 'data.digest'),
      ('/b/x', '', 'data.path'),
    ):
      moved = dataclasses.replace(config.data, path=path, digest=digest)
      other = dataclasses.replace(config, data=moved)
      if text is None:
        workdir.check_owner(other)
        continue
      with self.assertRaisesRegex(config_lib.ConfigError, text):
        workdir.check_owner(other)


class AlertTest(parameterized.TestCase):
  """Events of a process become alerts of the right class."""

  @parameterized.parameters(
    ('apply', 'OutOfSyncError: another history', 'lost'),
    (node_lib.LOST_ROUND, 'the loss is nan', 'diverged'),
    (node_lib.SKIPPED, '1 were not finite', 'diverged'),
    (node_lib.SPIKE, 'the loss is 9', 'diverged'),
    (node_lib.WEIGHTS, 'stake', 'weights'),
    (node_lib.WEIGHTS, '', None),
    ('apply', 'StoreError: no answer', None),
    ('train', '', None),
  )
  def test_class(self, what, error, kind):
    folder = self.create_tempdir().full_path
    with workdir_lib.Workdir(folder, 'miner', '5F') as workdir:
      workdir.measure(config_lib.Config())
      with mock.patch.object(workdir.telemetry, 'alert') as alert:
        workdir.event(node_lib.Event(7, 3, what, error, 0.5))
    found = [call.args[0] for call in alert.call_args_list]
    self.assertEqual(found, [kind] if kind else [])
    if error:
      self.assertStartsWith(workdir.last_error, what)
      self.assertNotIn('answer', workdir.last_error)

  def test_a_full_disk(self):
    folder = self.create_tempdir().full_path
    full = OSError(errno.ENOSPC, 'No space left on device')
    with workdir_lib.Workdir(folder, 'miner', '5F') as workdir:
      workdir.measure(config_lib.Config())
      with (
        mock.patch.object(workdir.telemetry, 'alert') as alert,
        mock.patch.object(files, 'append_jsonl', side_effect=full),
        contextlib.redirect_stderr(io.StringIO()) as err,
      ):
        for _ in range(3):
          workdir.event(node_lib.Event(7, 3, 'train', '', 0.5))
        self.assertEqual(err.getvalue().count('\n'), 1)
        self.assertIn('the disk is full', err.getvalue())
        with mock.patch.object(files, 'append_jsonl'):  # there was room
          workdir.event(node_lib.Event(8, 3, 'train', '', 0.5))
        workdir.event(node_lib.Event(9, 3, 'train', '', 0.5))
    self.assertEqual(alert.call_args.args[0], 'disk')
    self.assertEqual(err.getvalue().count('\n'), 2)

  def test_the_endpoint_is_in_the_status(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    config = config_lib.edit(config_lib.Config(), ['telemetry.prometheus=0'])
    with workdir_lib.Workdir(folder, 'miner', '5F') as workdir:
      workdir.measure(config)
      status = json.loads((folder / 'status.json').read_text())
      self.assertRegex(status['metrics'], r'^http://127\.0\.0\.1:\d+/metrics$')


class ProfileTest(absltest.TestCase):
  def test_traces_the_round_that_was_asked_for(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    found = []
    with workdir_lib.Workdir(workdir, profile=1) as trace:
      for r in (0, 0, 1, 1, 2):
        trace.begin_round(r)
        jax.block_until_ready(jnp.ones(2) + r)
        found.append(bool([*workdir.rglob('*.xplane.pb')]))
    self.assertEqual(found, [False] * 4 + [True])

  def test_ends_with_the_run(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    with workdir_lib.Workdir(workdir, profile=0) as trace:
      trace.begin_round(0)
    self.assertNotEmpty([*workdir.rglob('*.xplane.pb')])
    with workdir_lib.Workdir(workdir / 'none') as trace:
      trace.begin_round(0)
    self.assertFalse((workdir / 'none').exists())


if __name__ == '__main__':
  absltest.main()
