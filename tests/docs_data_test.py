"""The commands of docs/data.md, from ten Parquet files to a run."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl.testing import absltest

from tests import helpers


class DataPageTest(absltest.TestCase):
  @pytest.mark.docs
  def test_from_ten_files_to_a_run_in_four_commands(self):
    page = (helpers.ROOT / 'docs' / 'data.md').read_text(encoding='utf-8')
    block = re.search(r'```sh\n(.*?)```', page, re.DOTALL)
    lines = [shlex.split(line) for line in block[1].splitlines()]
    self.assertLen(lines, 4)
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name in ('run.py', 'configs'):
      (folder / name).symlink_to(helpers.ROOT / name)
    out = []
    for python, *words in lines:
      self.assertEqual(python, 'python')
      done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(helpers.ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
      )
      self.assertEqual(done.returncode, 0, done.stderr)
      out.append(done.stdout)
    self.assertLen(list((folder / 'corpus').glob('*.parquet')), 10)
    self.assertIn('--config.data.path=tokens', out[1])
    self.assertRegex(out[2], r'source   0.parquet: \d+ documents')
    self.assertIn('all verified', out[2])
    self.assertIn('parameters: ', out[3])


if __name__ == '__main__':
  absltest.main()
