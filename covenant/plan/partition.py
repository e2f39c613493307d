"""Pipelines over hosts that hold the model only together.

Every device is a stage: it holds layers and runs one forward and one backward
pass in turn (1F1B), computing the forward pass again for the second. One of
them also holds the embeddings: it looks tokens up and computes the loss, which
closes the pipeline to a ring; its host is the head. Activations pass as `rank`
four-bit numbers per position and their scale, through the head
(covenant/plan/relay.py). They are fitted once per round
(covenant/train/pipeline/subspace.py) before the first step.

In steady state a sequence leaves the pipeline every `slot` seconds: the time of
the slowest device or of the busiest link. The first sequence of a step takes a
slot per device, and all transfers and latencies in turn. If fewer sequences are
in flight than fill that time, the slot grows.

A stage keeps all of its state on its device, with the embeddings and what they
predict of the activations at either boundary.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import hardware
from covenant.plan import island_costs
from covenant.plan import memory
from covenant.plan import relay
from covenant.plan import worth
from covenant.train import island as island_lib
from covenant.train.pipeline import boundary_bytes
from covenant.train.pipeline import subspace

_COMPRESSIONS = (0.875, 0.95, 0.99)  # share saved at boundaries
_BITS = 4  # per compressed number
_PASSES = 4  # forward, again, and backward, which counts twice
_IN_FLIGHT = 2  # sequences per stage between the first and the last


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
  on_head: int  # layers of the device that holds the embeddings


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
    _PASSES * (2.0 * params + attention / 3) * context,
    _PASSES * 2.0 * tables.params * context,
  )


@functools.cache
def _fit(
  config: config_lib.Config,
  size: float,
  has_tables: bool,
  host: float = math.inf,
) -> int:
  """Returns the layers that a device holds; -1 if nothing fits.

  Args:
    config: the config of the run.
    size: bytes of the device.
    has_tables: whether it holds the embeddings.
    host: bytes of host memory that it may use.
  """
  model, fraction = _model(config), config.plan.memory_fraction
  tables = model.tables if has_tables else memory.Shards(0, 0, 0, 1)
  # The embeddings, what they predict of the activations at both boundaries, and
  # at the ends of the ring a copy of them.
  table = memory.FLOAT * model.tables.params
  tracked = 2 + has_tables
  if not has_tables:
    tracked += 1 + memory.outer_moments(config.optim)
  inner = dataclasses.replace(
    config.optim.inner, batch_size=2, microbatch_size=1
  )

  def fits(layers: int) -> bool:
    own = dataclasses.replace(
      config,
      devices=config_lib.Devices(),
      optim=dataclasses.replace(config.optim, inner=inner),
      model=dataclasses.replace(
        config.model,
        layers=layers,
        vocab_size=config.model.vocab_size if has_tables else 1,
      ),
    )
    cut = memory.Shards(
      layers * model.layer.params + tables.params,
      model.layer.slice,
      layers * model.layer.payload_bytes + tables.payload_bytes,
      1,
    )
    needed, waits = memory.largest(memory.phases(own, cut, False))
    needed += tracked * table
    if has_tables:  # the head puts the payload together, and passes others on
      waits += config.plan.peers * _payload_bytes(config)
    return needed <= fraction * size and waits <= fraction * host

  low, high = -1, config.model.layers
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low


def _payload_bytes(config: config_lib.Config) -> int:
  model = _model(config)
  layers = config.model.layers * model.layer.payload_bytes
  return layers + model.tables.payload_bytes


def _room(
  config: config_lib.Config, group: hardware.HostGroup, has_tables: bool
) -> int:
  """Returns the layers that a device of a group holds; -1 if nothing fits."""
  share = group.memory / group.size
  return _fit(config, group.device.memory, has_tables, share)


def cut(
  config: config_lib.Config,
  groups: Sequence[hardware.HostGroup],
  hosts: Sequence[int],
) -> _Cut | None:
  """Assigns layers to each group's devices for the shortest slot.

  Returns None if they cannot hold the model.
  """
  model, layers = _model(config), config.model.layers
  counts = [n * g.size for n, g in zip(hosts, groups, strict=True)]
  there = [i for i, count in enumerate(counts) if count]
  speeds = [g.device.peak * config.plan.peak_fraction for g in groups]
  most = [_room(config, g, False) for g in groups]
  best: _Cut | None = None
  for head in there:
    room = _room(config, groups[head], True)
    if room < 1:  # every stage has a layer
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
    slots |= {table + n * each[head] for n in range(1, layers + 1)}
    slots = sorted(slot for slot in slots if slot >= table + each[head])
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
  less = min(on_head - 1, beyond)
  on_head, beyond = on_head - less, beyond - less
  for i in sorted(most, key=lambda i: of[i], reverse=True):
    less = min(of[i], beyond)
    of[i], beyond = of[i] - less, beyond - less
  of[head] += on_head
  return _Cut(slot, head, tuple(of), on_head)


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
  if sum(hosts) < 2:
    return None
  near = len(members) == 1 and members[0][1].together
  found = cut(config, groups, hosts)
  if found is None:
    return None
  works = [
    _work(terms, groups, hosts, found, _passes(config.model, share), near)
    for share in _COMPRESSIONS
  ]
  return max((w for w in works if w), key=lambda w: w.value, default=None)


class _Passes(NamedTuple):
  """The data of one position that passes between hosts, one way."""

  rank: int  # numbers per position
  bits: int  # per number
  bytes: float  # per position
  fold: float  # compression ratio


def _passes(model: config_lib.Model, compression: float) -> _Passes:
  """Returns the four-bit rank that saves the share `compression`."""
  whole = boundary_bytes.position_bytes(model.width, 0, model.compute_dtype)
  step = boundary_bytes.position_bytes(0, _BITS, model.compute_dtype)
  pairs = max(1, round(whole * (1 - compression)) - step)
  rank = min(2 * pairs, 2 * ((model.width - 1) // 2))
  sent = boundary_bytes.position_bytes(rank, _BITS, model.compute_dtype)
  return _Passes(rank, _BITS, sent, whole / sent)


def _work(
  terms: island_costs.Terms,
  groups: Sequence[hardware.HostGroup],
  hosts: tuple[int, ...],
  found: _Cut,
  passes: _Passes,
  near: bool,
) -> island_costs.Work | None:
  """Plans a round of a pipeline with a given cut and compression."""
  config, ring = terms.config, relay.Ring(groups, hosts, found.head, near)
  exchange = relay.exchange(ring, _sections(config, groups, hosts, found),
                            terms.others)  # fmt: skip
  if exchange.upload > terms.put or exchange.gather > terms.gather:
    return None
  # Activations and gradients.
  passing = relay.sequence(ring, terms.context * 2 * passes.bytes)
  depth = sum(n * g.size for n, g in zip(hosts, groups, strict=True))
  life = found.slot * depth + passing.life
  slot = max(found.slot, passing.slot, life / (_IN_FLIGHT * depth))
  pace = island_costs.StepTime(slot, slot, life - slot, 1)
  fitted = subspace.FITTED * terms.context * passes.bytes
  fit = relay.fit(ring, config.model.width, passes.rank, fitted)
  before = fit.seconds + _fit_seconds(config, groups, found)
  if before >= terms.window:
    return None
  chosen = island_costs.choose([(1, pace)], terms, terms.window - before)
  if chosen is None:
    return None
  steps, (batch,) = chosen
  sequences = steps * batch
  tokens = sequences * terms.context
  stages = _stages(groups, hosts, found)
  members = [(n, g) for n, g in zip(hosts, groups, strict=True) if n]
  layers = tuple(itertools.chain(*stages, (found.on_head,)))
  value = tokens * worth.of_batch(config, batch)
  return island_costs.Work(
    'pipeline',
    hosts,
    island_lib.Island(
      steps=steps,
      batch=batch,
      stages=len(layers),
      layers=layers if len(set(layers)) > 1 else (),
      rank=passes.rank,
      bits=passes.bits,
    ),
    tokens,
    value * worth.of_compression(config, passes.fold),
    before + steps * pace.seconds(batch),
    island_costs.busy(terms, tokens, members),
    terms.payload,
    exchange.fetched,
    sequences * passing.sent + fit.sent + exchange.relayed,
    exchange.upload,
    exchange.gather,
    _words(groups, hosts, found),
    found.head,
    tuple(map(len, stages)),
  )


def _stages(
  groups: Sequence[hardware.HostGroup],
  hosts: Sequence[int],
  found: _Cut,
) -> list[list[int]]:
  """Returns the layers of the stages of each group, but that of the head.

  Layers lie on the devices of a group as evenly as possible; a device without a
  layer is no stage.
  """
  stages = []
  for i, (n, group) in enumerate(zip(hosts, groups, strict=True)):
    devices = n * group.size - (i == found.head)
    left = found.layers[i] - (found.on_head if i == found.head else 0)
    each, more = divmod(left, max(devices, 1))
    stages.append([each + 1] * more + [each] * (devices - more) * (each > 0))
  return stages


def _fit_seconds(
  config: config_lib.Config,
  groups: Sequence[hardware.HostGroup],
  found: _Cut,
) -> float:
  """Returns the seconds of the fitted sequences' forward pass, by stages."""
  forward = _model(config).layer_flops / _PASSES * subspace.FITTED
  fraction = config.plan.peak_fraction
  return sum(
    layers * forward / (g.device.peak * fraction)
    for layers, g in zip(found.layers, groups, strict=True)
  )


def _sections(
  config: config_lib.Config,
  groups: Sequence[hardware.HostGroup],
  hosts: Sequence[int],
  found: _Cut,
) -> relay.Sections:
  """Returns the sections of the payload that stages of each group send."""
  model = _model(config)
  own = [
    layers / (n * g.size) * model.layer.payload_bytes if n else 0.0
    for layers, n, g in zip(found.layers, hosts, groups, strict=True)
  ]
  return relay.Sections(own, _payload_bytes(config), model.tables.payload_bytes)


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
