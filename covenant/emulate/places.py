"""The rows of devices on which the miners of an emulation train.

The devices are a mesh with an outer axis, `peers`, whose rows are the meshes of
one miner each (covenant/models/sharding.py). A single CPU device is the row of
several threads, one per core.
"""

import itertools
from typing import NamedTuple

import jax

from covenant import config as config_lib
from covenant.models import sharding
from covenant.telemetry import machine


class Place(NamedTuple):
  """The devices of one row, and the process that they belong to."""

  rank: int
  mesh: jax.sharding.Mesh


def places(config: config_lib.Config) -> tuple[Place, ...]:
  """Returns the rows of `config.devices`, at most one per miner.

  The processes own them in turn.

  Raises:
    ConfigError: the devices are too few, or a process has no row.
  """
  rows: dict[int, list[Place]] = {r: [] for r in range(jax.process_count())}
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  meshes = sharding.rows(config.devices, devices)
  for mesh in meshes * _threads(config, devices):
    rank, *others = {device.process_index for device in mesh.devices.flat}
    if others:
      raise config_lib.ConfigError(
        f'devices: expected the {mesh.size} devices of an emulated miner to be '
        f'of one process, got some of the processes {sorted([rank, *others])}; '
        'lower devices.data, devices.fsdp or devices.tensor'
      )
    rows[rank].append(Place(rank, mesh))
  turns = itertools.zip_longest(*rows.values())
  found = [place for turn in turns for place in turn if place is not None]
  found = found[: config.miners]
  if idle := sorted(rows.keys() - {place.rank for place in found}):
    raise config_lib.ConfigError(
      f'devices.peers: {len(found)} miners that train at the same time leave '
      f'nothing for the processes {idle}; set it to 0, which is all devices, '
      f'and start at most as many processes as miners ({config.miners})'
    )
  return tuple(found)


def describe(config: config_lib.Config) -> str:
  """Describes for people where the miners train; '' if in turn on one device.

  Raises:
    ConfigError: see `places`.
  """
  found = places(config)
  devices = len({d for place in found for d in place.mesh.devices.flat})
  if len(found) == devices == 1:
    return ''
  kind = found[0].mesh.devices.flat[0].device_kind
  hosts = max(place.rank for place in found) + 1
  cores = f'{len(found)} cores of ' if devices < len(found) else ''
  return (
    f'{len(found)} of {config.miners} miners train at the same time, on '
    f'{cores}{devices} device{"s" * (devices > 1)} ({kind}) of {hosts} '
    f'process{"es" * (hosts > 1)}'
  )


def most(config: config_lib.Config) -> int:
  """Returns how many miners the first device, or its host's memory, holds.

  Raises:
    ConfigError: see `places`.
  """
  here = [place for place in places(config) if not place.rank]
  host = here[0].mesh.devices.flat[0].platform == 'cpu'
  rows = len(places(config))
  return -(-config.miners // rows) * (len(here) if host else 1)


def _threads(config: config_lib.Config, devices: list[jax.Device]) -> int:
  """Returns the number of rows per device.

  The cores of a CPU are the default. Programs of several devices cannot share
  them, and several processes must agree on the rows.
  """
  mesh = config.devices
  is_one = mesh.data == mesh.fsdp == mesh.tensor == mesh.stage == 1
  is_alone = jax.process_count() == 1
  if mesh.peers or not (is_one and is_alone) or devices[0].platform != 'cpu':
    return 1
  return max(machine.cores() // len(devices), 1)
