"""What a peer's devices hold in every phase of a round.

The state is exact: it is what the programs of a node take and give, sharded as
`covenant/models/sharding.py` says, and the compiled programs are held against
it. What they need beside it is an estimate, and called so: buffers are the
compiler's affair, and of the CPU's compiler not even these are telling.

All numbers are bytes of one device unless they say otherwise.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.optim import method as method_lib
from covenant.optim import sharded_leaf
from covenant.wire import payload

_FLOAT = 4  # bytes: all that stays between steps is float32


class Phase(NamedTuple):
  """What is where while a node does one thing."""

  name: str
  device: dict[str, float]  # on a device
  host: dict[str, float]  # in host memory, of the share of a device

  @property
  def total(self) -> float:
    return sum(self.device.values())


class Shards(NamedTuple):
  """How the parameters of a config lie on the mesh of one peer."""

  params: int  # elements that a device holds
  slice: int  # elements of a device's share that compressing works on at once
  payload_bytes: int  # of a whole payload
  devices: int


def shards(config: config_lib.Config) -> Shards:
  """How `config.devices` cuts the parameters.

  Raises:
    ConfigError: they do not divide, or no payload can carry them.
  """
  mesh = sharding.abstract_mesh(config.devices)
  compression = method_lib.make(config).compression
  sharding.check(config.model, config.optim.compression.block, mesh)
  like = _like(config.model)
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


@functools.cache
def _like(model: config_lib.Model) -> Any:
  return jax.eval_shape(lambda: llama.init(model, jax.random.key(0)))


def moments(optim: config_lib.Optim) -> int:
  """Float32 values that the inner optimizer keeps of a parameter."""
  return {'sparseloco': 2, 'diloco': 2, 'demo': 0, 'ddp': 0}[optim.method]


def errors(optim: config_lib.Optim) -> int:
  """Float32 values of error feedback a parameter."""
  return 1 if optim.method in ('sparseloco', 'demo') else 0


def outer_moments(optim: config_lib.Optim) -> int:
  """Float32 values that the outer optimizer keeps of a parameter."""
  if optim.method == 'ddp':
    return 2
  return 1 if optim.method != 'demo' and optim.outer.momentum else 0


def microbatch(config: config_lib.Config) -> tuple[int, int]:
  """Sequences that a device has in flight, and how often in a step."""
  inner, devices = config.optim.inner, config.devices
  # 0 copies: as many as there are; of more each has less in flight.
  own = inner.batch_size // (max(devices.data, 1) * devices.fsdp)
  size = min(inner.microbatch_size or own, own)
  return max(size, 1), max(own // max(size, 1), 1)


def activations(
  config: config_lib.Config, in_flight: int = 1
) -> dict[str, float]:
  """An estimate of what the gradient of a microbatch needs beside its result.

  saved: what the forward pass keeps for the backward pass, all layers.
  working: what one layer computes, and keeps while its gradient is computed;
    or, of one chunk of positions, the logits, their exponentials and gradient;
    or, when nothing is saved any more, the gradient of all looked up rows.
  weights: the shards in the compute dtype, which compilers cast once for all
    microbatches; two matrices gathered, and their gradients.

  XLA's TPU compiler, which says what it needs, gave the inner step of
  configs/72b.py on eight chips 165.9, 169.7, 180.9 and 198.7 GB a device, with
  1, 2, 4 and 8 sequences a microbatch; this, 166.6, 171.5, 181.2 and 200.8.

  Args:
    config: of the peer, or of one stage of its pipeline.
    in_flight: microbatches that are saved at once.
  """
  m, devices = config.model, config.devices
  size, times = microbatch(config)
  tokens = size * config.data.context
  wide = 2 if m.compute_dtype == 'bfloat16' else 4
  heads, ffn = m.heads / devices.tensor, m.ffn_width / devices.tensor
  head = m.width // m.heads
  attended = head * (2 * heads + 2 * m.kv_heads / devices.tensor)
  products = attended + 2 * ffn + 2 * m.width
  scores = heads * config.data.context * (_FLOAT + wide)
  if m.attention == 'cudnn':
    scores = heads * _FLOAT
  layer = wide * (products + ffn + 3 * m.width) + scores
  kept = {'none': layer, 'dots': wide * products, 'block': 0}[m.remat]
  matrix = m.width * max(m.ffn_width, m.width) / devices.tensor
  is_cut = devices.fsdp > 1
  cast = wide * llama.num_params(m) / (devices.fsdp * devices.tensor)
  chunk = (m.loss_chunk or config.data.context) * size
  # Who shares the vocabulary sees everybody's positions.
  seen = devices.fsdp if is_cut else 0
  loss = chunk * (
    3 * _FLOAT * m.vocab_size / devices.tensor + 2 * wide * m.width * seen
  )
  saved = in_flight * m.layers * tokens * (wide * m.width + kept)
  look_up = 2 * wide * tokens * m.width * seen
  return {
    'saved': saved,
    'working': max(tokens * layer, loss, look_up - saved),
    'weights': (cast if times > 1 or not is_cut else 0)
    + 2 * matrix * (wide + (_FLOAT if is_cut else 0)),
  }


def phases(
  config: config_lib.Config, cut: Shards, offload: bool, in_flight: int = 1
) -> Iterator[Phase]:
  """Yields every phase of a round of a miner.

  Args:
    config: the run's.
    cut: `shards(config)`.
    offload: what a phase does not need waits in host memory.
    in_flight: microbatches whose activations are saved at once.
  """
  optim = config.optim
  whole = float(_FLOAT * cut.params)
  state = {
    'parameters': whole,
    'AdamW moments': moments(optim) * whole,
    'error feedback': errors(optim) * whole,
    'outer momentum': outer_moments(optim) * whole,
  }
  state = {name: size for name, size in state.items() if size}
  _, times = microbatch(config)
  # Else the gradient of the last microbatch is there beside the sum of all.
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
      'one slice': 4 * _FLOAT * cut.slice,
    },
    'gather': {},
    'outer step': {'one slice': 4 * _FLOAT * cut.slice},
    'checkpoint': {},
  }
  needed = {
    'inner step': {'AdamW moments'},
    'compress': {'parameters', 'error feedback'},
    'gather': {'parameters'},
    'outer step': {'parameters', 'outer momentum'},
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
    if name == 'checkpoint':  # of what is on the device, while it is written
      waits['copy'] = float(sum(device.values()))
    yield Phase(name, device, waits | in_host.get(name, {}))


def checkpoint_bytes(config: config_lib.Config) -> float:
  """Of one checkpoint of a miner with all its private state, on disk."""
  optim = config.optim
  values = 1 + moments(optim) + errors(optim) + outer_moments(optim)
  return _FLOAT * llama.num_params(config.model) * values
