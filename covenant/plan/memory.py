"""Device and host memory in every phase of a round, and edits that make it fit.

The state is exact: the arguments and results of a node's programs, sharded by
`covenant/models/sharding.py`; tests compare it with the compiled programs.
Temporary buffers depend on the compiler and are estimated.

All numbers are bytes per device unless stated otherwise.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import sharded_leaf
from covenant.plan import hardware as hardware_lib
from covenant.wire import payload

FLOAT = 4  # bytes; state between steps is float32
# Edits that save memory, cheapest first.
_KNOBS = (
  'devices.offload=true',
  'optim.inner.microbatch_size=1',
  'model.loss_chunk=512',
  'model.remat=block',
  'model.attention=cudnn',
)
_MOST_DEVICES = 4096


class MemoryPhase(NamedTuple):
  """The memory of one phase of a round."""

  name: str
  device: dict[str, float]  # bytes on a device
  host: dict[str, float]  # bytes of host memory per device

  @property
  def total(self) -> float:
    return sum(self.device.values())


class Shards(NamedTuple):
  """The sizes of a model sharded over the mesh of one peer."""

  params: int  # elements per device
  slice: int  # elements per device that compression processes at once
  payload_bytes: int  # size of a whole payload
  devices: int


def shards(config: config_lib.Config) -> Shards:
  """Returns the shard sizes of the parameters under `config.devices`.

  Raises:
    ConfigError: the mesh does not divide the parameters, or no payload can
      carry them.
  """
  mesh = sharding.abstract_mesh(config.devices)
  compression = algorithm_lib.make(config).compression
  sharding.check(config.model, config.optim.compression.block, mesh)
  like = llama.abstract(config.model)
  try:
    spec = payload.make_spec(like, compression, config.optim.compression.codec)
    leaves = sharded_leaf.leaves(
      like, compression, mesh, sharding.specs(like, mesh)
    )
  except ValueError as e:
    raise config_lib.ConfigError(f'optim.compression: {e}') from e
  return Shards(
    sum(math.prod(leaf.local_shape) for leaf in leaves),
    max(math.prod(leaf.slice_shape) for leaf in leaves),
    spec.payload_bytes,
    mesh.size,
  )


def moments(optim: config_lib.Optim) -> int:
  """Returns the inner optimizer's float32 values per parameter."""
  return {'sparseloco': 2, 'diloco': 2, 'demo': 0, 'ddp': 0}[optim.method]


def errors(optim: config_lib.Optim) -> int:
  """Returns the float32 values of error feedback per parameter."""
  return 1 if optim.method in ('sparseloco', 'demo') else 0


def outer_moments(optim: config_lib.Optim) -> int:
  """Returns the outer optimizer's float32 values per parameter."""
  if optim.method == 'ddp':
    return 2
  return 1 if optim.method != 'demo' and optim.outer.momentum else 0


