"""The memory, disk and time of each role in each of its phases.

A miner's phases are in memory.py. State is exact; temporary buffers and seconds
are estimated.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from covenant import config as config_lib
from covenant.gauntlet import incentives
from covenant.models import llama
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory
from covenant.plan import phase_times
from covenant.plan import rates
from covenant.plan import timing
from covenant.train import pieces as pieces_lib

ROLES = ('validator', 'evaluator', 'joiner')
_FLOAT = 4
BASE = 8e9  # bytes of a process that has no model yet; assumed
_PIECES = 64  # of a checkpoint in memory while they are stored or fetched


class RolePhase(NamedTuple):
  """The needs of a role in one of its phases."""

  role: str
  name: str
  device: dict[str, float]  # bytes on a device
  host: dict[str, float]  # bytes of memory of one host
  disk: dict[str, float]  # bytes
  seconds: float

  @property
  def device_bytes(self) -> float:
    return sum(self.device.values())

  @property
  def host_bytes(self) -> float:
    return sum(self.host.values())

  @property
  def disk_bytes(self) -> float:
    return sum(self.disk.values())


class _Sizes(NamedTuple):
  """The sizes that all phases share, in bytes."""

  hosts: int
  devices: int
  params: float  # of a device
  momentum: float  # of a device
  slices: float  # of a device, while it works slice by slice
  payload: float
  payloads: float  # of a round and the one before, or for a joiner after it
  message: float  # one that is unpacked; all others stay packed
  state: float  # the whole shared state
  largest: float  # the largest tensor


def phases(config: config_lib.Config) -> Iterator[RolePhase]:
  """Yields the phases of a validator, an evaluator and a joiner.

  Raises:
    ConfigError: the mesh cannot shard the parameters.
  """
  config = hardware_lib.resolve(config)
  cut = memory.shards(config)
  found = phase_times.times(config, cut.payload_bytes)
  sizes = _sizes(config, cut)
  yield from _validator(config, sizes, found)
  yield from _evaluator(config, sizes)
  yield from _joiner(config, sizes, found)


def of_role(config: config_lib.Config, role: str) -> list[RolePhase]:
  """Returns the phases of one role, such as 'validator'."""
  return [phase for phase in phases(config) if phase.role == role]


def forward_seconds(config: config_lib.Config, sequences: int) -> float:
  """Returns the seconds of the losses of some sequences on the devices."""
  hardware = hardware_lib.parse(config.plan.hardware)
  batch = config.optim.inner.batch_size
  flops = timing.flops(config).total / 3 * sequences / batch
  peak = hardware.count * hardware.device.peak
  return flops / (peak * config.plan.peak_fraction)


def _sizes(config: config_lib.Config, cut: memory.Shards) -> _Sizes:
  params = _FLOAT * float(cut.params)
  momentum = params * memory.outer_moments(config.optim)
  peers = min(config.plan.peers, most_fetched(config))
  values = timing.density(config) * llama.num_params(config.model)
  leaves = jax.tree.leaves(llama.abstract(config.model))
  largest = _FLOAT * max(math.prod(leaf.shape) for leaf in leaves)
  return _Sizes(
    hardware_lib.parse(config.plan.hardware).hosts,
    cut.devices,
    params,
    momentum,
    4.0 * _FLOAT * cut.slice,
    float(cut.payload_bytes),
    2.0 * peers * cut.payload_bytes,
    3.0 * values,  # two bytes of an index, one of a code
    (params + momentum) * cut.devices,
    float(largest),
  )


def most_fetched(config: config_lib.Config) -> int:
  """Returns the most payloads that a validator fetches in a round."""
  gauntlet = config.gauntlet
  return gauntlet.contributors + incentives.RESERVES + gauntlet.evaluate


def _at_rest(
  config: config_lib.Config, sizes: _Sizes
) -> tuple[dict[str, float], dict[str, float]]:
  """Returns the shared state between rounds: on a device, and on a host."""
  state = {'parameters': sizes.params, 'outer momentum': sizes.momentum}
  state = {name: size for name, size in state.items() if size}
  process = {'process': BASE}
  if not config.devices.offload:
    return state, process
  each = sizes.devices / sizes.hosts
  return {}, process | {name: size * each for name, size in state.items()}


def _validator(
  config: config_lib.Config, sizes: _Sizes, found: phase_times.PhaseTimes
) -> Iterator[RolePhase]:
  device, host = _at_rest(config, sizes)
  each = sizes.devices / sizes.hosts
  before = {'parameters before': sizes.params}
  kept = {name: size * each for name, size in before.items()}
  waits = kept if config.devices.offload else {}
  stays = {} if config.devices.offload else before
  round_ = {'payloads': sizes.payloads, 'a message': sizes.message}
  slices = {'slices': sizes.slices}
  disk = {
    'checkpoints': sizes.state * (config.checkpoint.keep + 1),
    'data cache': config.data.cache_gb * 1e9,
  }
  # A copy of the state is published while rounds change the state.
  copy = {'copy of the state': sizes.params + sizes.momentum}
  copied = {name: size * each for name, size in copy.items()}
  copy, copied = ({}, copied) if config.devices.offload else (copy, {})
  device, host = device | copy, host | copied
  one_norm = {'values of a tensor': timing.density(config) * sizes.largest}
  peers = config.plan.peers
  evaluated = min(config.gauntlet.evaluate, peers)
  sequences = config.gauntlet.sequences * (1 + 3 * evaluated)
  yield RolePhase(
    'validator', 'collect', device | one_norm, host | round_, disk,
    found.collect,
  )  # fmt: skip
  values = timing.density(config) * sizes.params / _FLOAT  # of a message
  loaded = {'a leaf': sizes.largest / sizes.devices}
  yield RolePhase(
    'validator',
    'score',
    device
    | {'parameters between': sizes.params, 'touched values': _FLOAT * values}
    | slices
    | (loaded if config.devices.offload else {})
    | forward_memory(config),
    host | waits | round_,
    disk,
    # A message is unpacked, read, put in and taken back.
    forward_seconds(config, sequences)
    + rates.decode_seconds(config, evaluated * sizes.payload)
    + evaluated * 6 * values / _device(config).host_link,
  )
  state = {'parameters': sizes.params, 'outer momentum': sizes.momentum}
  yield RolePhase(
    'validator',
    'apply',
    {k: v for k, v in state.items() if v} | copy | stays | slices,
    host | waits | round_,
    disk,
    found.outer + found.fingerprint,
  )
  pieces = {'pieces': float(_PIECES * pieces_lib.PIECE_BYTES)}
  yield RolePhase(
    'validator', 'publish', device, host | pieces | round_, disk,
    sizes.state / timing.links_of(config.plan).upload,
  )  # fmt: skip


def _evaluator(config: config_lib.Config, sizes: _Sizes) -> Iterator[RolePhase]:
  device, host = _at_rest(config, sizes)
  loaded = {'parameters': sizes.params}
  exports = sizes.params * sizes.devices * (config.checkpoint.keep + 1)
  disk = {'exports, with lm-eval': exports}
  yield RolePhase(
    'evaluator',
    'evaluate',
    device | loaded | forward_memory(config),
    host,
    disk,
    forward_seconds(config, config.eval.sequences),
  )
  yield RolePhase(
    'evaluator',
    'export',
    dict(device),
    host | {'a tensor': sizes.largest},
    disk,
    sizes.params * sizes.devices / rates.DISK,
  )


def _joiner(
  config: config_lib.Config, sizes: _Sizes, found: phase_times.PhaseTimes
) -> Iterator[RolePhase]:
  device, host = _at_rest(config, sizes)
  pieces = float(_PIECES * pieces_lib.PIECE_BYTES)
  yield RolePhase(
    'joiner',
    'load',
    {'parameters': sizes.params, 'outer momentum': sizes.momentum},
    host | {'pieces': pieces},
    {'pieces, in the workdir': sizes.state},
    sizes.state / timing.links_of(config.plan).download + found.fingerprint,
  )
  state = {'parameters': sizes.params, 'outer momentum': sizes.momentum}
  copy = dict(state) if not config.devices.offload else {}
  yield RolePhase(
    'joiner',
    'replay a round',
    device
    | state
    | {f'{name} before': size for name, size in copy.items()}
    | {'slices': sizes.slices},
    host | {'payloads': sizes.payloads, 'a message': sizes.message},
    {},
    found.gather + found.outer + found.fingerprint,
  )


def forward_memory(config: config_lib.Config) -> dict[str, float]:
  """Estimates the temporary memory of the losses of a microbatch."""
  found = memory.activations(config)
  return {'activations': found['working'] + found['weights']}


def _device(config: config_lib.Config) -> hardware_lib.Device:
  return hardware_lib.parse(config.plan.hardware).device
