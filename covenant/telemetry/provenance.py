"""The host, time and versions of each start: `starts.jsonl` of a folder."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Sequence

import jax

import covenant
from covenant import files
from covenant import typing as ct
from covenant.telemetry import machine

FILE = 'starts.jsonl'
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def record(folder: str | os.PathLike[str]) -> None:
  """Appends a line about this start of a process to its folder."""
  line = {'time': time.time(), **describe()}
  files.append_jsonl(pathlib.Path(folder, FILE), line)


def read(folder: str | os.PathLike[str]) -> Sequence[ct.Json]:
  """Returns the starts of a folder, oldest first."""
  path = pathlib.Path(folder, FILE)
  return files.read_records(path, 'time', 'host', 'versions').objects


@functools.cache
def describe() -> dict[str, ct.Json]:
  """Returns the host, devices, versions and commit of this process."""
  device = jax.devices()[0]
  return {
    'host': platform.node(),
    'system': platform.platform(),
    'cores': machine.cores(),
    'memory_bytes': machine.memory_bytes(),
    'devices': f'{jax.device_count()} x {device.device_kind}',
    'processes': jax.process_count(),
    'versions': {
      'covenant': covenant.__version__,
      'python': platform.python_version(),
      **{name: version for name in _LIBRARIES if (version := _version(name))},
    },
    'commit': commit(),
  }


def commit(root: pathlib.Path = _ROOT) -> str:
  """Returns the commit of a checkout, '-dirty' if changed; '' without one."""
  if not (root / '.git').exists():
    return ''
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
  try:
    done = subprocess.run(
      [*command, '--exclude=*'],
      cwd=root,
      capture_output=True,
      text=True,
      timeout=10,
      check=False,
    )
  except (OSError, subprocess.SubprocessError):  # there is no git
    return ''
  return done.stdout.strip()


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ''
