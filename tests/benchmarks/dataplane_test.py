"""The benchmark of the data plane runs, and moves the model it says."""

import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest

from benchmarks import patches
from tests import helpers


class DataplaneTest(absltest.TestCase):
  @pytest.mark.slow
  def test_prints_its_ratios(self):
    done = subprocess.run(
      [sys.executable, '-m', 'benchmarks.dataplane', '--megabytes=0.05',
       '--peers=3', '--turns=1'],
      capture_output=True,
      text=True,
      cwd=helpers.ROOT,
      timeout=300,
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    for text in 'a folder: obstore', 'S3: obstore', '(bar 0.8', '4 Gb/s':
      self.assertIn(text, done.stdout)

  def test_a_patch_is_small_where_little_changed(self):
    before = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    after = before.copy()
    after[:40] *= np.float32(1.01)
    few, all_ = (
      patches.patch_bytes(before, after),
      patches.patch_bytes(before, before[::-1].copy()),
    )
    self.assertLess(min(few.values()), 300)
    self.assertGreater(min(all_.values()), 3 * before.size)


if __name__ == '__main__':
  absltest.main()
