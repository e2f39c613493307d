"""Pipelines over hosts that hold the model only together.

Every device holds layers and runs one forward and one backward pass in turn
(1F1B). One device also holds the embeddings: it looks tokens up and computes
the loss, which closes the pipeline to a ring. Inside a host activations pass
uncompressed; over the internet as `rank` four-bit numbers per position and
their scale (covenant/train/pipeline/subspace.py). Data sent once
per round is not counted.

In steady state a sequence leaves the pipeline every `slot` seconds: the time of
the slowest device or of the slowest link. The first sequence of a step takes a
slot per device, a transfer per host and the latency of all links. If memory
allows fewer sequences in flight than fill that time, the slot grows.

A host uploads and fetches its own layers' sections of payloads, and fetches
those of the embeddings, which all hosts track.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import island_costs
from covenant.plan import memory
from covenant.train import island as island_lib
from covenant.train.pipeline import subspace

_COMPRESSIONS = (0.0, 0.875, 0.95, 0.99)  # share saved at boundaries
_BITS = 4  # per compressed number


class _Model(NamedTuple):
  """The sizes of one layer, and of the embeddings with the final norm."""

  layer: memory.Shards
  tables: memory.Shards
  layer_flops: float  # per sequence
  table_flops: float  # per sequence


class _Cut(NamedTuple):
  """The layers on the devices of each group."""

  slot: float  # seconds of the slowest device
  head: int  # index of the group whose device holds the embeddings
  layers: tuple[int, ...]  # layers per group


@functools.cache
def _model(config: config_lib.Config) -> _Model:
  def whole(layers: int) -> memory.Shards:
    model = dataclasses.replace(config.model, layers=layers)
    return memory.shards(
      dataclasses.replace(config, model=model, devices=config_lib.Devices())
    )

  one, two = whole(1), whole(2)
  params = two.params - one.params
  size = two.payload_bytes - one.payload_bytes
  layer = one._replace(params=params, payload_bytes=size)
  tables = one._replace(
    params=one.params - params, payload_bytes=one.payload_bytes - size
  )
  context = config.data.context
  attention = 12.0 * context * config.model.width
  return _Model(
    layer,
    tables,
    (6.0 * params + attention) * context,
    6.0 * tables.params * context,
  )


@functools.cache
def _fit(
  config: config_lib.Config, size: float, has_tables: bool, in_flight: int
) -> int:
  """Returns the layers that fit into `size` bytes; -1 if nothing fits."""
  model = _model(config)
  limit = config.plan.memory_fraction * size
  inner = dataclasses.replace(
    config.optim.inner, batch_size=2, microbatch_size=1
  )

  def fits(layers: int) -> bool:
    own = dataclasses.replace(
      config,
      devices=config_lib.Devices(offload=True),
      optim=dataclasses.replace(config.optim, inner=inner),
      model=dataclasses.replace(
        config.model,
        layers=layers,
        vocab_size=config.model.vocab_size if has_tables else 1,
      ),
    )
    tables = model.tables if has_tables else memory.Shards(0, 0, 0, 1)
    cut = memory.Shards(
      layers * model.layer.params + tables.params,
      model.layer.slice,
      layers * model.layer.payload_bytes + tables.payload_bytes,
      1,
    )
    phases = memory.phases(own, cut, True, in_flight)
    return max(phase.total for phase in phases) <= limit

  low, high = -1, config.model.layers
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low


def cut(
  config: config_lib.Config,
  groups: Sequence[hardware.HostGroup],
  hosts: Sequence[int],
  in_flight: int,
) -> _Cut | None:
  """Assigns layers to each group's devices for the shortest slot.

  Returns None if they cannot hold the model with `in_flight` sequences.
  """
  model, layers = _model(config), config.model.layers
  counts = [n * g.size for n, g in zip(hosts, groups, strict=True)]
  there = [i for i, count in enumerate(counts) if count]
  speeds = [g.device.peak * config.plan.peak_fraction for g in groups]
  most = [_fit(config, g.device.memory, False, in_flight) for g in groups]
  best: _Cut | None = None
  for head in there:
    room = _fit(config, groups[head].device.memory, True, in_flight)
    if room < 0:
      continue
    own = [count - (i == head) for i, count in enumerate(counts)]
    if room + sum(own[i] * max(most[i], 0) for i in there) < layers:
      continue
    table = model.table_flops / speeds[head]
    each = [model.layer_flops / speed for speed in speeds]

    def held(slot: float, head=head, room=room, table=table, each=each):
      """Returns the layers per device of each group, and of the head."""
      slot *= 1 + 1e-9
      of = [min(max(most[i], 0), int(slot / each[i])) for i in there]
      return of, min(room, int((slot - table) / each[head]))

    slots = {n * each[i] for i in there for n in range(1, layers + 1)}
    slots |= {table + n * each[head] for n in range(layers + 1)}
    slots = sorted(slot for slot in slots if slot >= table)
    low, high = 0, len(slots) - 1
    while low < high:
      middle = (low + high) // 2
      of, on_head = held(slots[middle])
      enough = on_head + sum(own[i] * n for i, n in zip(there, of, strict=True))
      low, high = (low, middle) if enough >= layers else (middle + 1, high)
    slot = slots[low]
    if best is None or slot < best.slot:
      of, on_head = held(slot)
      best = _spread(
        layers, slot, head, on_head, own, dict(zip(there, of, strict=True))
      )
  return best


def _spread(
  layers: int,
  slot: float,
  head: int,
  on_head: int,
  own: Sequence[int],
  most: dict[int, int],
) -> _Cut:
  """Distributes exactly `layers` layers, leaving spare room unused."""
  of = [own[i] * most.get(i, 0) for i in range(len(own))]
  beyond = on_head + sum(of) - layers
  less = min(on_head, beyond)
  on_head, beyond = on_head - less, beyond - less
  for i in sorted(most, key=lambda i: of[i], reverse=True):
    less = min(of[i], beyond)
    of[i], beyond = of[i] - less, beyond - less
  of[head] += on_head
  return _Cut(slot, head, tuple(of))


def pipeline(
  terms: island_costs.Terms,
  groups: Sequence[hardware.HostGroup],
  hosts: tuple[int, ...],
) -> island_costs.Work | None:
  """Plans the hosts as one pipeline; None if that is impossible.

  Chooses the boundary compression with the most weighted tokens.
  """
  config = terms.config
  members = [(n, g) for n, g in zip(hosts, groups, strict=True) if n]
  depth = sum(n * g.size for n, g in members)
  if sum(hosts) < 2:
    return None
  near = len(members) == 1 and members[0][1].together
  shares = (0.0,) if near else _COMPRESSIONS
  works = []
  for in_flight in (depth, 2 * depth):
    found = cut(config, groups, hosts, in_flight)
    if found is None:
      break
    for share in shares:
      passes = _passes(config.model, share)
      works.append(_work(terms, groups, hosts, found, in_flight, passes, near))
  return max((w for w in works if w), key=lambda w: w.value, default=None)


class _Passes(NamedTuple):
  """The data of one position that passes between hosts, one way."""

  rank: int  # numbers per position; 0: all
  bits: int  # per number; 0: as computed
  bytes: float  # per position
  fold: float  # compression ratio


def _passes(model: config_lib.Model, compression: float) -> _Passes:
  """Returns the four-bit rank that saves the share `compression`."""
  whole = subspace.position_bytes(model.width, 0, model.compute_dtype)
  if not compression:
    return _Passes(0, 0, whole, 1.0)
  step = subspace.position_bytes(0, _BITS, model.compute_dtype)
  pairs = max(1, round(whole * (1 - compression)) - step)
  rank = min(2 * pairs, 2 * ((model.width - 1) // 2))
  sent = subspace.position_bytes(rank, _BITS, model.compute_dtype)
  return _Passes(rank, _BITS, sent, whole / sent)


def worth(config: config_lib.Config, fold: float) -> float:
  """Returns the weight of a token trained at compression ratio `fold`.

  >>> worth(config_lib.Config(), 1), round(worth(config_lib.Config(), 64), 2)
  (1.0, 0.91)
  """
  cost = config.plan.compression_cost
  return 1 - cost * math.log(fold) / math.log(100)


def _work(
  terms: island_costs.Terms,
  groups: Sequence[hardware.HostGroup],
  hosts: tuple[int, ...],
  found: _Cut,
  in_flight: int,
  passes: _Passes,
  near: bool,
) -> island_costs.Work | None:
  """Plans a round of a pipeline with a given cut and compression."""
  sent, fetched, upload, gather = _exchange(terms, groups, hosts, found)
  if upload > terms.put or gather > terms.gather:
    return None
  config = terms.config
  members = [(n, g) for n, g in zip(hosts, groups, strict=True) if n]
  crossing = terms.context * 2 * passes.bytes  # activations and gradients
  transfers = [
    crossing
    / (g.size * g.device.outside if near else min(g.upload, g.download))
    for _, g in members
  ]
  life = found.slot * sum(n * g.size for n, g in members)
  for (n, g), transfer in zip(members, transfers, strict=True):
    life += n * (transfer + (0.0 if near else g.latency))
  slot = max(found.slot, *transfers, life / in_flight)
  pace = island_costs.StepTime(slot, slot, life - slot, 1)
  chosen = island_costs.choose([(1, pace)], terms, terms.window)
  if chosen is None:
    return None
  steps, (batch,) = chosen
  sequences = steps * batch
  tokens = sequences * terms.context
  used = sum(
    min(n, layers) for n, layers in zip(hosts, found.layers, strict=True)
  )
  # The stages of an island are equal, so there may be more than hosts.
  whole = config.model.layers
  stages = next(n for n in range(max(used, 1), whole + 1) if whole % n == 0)
  return island_costs.Work(
    'pipeline',
    hosts,
    island_lib.Island(steps, batch, stages, passes.rank, passes.bits)
    if stages > 1
    else island_lib.Island(steps, batch),
    tokens,
    tokens * worth(config, passes.fold),
    steps * pace.seconds(batch),
    island_costs.busy(terms, tokens, members),
    sent,
    fetched,
    0.0 if near else sequences * crossing * sum(hosts),
    upload,
    gather,
    _words(groups, hosts, found),
  )


def _exchange(
  terms: island_costs.Terms,
  groups: Sequence[hardware.HostGroup],
  hosts: tuple[int, ...],
  found: _Cut,
) -> tuple[float, float, float, float]:
  """Returns bytes sent and fetched by all hosts, and the slowest's seconds."""
  model = _model(terms.config)
  upload = gather = 0.0
  for i, (n, group) in enumerate(zip(hosts, groups, strict=True)):
    if not n:
      continue
    layers = -(-found.layers[i] // n)
    share = layers * model.layer.payload_bytes
    own = share + (i == found.head) * model.tables.payload_bytes
    upload = max(upload, own / group.upload + group.latency)
    # All hosts track the embeddings (covenant/train/pipeline/subspace.py).
    fetched = terms.others * (share + model.tables.payload_bytes)
    gather = max(gather, fetched / group.download + group.latency)
  layers = sum(found.layers) * model.layer.payload_bytes
  tables = model.tables.payload_bytes
  fetched = terms.others * (layers + sum(hosts) * tables)
  return layers + tables, fetched, upload, gather


def _words(
  groups: Sequence[hardware.HostGroup], hosts: Sequence[int], found: _Cut
) -> str:
  """Describes the layers per device of each group; E marks embeddings."""
  parts = []
  for i, (n, group) in enumerate(zip(hosts, groups, strict=True)):
    if not n:
      continue
    layers = found.layers[i] / (n * group.size)
    low, high = math.floor(layers), math.ceil(layers)
    many = f'{low}' if low == high else f'{low}-{high}'
    tables = '+E' if i == found.head else ''
    parts.append(f'{group.kind} {many}{tables}')
  return 'layers: ' + ', '.join(parts)
