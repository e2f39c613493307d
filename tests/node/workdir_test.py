import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from absl.testing import absltest

from covenant import config as config_lib
from covenant import files
from covenant.node import workdir as workdir_lib


class LockTest(absltest.TestCase):
  def test_a_folder_is_of_one_process(self):
    folder = self.create_tempdir().full_path
    with workdir_lib.Workdir(folder, 'miner', '0'):
      with self.assertRaisesRegex(files.FolderInUseError, 'another --workdir'):
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
