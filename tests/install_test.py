"""The package as others install it, in environments of their own."""

import functools
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

import pytest
from absl.testing import absltest
from absl.testing import parameterized

import covenant
from tests import helpers
from tests import venvs

# Imports every module and prints those whose error is not one line that names
# an extra.
_IMPORT_ALL = """
import importlib, pkgutil, re, sys
import covenant
from covenant import extras
names = [m.name for m in pkgutil.walk_packages(covenant.__path__, 'covenant.')]
missing = 0
for name in names:
  if name.startswith('covenant.configs.'):
    continue
  try:
    importlib.import_module(name)
  except extras.MissingExtraError as e:
    missing += 1
    if not re.fullmatch(
      r"\\w+ is not installed; run: pip install 'covenant\\[(run|pool)\\]'",
      str(e),
    ):
      print(name, repr(e))
  except BaseException as e:
    print(name, repr(e))
print(len(names) > 100, missing > 20)
"""
_IMPORTED = """
import sys
import optax
before = {name.partition('.')[0] for name in sys.modules}
import covenant.optim.sparseloco
after = {name.partition('.')[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
print(*sorted(n for n in sys.modules if n.startswith('covenant.')))
"""
_EXPORTS = """
import importlib.metadata, importlib.resources
import covenant
from covenant import *
import covenant.optim.sparseloco as module
from covenant import sparseloco
from covenant.optim import sparseloco as again
assert again is module and module.sparseloco is sparseloco
assert callable(sparseloco) and covenant.sparseloco is sparseloco
assert importlib.metadata.version('covenant') == covenant.__version__
assert importlib.resources.files(covenant).joinpath('py.typed').is_file()
assert '/site-packages/' in covenant.__file__, covenant.__file__
"""


@functools.cache
def wheel() -> pathlib.Path:
  """Returns a wheel of the checkout, built from its source distribution."""
  folder = pathlib.Path(tempfile.mkdtemp())
  source = folder / 'source'
  listed = ['git', 'ls-files', '-z', '--cached', '--others']
  files = subprocess.run(
    [*listed, '--exclude-standard'],
    cwd=helpers.ROOT,
    check=True,
    stdout=subprocess.PIPE,
  ).stdout.split(b'\0')
  for name in filter(None, map(bytes.decode, files)):
    if (helpers.ROOT / name).is_file():
      (source / name).parent.mkdir(parents=True, exist_ok=True)
      (source / name).write_bytes((helpers.ROOT / name).read_bytes())
  build = 'import sys; from setuptools import build_meta as b; '
  sdist = build + 'b.build_sdist(sys.argv[1])'
  venvs.run([sys.executable, '-c', sdist, folder], cwd=source)
  (archive,) = folder.glob('*.tar.gz')
  with tarfile.open(archive) as file:
    file.extractall(folder / 'unpacked', filter='data')
  (unpacked,) = (folder / 'unpacked').iterdir()
  whole = build + 'b.build_wheel(sys.argv[1])'
  venvs.run([sys.executable, '-c', whole, folder], cwd=unpacked)
  (made,) = folder.glob('*.whl')
  return made


def example() -> str:
  """Returns the first whole program of docs/sparseloco.md with SparseLoCo."""
  page = (helpers.ROOT / 'docs' / 'sparseloco.md').read_text(encoding='utf-8')
  blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  return next(
    b for b in blocks if 'import' in b and 'sparseloco(' in b and 'print(' in b
  )


class RequirementsTest(absltest.TestCase):
  def test_the_optimizer_needs_jax_optax_and_numpy(self):
    names = {r.name for r in venvs.requirements()}
    self.assertEqual(names, {'absl-py', 'jax', 'numpy', 'optax'})

  def test_what_jax_users_have_has_no_upper_bound(self):
    # The newest releases are tested below.
    for requirement in venvs.requirements('run'):
      if requirement.name in ('jax', 'numpy', 'optax', 'flax'):
        operators = {s.operator for s in requirement.specifier}
        self.assertEqual(operators, {'>='}, requirement)

  def test_the_version_is_that_of_the_package(self):
    self.assertEqual(venvs.setup_arguments()['version'], covenant.__version__)

  def test_long_description_leads_nowhere_in_the_checkout(self):
    text = venvs.setup_arguments()['long_description']
    targets = re.findall(r'\]\(([^)]*)\)', text)
    self.assertNotEmpty(targets)
    self.assertEqual([t for t in targets if not t.startswith('https:')], [])


