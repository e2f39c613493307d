"""The memory, disk and devices of this host, or of the container on it.

The limits of control groups are read from both their versions: that of any
group above this process holds, and what the kernel can take back from a file
cache is free.
"""

import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from covenant import extras

with extras.needed('run'):
  import psutil

_ROOT = pathlib.Path('/')
# Files that a kernel with a driver has, and the package of JAX for it.
_ACCELERATORS = (
  (
    'an NVIDIA GPU',
    ('proc/driver/nvidia/version', 'dev/nvidia0', 'usr/lib/wsl/lib/nvidia-smi'),
    'jax[cuda13]',
  ),
  ('a TPU', ('dev/accel0',), 'jax[tpu]'),
  ('an AMD GPU', ('dev/kfd',), 'jax[rocm7-local]'),
)
_MOUNT = 'sys/fs/cgroup'


class _Files(NamedTuple):
  """The files of a version of control groups."""

  limit: str
  used: str
  cached: str  # key in memory.stat of the cache that can be taken back


_V1 = _Files(
  'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'
)
_V2 = _Files('memory.max', 'memory.current', 'inactive_file')


class _Limit(NamedTuple):
  """The memory of one control group, in bytes."""

  limit: int
  used: int


def memory_bytes(root: pathlib.Path = _ROOT) -> int:
  """Returns the bytes of memory that processes of this container may use.

  Args:
    root: the folder that has proc/ and sys/.
  """
  total = psutil.virtual_memory().total
  return min([total, *(group.limit for group in _limits(root))])


def free_bytes(root: pathlib.Path = _ROOT) -> int:
  """Returns the bytes of memory that this process can still get.

  Args:
    root: the folder that has proc/ and sys/.
  """
  free = [group.limit - group.used for group in _limits(root)]
  return max(min([psutil.virtual_memory().available, *free]), 0)


def cores() -> int:
  """Returns the number of cores that this process may use."""
  own = getattr(os, 'sched_getaffinity', None)  # Linux has it
  return len(own(0)) if own else os.cpu_count() or 1


def used_bytes() -> int:
  """Returns the bytes of memory that this process holds."""
  return psutil.Process().memory_info().rss


def free_disk_bytes(folder: str | os.PathLike[str]) -> int:
  """Returns the bytes that can be written to a folder, or will be to one."""
  path = pathlib.Path(folder).absolute()
  while not path.exists():
    path = path.parent
  return shutil.disk_usage(path).free


def idle_accelerator(
  backend: str,
  root: pathlib.Path = _ROOT,
  environ: Mapping[str, str] = os.environ,
) -> str:
  """Returns how to use the accelerator that JAX does not; '' if it does.

  Args:
    backend: `jax.default_backend()`.
    root: the folder that has proc/ and dev/.
    environ: the environment, which may have JAX_PLATFORMS.
  """
  if backend != 'cpu':
    return ''
  for name, paths, package in _ACCELERATORS:
    if any((root / path).exists() for path in paths):
      forced = environ.get('JAX_PLATFORMS')
      remedy = f"pip install -U '{package}' (docs/install.md)"
      if forced:
        remedy = f'unset JAX_PLATFORMS={forced}'
      return f'JAX is on the CPU, and this machine has {name}: {remedy}'
  return ''


def _limits(root: pathlib.Path) -> Iterator[_Limit]:
  """Yields the limit of each control group that this process is in."""
  try:
    lines = (root / 'proc/self/cgroup').read_text().splitlines()
  except OSError:
    return  # another system
  for line in lines:
    number, controllers, path = line.split(':', 2)
    mount, names = root / _MOUNT, _V2
    if 'memory' in controllers.split(','):
      mount, names = mount / 'memory', _V1
    elif number != '0' or controllers:
      continue
    # A container may see the path of its host, where there is no such folder.
    parts = pathlib.PurePosixPath(path).parts[1:]
    for n in range(len(parts), -1, -1):
      if limit := _read(mount.joinpath(*parts[:n]), names):
        yield limit


def _read(folder: pathlib.Path, names: _Files) -> _Limit | None:
  """Returns the limit of a control group; None if it has none."""
  try:
    limit = (folder / names.limit).read_text().strip()
    used = int((folder / names.used).read_text())
    stats = (folder / 'memory.stat').read_text()
  except (OSError, ValueError):
    return None
  if limit == 'max' or int(limit) >= 1 << 60:  # v1 writes a large number
    return None
  pairs = dict(line.split() for line in stats.splitlines())
  return _Limit(int(limit), used - int(pairs.get(names.cached, 0)))
