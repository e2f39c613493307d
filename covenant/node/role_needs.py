"""The memory, disks and buckets that a role needs, beside what is here.

The needs are those of the plan (covenant/plan/roles.py), on the mesh of the
role: `devices` of the config. A device that shares the memory of its host, such
as a CPU, counts there.
"""

import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax

from covenant import config as config_lib
from covenant.models import llama
from covenant.node import publishing
from covenant.plan import hardware
from covenant.plan import memory
from covenant.plan import phase_times
from covenant.plan import roles
from covenant.telemetry import machine

_TEMPORARY = 1e9  # bytes of compilers and libraries; assumed
_SCHEMES = ('file://', '/')


class Need(NamedTuple):
  """Bytes that a role needs of something."""

  what: str
  needed: float
  there: float | None  # None: nobody can tell

  @property
  def lacks(self) -> bool:
    return self.there is not None and self.needed > self.there

  @property
  def text(self) -> str:
    there = 'an unknown number' if self.there is None else _gb(self.there)
    return f'{_gb(self.needed)} GB of {self.what}, of {there}'


def memory_of(config: config_lib.Config, role: str) -> list[Need]:
  """Returns the needs of a device and of this host, without activations.

  Args:
    config: the config of the run.
    role: 'validator' or 'evaluator'; any other is a miner.
  """
  device, host = _bytes(config, role)
  return needs_of_memory(device, host, _local_devices(config))


def needs_of_memory(device: float, host: float, devices: int) -> list[Need]:
  """Returns the needs of each device and of the host of several."""
  there = device_memory()
  if there is None:  # devices and host share one memory
    return [Need('memory', devices * device + host, machine.memory_bytes())]
  return [
    Need('each device', device, there),
    Need('host memory', host, machine.memory_bytes()),
  ]


def device_memory() -> int | None:
  """Returns the bytes of a device; None if it is in the host's memory."""
  stats = jax.devices()[0].memory_stats()
  return stats['bytes_limit'] if stats and 'bytes_limit' in stats else None


def disks_of(
  config: config_lib.Config, workdir: str | os.PathLike[str], role: str
) -> list[Need]:
  """Returns the needs of the workdir and of the folder of temporary files."""
  folder = pathlib.Path(workdir).absolute()
  copies = config.checkpoint.keep + 1
  if role in roles.ROLES:
    phases = roles.of_role(config, role)
    needed = max(
      sum(size for name, size in phase.disk.items() if name != 'data cache')
      for phase in phases
    )
  else:
    per_parameter = 0.0 if _is_head(config, role) else 16.0
    needed = per_parameter * llama.num_params(config.model) * copies
  kept = 'exports' if role == 'evaluator' else 'checkpoints'
  # A node that catches up has the pieces of a checkpoint beside them.
  joins = roles.of_role(config, 'joiner')
  needed += max(phase.disk_bytes for phase in joins)
  temporary = tempfile.gettempdir()
  return [
    Need(
      f'disk for {copies} {kept}',
      needed,
      machine.free_disk_bytes(folder),
    ),
    Need(
      f'disk for temporary files in {temporary}',
      _TEMPORARY,
      machine.free_disk_bytes(temporary),
    ),
  ]


def memory_line(config: config_lib.Config, role: str) -> tuple[bool, str]:
  """Returns whether there is enough memory, and a line for people."""
  needs = memory_of(config, role)
  if lacking := [need.text for need in needs if need.lacks]:
    params = llama.num_params(config.model)
    return False, (
      f'{params:,} parameters need {"; ".join(lacking)} GB here. Raise '
      'devices.fsdp, set devices.offload, or use a larger machine'
    )
  parts = [f'{_gb(need.needed)} GB of {need.what}' for need in needs]
  return True, ', '.join(parts) + ' needed'


def disk_line(
  config: config_lib.Config, workdir: str | os.PathLike[str], role: str
) -> tuple[bool, str]:
  """Returns whether the disks have room, and a line for people."""
  needs = disks_of(config, workdir, role)
  folder = pathlib.Path(workdir).absolute()
  text = f'{_gb(needs[0].there or 0)} GB free in {folder}'
  for need in needs:
    if need.lacks:
      what = need.what.removeprefix('disk for ')
      text += f'; {what} take {_gb(need.needed)} GB'
  return not any(need.lacks for need in needs), text


def bucket_of(config: config_lib.Config, location: str, role: str) -> Need:
  """Returns the need of the own bucket.

  Args:
    config: the config of the run.
    location: of the bucket, as it names itself.
    role: of the node.
  """
  cut = memory.shards(config)
  keep, publish = config.checkpoint.keep, config.checkpoint.publish
  needed = float((max(keep, 2) + 1) * publish * cut.payload_bytes)
  if role == 'validator':
    peers = config.plan.peers
    # It cleans up when a checkpoint is due, not in the rounds between. The run
    # is taken to have as many validators as the config of an emulation.
    rounds = publishing.keep_rounds(config, config.validators) + publish
    momentum = memory.outer_moments(config.optim)
    state = 4.0 * llama.num_params(config.model) * (1 + momentum)
    needed = rounds * peers * cut.payload_bytes + (max(keep, 2) + 1) * state
  return Need('the bucket', needed, quota(location))


def quota(location: str) -> int | None:
  """Returns the bytes that a bucket can still take; None if nobody can tell.

  A folder has the room of its disk. Object stores do not tell a quota.
  """
  for scheme in _SCHEMES:
    if location.startswith(scheme):
      path = location.removeprefix('file://').partition('?')[0]
      return machine.free_disk_bytes(path)
  return None


def phases_of(config: config_lib.Config) -> Iterator[str]:
  """Yields the phases that cannot be kept, with the numbers that would do.

  Only a chain whose blocks are final late, by `plan.finality_blocks`, needs
  them; one of this machine does not.
  """
  if config.network.chain == 'bittensor':
    config = hardware.resolve(config)
    found = phase_times.times(config, memory.shards(config).payload_bytes)
    for problem in phase_times.problems(config, found):
      if not problem.startswith('phases.round_blocks'):
        yield problem


def _is_head(config: config_lib.Config, role: str) -> bool:
  """Returns whether a node leaves the parameters to its stages."""
  return role == 'pool' and any(island.rank for island in config.islands)


def _bytes(config: config_lib.Config, role: str) -> tuple[float, float]:
  """Returns the bytes of a device and of its host."""
  if _is_head(config, role):  # it has the payloads of a round
    return 0.0, float(config.plan.peers * memory.shards(config).payload_bytes)
  if role in roles.ROLES:
    phases = roles.of_role(config, role)
    if role == 'validator':  # which catches up as well
      phases += roles.of_role(config, 'joiner')
    device = max(
      p.device_bytes - p.device.get('activations', 0) for p in phases
    )
    host = max(p.host_bytes - p.host.get('process', 0) for p in phases)
    return device, host
  found = list(
    memory.phases(config, memory.shards(config), config.devices.offload)
  )
  device = max(p.total - p.device.get('activations', 0) for p in found)
  # A checkpoint copies the devices' state only as far as there is room.
  host = max(
    sum(size for name, size in p.host.items() if name != 'copy') for p in found
  )
  return device, host * _local_devices(config)


def _local_devices(config: config_lib.Config) -> int:
  """Returns the number of this process's devices that the role uses."""
  devices = config.devices
  each = devices.fsdp * devices.tensor * devices.stage
  wanted = (devices.data or len(jax.devices()) // each or 1) * each
  return max(min(wanted, jax.local_device_count()), 1)


def _gb(size: float) -> str:
  return f'{size / 1e9:,.1f}'