@pytest.mark.install
class OptimizerTest(absltest.TestCase):
  """`pip install covenant`, outside of the checkout."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(tempfile.mkdtemp())
    cls.python = venvs.create(cls.folder / 'venv', [str(wheel())])

  def run_python(self, *arguments):
    return venvs.run([self.python, *arguments], cwd=self.folder)

  def test_few_packages(self):
    packages = venvs.installed(self.python)
    self.assertLess(len(packages), 15, packages)
    print(f'{len(packages)} packages: {", ".join(sorted(packages))}')
    self.run_python('-m', 'pip', 'check')

  def test_import_brings_nothing_beside_optax(self):
    packages, modules = self.run_python('-c', _IMPORTED).splitlines()
    self.assertEqual(packages, 'covenant')
    for module in modules.split():
      self.assertRegex(
        module, r'^covenant\.(optim|typing|errors|device_sums)\b'
      )

  def test_exports(self):
    self.assertEqual(self.run_python('-W', 'error', '-c', _EXPORTS), '')

  def test_example(self):
    code = example()
    self.assertRegex(self.run_python('-c', code), r'^loss 0\.0\d+\n$')

  def test_a_missing_extra_is_one_line(self):
    self.assertEqual(self.run_python('-c', _IMPORT_ALL), 'True True\n')
    for command in (
      [self.python, '-m', 'covenant', '--config=tiny'],
      [self.python.parent / 'covenant', '--role=report', '--workdir=x'],
      [self.python, helpers.ROOT / 'run.py', '--config=configs/tiny.py'],
    ):
      done = subprocess.run(
        command, cwd=self.folder, env=venvs.environment(), text=True,
        capture_output=True, check=False,
      )  # fmt: skip
      self.assertEqual(done.returncode, 1)
      self.assertEqual(done.stdout, '')
      self.assertRegex(
        done.stderr,
        r"^error: \w+ is not installed; run: pip install 'covenant\[run\]'\n$",
      )


@pytest.mark.install
class RunTest(parameterized.TestCase):
  """`pip install 'covenant[run]'`, outside of the checkout."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(tempfile.mkdtemp())
    python = venvs.create(cls.folder / 'venv', [f'{wheel()}[run]'])
    cls.packages = venvs.installed(python)
    cls.program = python.parent / 'covenant'

  def run_program(self, *flags):
    return venvs.run([self.program, *flags], cwd=self.folder)

  def test_main_job_and_report(self):
    output = self.run_program('--config=shakespeare:smoke', '--workdir=run')
    self.assertRegex(output, r'\nparameters: \w{32}\n')
    page = self.folder / 'run' / 'report.html'
    self.assertGreater(page.stat().st_size, 10_000)
    page.unlink()
    self.run_program('--role=report', '--workdir=run')
    self.assertGreater(page.stat().st_size, 10_000)

  def test_localnet_without_bittensor(self):
    self.assertNotIn('bittensor', self.packages)
    output = self.run_program(
      '--config=localnet:smoke', '--role=localnet', '--workdir=net'
    )
    self.assertIn('equal: all', output)

  @parameterized.parameters(
    ('network', '--role=miner', '--config.network.chain=bittensor'),
    ('plan-tpu', '--role=plan', '--config.plan.tpu_topology=v5e:2x2'),
  )
  def test_a_missing_extra_is_one_line(self, extra, *flags):
    done = subprocess.run(
      [self.program, '--config=tiny', f'--workdir={extra}', *flags],
      cwd=self.folder, env=venvs.environment(), text=True,
      capture_output=True, check=False,
    )  # fmt: skip
    self.assertEqual(done.returncode, 1)
    line = done.stderr.splitlines()[-1]
    self.assertStartsWith(line, 'error: ')
    self.assertEqual(done.stderr.count('error'), 1, done.stderr)
    self.assertEndsWith(line, f"pip install 'covenant[{extra}]'")


@pytest.mark.install
class ReleasesTest(parameterized.TestCase):
  """The optimizer's tests with the bounds of setup.py, warnings as errors."""

  @parameterized.parameters('oldest', 'newest')
  def test_optimizer(self, which):
    python = venvs.jax_venv(which)
    release = venvs.installed(python)['jax']
    if which == 'oldest':
      (jax,) = [r for r in venvs.requirements() if r.name == 'jax']
      self.assertEqual(str(release), venvs.lower_bound(jax))
    command = [python, '-m', 'pytest', '-q', '-W', 'error', 'tests/optim']
    output = venvs.run(command, cwd=helpers.ROOT)
    self.assertRegex(output, r'\n\d{3,} passed')
    print(f'jax {release}: {output.splitlines()[-1]}')


if __name__ == '__main__':
  absltest.main()
