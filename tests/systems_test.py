"""Modules and a short run on systems that lack parts of Linux."""

import subprocess
import sys

import pytest
from absl.testing import absltest

from tests import helpers

# First all libraries are loaded, which know their systems. Then this package is
# loaded again, as where neither Windows nor macOS has these.
PROGRAM = """
import importlib, os, pkgutil, sys, tempfile

import covenant

def modules():
  for info in pkgutil.walk_packages(covenant.__path__, 'covenant.'):
    if info.name != 'covenant.__main__':
      yield importlib.import_module(info.name)

assert len(list(modules())) > 200
for name in [n for n in sys.modules if n.partition('.')[0] == 'covenant']:
  del sys.modules[name]
for name in 'fcntl', 'resource', 'termios', 'pwd', 'grp', 'readline':
  sys.modules[name] = None
for name in (
  'fork', 'forkpty', 'sysconf', 'sched_getaffinity', 'sched_setaffinity',
  'getuid', 'geteuid', 'getpgid', 'killpg', 'pread', 'pwrite', 'getloadavg',
):
  if hasattr(os, name):
    delattr(os, name)

import covenant

count = len(list(modules()))
results = covenant.emulate(
  'tiny', ['rounds=1'], workdir=tempfile.mkdtemp() + '/run'
)
print(count, results.finished)
"""


class SystemsTest(absltest.TestCase):
  @pytest.mark.slow
  def test_all_modules_and_a_run_without_what_only_linux_has(self):
    done = subprocess.run(
      [sys.executable, '-c', PROGRAM],
      cwd=helpers.ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    self.assertRegex(done.stdout, r'^\d+ True\n$')


if __name__ == '__main__':
  absltest.main()
