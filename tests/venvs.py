"""Virtual environments of their own, for tests marked `install`.

Their packages come from wherever pip is configured to find them, so these
tests need a package index; no other test does.
"""

import fcntl
import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from typing import Any
from unittest import mock

from packaging import requirements as requirements_lib
from packaging import version as version_lib

from tests import helpers

# The packages whose bounds decide which releases of JAX a user may have.
_BOUNDED = ('absl-py', 'jax', 'numpy', 'optax', 'flax', 'orbax-checkpoint')
_TOOLS = ('pytest', 'pytest-xdist', 'hypothesis', 'setuptools')


@functools.cache
def setup_arguments() -> dict[str, Any]:
  """Returns what setup.py passes to setuptools."""
  with mock.patch('setuptools.setup') as setup:
    runpy.run_path(str(helpers.ROOT / 'setup.py'))
  return setup.call_args.kwargs


def requirements(*extras: str) -> list[requirements_lib.Requirement]:
  """Returns the requirements of the package and of some of its extras."""
  arguments = setup_arguments()
  lines = list(arguments['install_requires'])
  for extra in extras:
    lines += arguments['extras_require'][extra]
  return list(map(requirements_lib.Requirement, lines))


def lower_bound(requirement: requirements_lib.Requirement) -> str:
  """Returns the oldest release that a requirement admits."""
  (bound,) = [s for s in requirement.specifier if s.operator in ('>=', '==')]
  return bound.version


def pythons() -> list[pathlib.Path]:
  """Returns the interpreters here that setup.py admits, the newest first.

  This one is among them. A name on the path may be a shim without a Python
  behind it: only trying tells.
  """
  found = {sys.version_info[:2]: pathlib.Path(sys.executable)}
  folders = [pathlib.Path(f) for f in os.environ.get('PATH', '').split(':')]
  folders += pathlib.Path.home().glob('.pyenv/versions/*/bin')
  tell = 'import sys, ensurepip; print(*sys.version_info[:2])'
  for minor in range(11, 20):
    for folder in folders:
      path = folder / f'python3.{minor}'
      if (3, minor) in found or not path.is_file():
        continue
      done = subprocess.run(
        [path, '-c', tell], capture_output=True, text=True, check=False
      )
      if done.returncode == 0 and done.stdout.split() == ['3', str(minor)]:
        found[3, minor] = path
  return [found[key] for key in sorted(found, reverse=True)]


def environment() -> dict[str, str]:
  """Returns this process's environment, without what leads to the checkout."""
  without = ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'PYTEST_ADDOPTS')
  kept = {k: v for k, v in os.environ.items() if k not in without}
  # pip keeps what it fetched for the next environment of this session.
  return kept | {'PIP_DISABLE_PIP_VERSION_CHECK': '1', 'PIP_NO_INPUT': '1'}


def create(
  folder: pathlib.Path,
  packages: list[str],
  python: str | pathlib.Path = sys.executable,
) -> pathlib.Path:
  """Creates a virtual environment and installs packages into it.

  Args:
    folder: where it is made.
    packages: arguments of `pip install`.
    python: the interpreter that it is made with.

  Returns:
    The interpreter of the new environment.
  """
  run([python, '-m', 'venv', '--clear', folder])
  new = folder / 'bin' / 'python'
  if packages:
    run([new, '-m', 'pip', 'install', '--quiet', *packages])
  return new


def run(
  command: list[Any], cwd: str | pathlib.Path | None = None, **env: str
) -> str:
  """Runs a command in `environment()` and returns what it printed.

  Raises:
    AssertionError: its exit status is not 0; has the end of its output.
  """
  done = subprocess.run(
    list(map(str, command)), cwd=cwd, env=environment() | env, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
  )  # fmt: skip
  if done.returncode:
    words = ' '.join(map(str, command))
    raise AssertionError(
      f'exit status {done.returncode}: {words}\n{done.stdout[-6000:]}'
    )
  return done.stdout


def jax_venv(which: str) -> pathlib.Path:
  """Returns the Python of an environment with another release of JAX.

  It has the requirements of covenant[run] and pytest, not covenant itself:
  tests run it in the root of the checkout. It is made once per session:

    python = venvs.jax_venv('oldest')
    venvs.run([python, '-m', 'pytest', ...], cwd=helpers.ROOT)

  Args:
    which: 'oldest', the lower bounds of setup.py with this Python, or
      'newest', what pip finds for the newest Python on this machine.
  """
  if which not in ('oldest', 'newest'):
    raise ValueError(f"expected 'oldest' or 'newest', got {which!r}")
  cache = os.environ.get('XDG_CACHE_HOME') or tempfile.gettempdir()
  folder = pathlib.Path(cache) / 'covenant-venvs' / which
  folder.parent.mkdir(parents=True, exist_ok=True)
  with (folder.parent / f'{which}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
    if not (folder / 'whole').exists():
      needed = requirements('run')
      packages = [*_TOOLS, *map(str, needed)]
      if which == 'oldest':
        oldest = {r.name: lower_bound(r) for r in needed if r.name in _BOUNDED}
        oldest['jaxlib'] = oldest['jax']
        packages += [f'{name}=={bound}' for name, bound in oldest.items()]
      create(folder, packages, _python(which))
      (folder / 'whole').touch()
  return folder / 'bin' / 'python'


def _python(which: str) -> pathlib.Path:
  return pathlib.Path(sys.executable) if which == 'oldest' else pythons()[0]


def is_newest(requirement: requirements_lib.Requirement) -> bool:
  """Returns whether pip would leave a package of this environment as it is."""
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder, 'report.json')
    run(
      [sys.executable, '-m', 'pip', 'install', '--quiet', '--dry-run']
      + ['--no-deps', '--upgrade', '--report', report, str(requirement)]
    )
    return not json.loads(report.read_text(encoding='utf-8'))['install']


def installed(python: pathlib.Path) -> dict[str, version_lib.Version]:
  """Returns the packages of an environment but pip and setuptools."""
  listed = run([python, '-m', 'pip', 'list', '--format=freeze'])
  pairs = (line.split('==') for line in listed.splitlines() if '==' in line)
  return {
    name: version_lib.Version(release)
    for name, release in pairs
    if name not in ('pip', 'setuptools')
  }