def microbatch(config: config_lib.Config) -> tuple[int, int]:
  """Returns the microbatch size per device and the microbatches per step."""
  inner, devices = config.optim.inner, config.devices
  # data = 0 means as many replicas as fit; more replicas only need less.
  own = inner.batch_size // (max(devices.data, 1) * devices.fsdp)
  size = min(inner.microbatch_size or own, own)
  return max(size, 1), max(own // max(size, 1), 1)


def activations(
  config: config_lib.Config, in_flight: int = 1
) -> dict[str, float]:
  """Estimates the temporary memory of the gradient of one microbatch.

  saved: activations of all layers that the backward pass needs.
  working: the largest of the activations of one layer in its backward pass,
    the logits of one chunk with their exponentials and gradient, and the
    gradient of all embedding rows that were looked up.
  weights: the shards in the compute dtype, cast once for all microbatches,
    two gathered matrices and their gradients.

  docs/scale.md compares the estimate with XLA's TPU compiler.

  Args:
    config: the peer's, or that of one stage of its pipeline.
    in_flight: microbatches whose activations are saved at once.
  """
  m, devices = config.model, config.devices
  size, times = microbatch(config)
  tokens = size * config.data.context
  wide = 2 if m.compute_dtype == 'bfloat16' else 4
  heads, ffn = m.heads / devices.tensor, m.ffn_width / devices.tensor
  head = m.width // m.heads
  attended = head * (2 * heads + 2 * m.kv_heads / devices.tensor)
  products = attended + 2 * ffn + 2 * m.width
  scores = heads * config.data.context * (FLOAT + wide)
  if m.attention == 'cudnn':
    scores = heads * FLOAT
  layer = wide * (products + ffn + 3 * m.width) + scores
  kept = {'none': layer, 'dots': wide * products, 'block': 0}[m.remat]
  matrix = m.width * max(m.ffn_width, m.width) / devices.tensor
  is_cut = devices.fsdp > 1
  cast = wide * llama.num_params(m) / (devices.fsdp * devices.tensor)
  chunk = (m.loss_chunk or config.data.context) * size
  # A shard of the vocabulary processes the positions of all shards.
  seen = devices.fsdp if is_cut else 0
  loss = chunk * (
    3 * FLOAT * m.vocab_size / devices.tensor + 2 * wide * m.width * seen
  )
  saved = in_flight * m.layers * tokens * (wide * m.width + kept)
  look_up = 2 * wide * tokens * m.width * seen
  return {
    'saved': saved,
    'working': max(tokens * layer, loss, look_up - saved),
    'weights': (cast if times > 1 or not is_cut else 0)
    + 2 * matrix * (wide + (FLOAT if is_cut else 0)),
  }


def phases(
  config: config_lib.Config, cut: Shards, offload: bool, in_flight: int = 1
) -> Iterator[MemoryPhase]:
  """Yields the memory of every phase of a miner's round.

  Args:
    config: the config of the run.
    cut: `shards(config)`.
    offload: whether state that a phase does not need waits in host memory.
    in_flight: microbatches whose activations are saved at once.
  """
  optim = config.optim
  whole = float(FLOAT * cut.params)
  state = {
    'parameters': whole,
    'AdamW moments': moments(optim) * whole,
    'error feedback': errors(optim) * whole,
    'outer momentum': outer_moments(optim) * whole,
  }
  state = {name: size for name, size in state.items() if size}
  _, times = microbatch(config)
  # Otherwise the last microbatch's gradient exists beside the sum of all.
  in_place = config.model.scan_layers and config.model.remat == 'block'
  at_work: dict[str, dict[str, float]] = {
    'inner step': {
      'parameters of this round': whole,
      'gradient': whole * (1 if in_place or times == 1 else 2),
      'activations': sum(activations(config, in_flight).values()),
    },
    'compress': {
      'parameters of this round': whole,
      'message': cut.payload_bytes / cut.devices,
      'one slice': 4 * FLOAT * cut.slice,
    },
    'gather': {},
    'outer step': {'one slice': 4 * FLOAT * cut.slice},
    'checkpoint': {},
  }
  if optim.overlap:
    # The devices keep the next round while they take the outer step, and then
    # add its early steps to the result.
    kept = {'parameters of this round': whole}
    at_work['outer step'] |= kept
    at_work['begin round'] = kept | {'origin of the early steps': whole}
  needed = {
    'inner step': {'AdamW moments'},
    'compress': {'parameters', 'error feedback'},
    'gather': {'parameters'},
    'outer step': {'parameters', 'outer momentum'}
    | ({'AdamW moments'} if optim.overlap else set()),
    'begin round': {'parameters', 'AdamW moments'},
    'checkpoint': {'parameters'},
  }
  payloads = config.plan.peers * cut.payload_bytes / cut.devices
  in_host = {
    'gather': {'payloads': payloads},
    'outer step': {'payloads': payloads},
  }
  for name, work in at_work.items():
    stays = set(state) if not offload else needed[name]
    device = {k: v for k, v in state.items() if k in stays} | work
    waits = {k: v for k, v in state.items() if k not in stays}
    if name == 'checkpoint':  # a host copy of the device's state
      waits['copy'] = float(sum(device.values()))
    yield MemoryPhase(name, device, waits | in_host.get(name, {}))


def largest(phases_: Iterable[MemoryPhase]) -> tuple[float, float]:
  """Returns the most device memory, and the most host memory, of any phase."""
  found = [(phase.total, sum(phase.host.values())) for phase in phases_]
  return max(device for device, _ in found), max(host for _, host in found)


def checkpoint_bytes(config: config_lib.Config) -> float:
  """Returns the bytes on disk of a miner's checkpoint with private state."""
  optim = config.optim
  values = 1 + moments(optim) + errors(optim) + outer_moments(optim)
  return FLOAT * llama.num_params(config.model) * values


def limit(config: config_lib.Config) -> float:
  """Returns the bytes per device that programs may use."""
  device = hardware_lib.parse(config.plan.hardware).device
  return config.plan.memory_fraction * device.memory


def largest_phase(config: config_lib.Config) -> MemoryPhase:
  """Returns the phase that needs the most device memory.

  Raises:
    ConfigError: the mesh cannot shard the parameters.
  """
  found = phases(config, shards(config), config.devices.offload)
  return max(found, key=lambda phase: phase.total)


def fits(config: config_lib.Config) -> bool:
  return largest_phase(config).total <= limit(config)


def knobs(config: config_lib.Config) -> list[str]:
  """Returns config edits that make the model fit; empty if none do.

  Tries one of `_KNOBS`, then all useful ones together, then more devices.
  """
  known = [(knob, edited(config, [knob])) for knob in _KNOBS]
  useful = [
    knob
    for knob, other in known
    if other is not None
    and largest_phase(other).total < largest_phase(config).total
  ]
  for knob, other in known:
    if other is not None and fits(other):
      return [knob]
  together = edited(config, useful)
  if together is None:
    return []
  if fits(together):
    return useful
  for more, larger in _larger(config):
    if fits(larger):
      return more
    both = edited(larger, useful)
    if both is not None and fits(both):
      return [*useful, *more]
  return []


def edited(
  config: config_lib.Config, edits: list[str]
) -> config_lib.Config | None:
  """Applies `--config.` edits; returns None if the result is invalid."""
  try:
    other = config_lib.edit(config, edits)
    shards(other)
  except config_lib.ConfigError:
    return None
  return other


def _larger(
  config: config_lib.Config,
) -> Iterator[tuple[list[str], config_lib.Config]]:
  """Yields edits that double the number of shards, while they divide."""
  hardware = hardware_lib.parse(config.plan.hardware)
  count, fsdp = hardware.count, config.devices.fsdp
  while count < _MOST_DEVICES:
    count, fsdp = 2 * count, 2 * fsdp
    edits = [f'devices.fsdp={fsdp}', f'plan.hardware={count}x{hardware.name}']
    other = edited(config, edits)
    if other is None or config.optim.inner.batch_size % fsdp:
      return
    yield edits, other
