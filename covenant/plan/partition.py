"""Hosts that only together hold the model: a pipeline of their devices.

Every device has layers; the activations of one sequence after another go from
device to device, and their gradients back (one forward, one backward, in
turn). One device has the embeddings as well: it looks tokens up and computes
the loss, so the chain is closed to a ring. In a host activations go whole; over
the internet as `rank` numbers of four bits a position, and their step
(covenant/train/pipeline/activation_quantization.py). What is fixed for a round is not counted.

When all devices are at work, a sequence leaves the pipeline every `slot`
seconds: what the slowest device computes, or the slowest link sends, whichever
is longer. The first one of a step takes its whole way, a slot of each device,
a transfer of each host and the latency of all links; if memory lets fewer be
under way than fit into that time, all wait for it.

Stages exchange with their like: a host sends and fetches its layers' share of
payloads, and fetches that of the embeddings, which all of them follow.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import inventory
from covenant.plan import island_costs
from covenant.plan import memory
from covenant.train import island as island_lib
from covenant.train.pipeline import activation_quantization

_COMPRESSIONS = (0.0, 0.875, 0.95, 0.99)  # of boundaries; 0.0 sends all
_BITS = 4  # of each number that passes compressed


class _Model(NamedTuple):
  """A layer, and the tables with the last gain: what stages are made of."""

  layer: memory.Shards
  tables: memory.Shards
  layer_flops: float  # of a sequence
  table_flops: float


class _Cut(NamedTuple):
  """How layers lie on the devices of each group."""

  slot: float  # seconds of the slowest device
  head: int  # the group of which one device has the tables
  layers: tuple[int, ...]  # of all devices of a group


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
  """How many layers a device of `size` bytes holds; -1: not even the tables."""
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
  groups: Sequence[inventory.Group],
  hosts: Sequence[int],
  in_flight: int,
) -> _Cut | None:
  """The layers of each group's devices, for the shortest slot.

  None if they cannot hold the model with so many sequences under way.
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
      """Layers of a device of each group, and of the head, in `slot`."""
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
  """Exactly `layers` of them: what there is room for beyond goes."""
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
  groups: Sequence[inventory.Group],
  hosts: tuple[int, ...],
) -> island_costs.Work | None:
  """The hosts as one pipeline; None if they cannot be one.

  Of the shares of the width that boundaries may send it takes the one with
  the most tokens, each at what it counts for.
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
  """What of a position passes between hosts, one way."""

  rank: int  # 0: all numbers
  bits: int  # of each; 0: as computed
  bytes: float
  fold: float  # by which it is less than all


def _passes(model: config_lib.Model, compression: float) -> _Passes:
  """As many numbers of four bits as take that share less than all."""
  whole = activation_quantization.position_bytes(
    model.width, 0, model.compute_dtype
  )
  if not compression:
    return _Passes(0, 0, whole, 1.0)
  step = activation_quantization.position_bytes(0, _BITS, model.compute_dtype)
  pairs = max(1, round(whole * (1 - compression)) - step)
  rank = min(2 * pairs, 2 * ((model.width - 1) // 2))
  sent = activation_quantization.position_bytes(
    rank, _BITS, model.compute_dtype
  )
  return _Passes(rank, _BITS, sent, whole / sent)


def worth(config: config_lib.Config, fold: float) -> float:
  """What a token counts for whose activations pass `fold` times smaller.

  >>> worth(config_lib.Config(), 1), round(worth(config_lib.Config(), 64), 2)
  (1.0, 0.91)
  """
  cost = config.plan.compression_cost
  return 1 - cost * math.log(fold) / math.log(100)


def _work(
  terms: island_costs.Terms,
  groups: Sequence[inventory.Group],
  hosts: tuple[int, ...],
  found: _Cut,
  in_flight: int,
  passes: _Passes,
  near: bool,
) -> island_costs.Work | None:
  """A round in which that passes between hosts."""
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
  pace = island_costs.Pace(slot, slot, life - slot, 1)
  chosen = island_costs.choose([(1, pace)], terms, terms.window)
  if chosen is None:
    return None
  steps, (batch,) = chosen
  sequences = steps * batch
  tokens = sequences * terms.context
  used = sum(
    min(n, layers) for n, layers in zip(hosts, found.layers, strict=True)
  )
  # An island's stages are alike: more of them than hosts, if need be.
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
  groups: Sequence[inventory.Group],
  hosts: tuple[int, ...],
  found: _Cut,
) -> tuple[float, float, float, float]:
  """Bytes that all hosts send and fetch; seconds of the slowest for either."""
  model = _model(terms.config)
  upload = gather = 0.0
  for i, (n, group) in enumerate(zip(hosts, groups, strict=True)):
    if not n:
      continue
    layers = -(-found.layers[i] // n)
    share = layers * model.layer.payload_bytes
    own = share + (i == found.head) * model.tables.payload_bytes
    upload = max(upload, own / group.upload + group.latency)
    # All know what tokens bring with them (covenant/train/pipeline/subspace.py).
    fetched = terms.others * (share + model.tables.payload_bytes)
    gather = max(gather, fetched / group.download + group.latency)
  layers = sum(found.layers) * model.layer.payload_bytes
  tables = model.tables.payload_bytes
  fetched = terms.others * (layers + sum(hosts) * tables)
  return layers + tables, fetched, upload, gather


def _words(
  groups: Sequence[inventory.Group], hosts: Sequence[int], found: _Cut
) -> str:
  """Layers of a device of each group, and who has the embeddings."""
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
