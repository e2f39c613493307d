import pathlib

import jax
import jax.numpy as jnp
from absl.testing import absltest

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
