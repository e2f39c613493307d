import pathlib

import jax
import jax.numpy as jnp
from absl.testing import absltest

from covenant.node import workdir as workdir_lib


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
