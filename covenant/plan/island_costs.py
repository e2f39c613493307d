"""The work of hosts in a round as one island: a single replica or a pool.

The steps of an island end within the compute window, its payload is stored
before the put window closes, and the other payloads arrive in the rest of the
round.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama
from covenant.optim import compression as compression_lib
from covenant.optim import quantize
from covenant.plan import hardware
from covenant.plan import memory
from covenant.plan import timing
from covenant.plan import worth
from covenant.train import island as island_lib
from covenant.wire import payload as payload_lib

# An island's inner steps and batch, relative to those of the run.
LEAST_STEPS, MOST_STEPS, MOST_BATCH = 0.5, 2, 4
# Within this share of the most weighted tokens, the number of steps nearest to
# the run's own is chosen.
_ALIKE = 0.99


class Terms(NamedTuple):
  """The requirements of a run on every island, in seconds and bytes."""

  config: config_lib.Config
  window: float  # for inner steps
  put: float  # for the upload
  gather: float  # for the others' payloads
  others: int  # payloads that an island fetches
  payload: float  # bytes of a payload
  flops: float  # per token
  steps: tuple[int, ...]  # allowed numbers of inner steps, ascending
  batch: int  # largest number of sequences per inner step

  @property
  def context(self) -> int:
    return self.config.data.context


def terms(config: config_lib.Config) -> Terms:
  """Returns the terms of a run with an inventory.

  Raises:
    ConfigError: `plan.compute_minutes` is missing or exceeds the round.
  """
  phases, plan = config.phases, config.plan
  block = config.network.block_seconds
  put, select = phases.put_blocks * block, phases.select_blocks * block
  window = 60 * plan.compute_minutes
  # Early steps run beside the other phases.
  early = window * config.optim.overlap / config.optim.inner_steps
  hidden = min(early, put + select) if early else 0.0
  left = phases.round_blocks * block - put - select + hidden
  if not 0 < window < left:
    raise config_lib.ConfigError(
      f'plan.compute_minutes: expected, with plan.inventory, how many minutes '
      f'of a round are for inner steps, fewer than {left / 60:.1f}, which the '
      f'other phases leave; got {plan.compute_minutes:g}'
    )
  whole = memory.shards(
    dataclasses.replace(config, devices=config_lib.Devices())
  )
  own = config.optim.inner_steps
  return Terms(
    config,
    window,
    put,
    left - window + early - hidden,
    plan.peers - 1,
    whole.payload_bytes,
    timing.flops(config).total / timing.tokens(config),
    tuple(range(max(1, int(LEAST_STEPS * own)), MOST_STEPS * own + 1)),
    MOST_BATCH * config.optim.inner.batch_size,
  )


class StepTime(NamedTuple):
  """The time of an inner step: max(batch * each, batch * beside + fixed)."""

  each: float  # seconds of arithmetic per sequence
  beside: float  # seconds of transfers per sequence
  fixed: float  # seconds of transfers per step
  quantum: int  # sequences of which a batch is a multiple

  def seconds(self, batch: int) -> float:
    return max(batch * self.each, batch * self.beside + self.fixed)

  def most(self, seconds: float, limit: int) -> int:
    """Returns the largest batch within `seconds` and `limit`."""
    if self.fixed > seconds:
      return 0
    batch = min(seconds / self.each, limit)
    if self.beside:
      batch = min(batch, (seconds - self.fixed) / self.beside)
    # Rounding must not exclude a batch that fits exactly.
    return max(int((batch + 1e-9) // self.quantum) * self.quantum, 0)


class Placement(NamedTuple):
  """The placement of the whole model on the devices of a host."""

  pace: StepTime
  fsdp: int  # devices that share the parameters
  copies: int
  microbatch: int  # sequences of a device

  @property
  def text(self) -> str:
    if self.fsdp * self.copies == 1:
      return 'whole'
    return f'fsdp {self.fsdp}' + f' x {self.copies} copies' * (self.copies > 1)


class Work(NamedTuple):
  """An island and its round, in seconds and bytes."""

  kind: str  # replica, pool or pipeline
  hosts: tuple[int, ...]  # per group
  island: island_lib.Island
  tokens: int  # per round
  value: float  # weighted tokens per round
  computing: float  # until its last inner step ends
  busy: float  # share of the window in which its devices do arithmetic
  uploaded: float  # bytes to the store, whole island
  downloaded: float  # bytes from the store, whole island
  inside: float  # bytes between its hosts over the internet
  upload: float  # seconds of its slowest host
  gather: float  # seconds of its slowest host
  split: str  # description of the model's placement
  head: int = 0  # index of the group of its head
  # Of a pool the batch of a host, of a pipeline the stages beside that of the
  # embeddings, by group.
  of_groups: tuple[int, ...] = ()


def choose(
  paces: Sequence[tuple[int, StepTime]], terms_: Terms, window: float
) -> tuple[int, list[int]] | None:
  """Chooses the inner steps and each worker's batch for the most progress.

  Tokens weigh by the batch of the whole island (covenant/plan/worth.py).

  Args:
    paces: the number of workers of each pace.
    terms_: the terms of the run.
    window: seconds for all inner steps.

  Returns:
    The steps and the batch per pace; None if no worker can do a step.
  """
  found = []
  for steps in terms_.steps:
    batches = [pace.most(window / steps, terms_.batch) for _, pace in paces]
    whole = sum(n * b for (n, _), b in zip(paces, batches, strict=True))
    value = steps * whole * worth.of_batch(terms_.config, whole)
    found.append((value, steps, batches))
  best = max(value for value, _, _ in found)
  if not best:
    return None
  own = terms_.config.optim.inner_steps
  _, steps, batches = min(
    (f for f in found if f[0] >= _ALIKE * best), key=lambda f: abs(f[1] - own)
  )
  return steps, batches


def replica_config(
  config: config_lib.Config, fsdp: int, size: int, count: int
) -> config_lib.Config:
  """Returns the config of a host that holds the whole model.

  `size` is the microbatch per device, in sequences.
  """
  inner = config.optim.inner
  return dataclasses.replace(
    config,
    devices=config_lib.Devices(data=count // fsdp, fsdp=fsdp, offload=True),
    optim=dataclasses.replace(
      config.optim,
      # Two microbatches, so that the memory of their sum counts.
      inner=dataclasses.replace(
        inner, batch_size=2 * size * count, microbatch_size=size
      ),
    ),
  )


@functools.cache
def shared_model(
  config: config_lib.Config, group: hardware.HostGroup
) -> Placement | None:
  """Returns the fastest placement of the whole model on a host, or None.

  Parameters are sharded over as few devices as hold them and replicated over
  the rest, unless that is slower (FSDP, data parallel).
  """
  best: Placement | None = None
  limit = config.plan.memory_fraction * group.device.memory
  in_host = config.plan.memory_fraction * group.memory / group.size
  kind = hardware.Hardware(group.size, group.kind, group.device)
  sizes = {config.optim.inner.microbatch_size or 1, 1}
  for fsdp in (f for f in range(1, group.size + 1) if group.size % f == 0):
    for size in sorted(sizes, reverse=True):
      own = replica_config(config, fsdp, size, group.size)
      try:
        found = memory.phases(own, memory.shards(own), True)
        needs, waits = memory.largest(found)
      except config_lib.ConfigError:  # blocks do not divide
        continue
      if needs > limit or waits > in_host:
        continue
      step, quantum = timing.step(own, kind), size * group.size
      batch = own.optim.inner.batch_size
      # Weights are gathered per microbatch, replicas summed once per step.
      held = llama.num_params(config.model) / fsdp
      copies = group.size // fsdp
      summed = 8 * held * (copies - 1) / copies / kind.link
      pace = StepTime(
        step.compute / batch,
        max(step.parameters - summed, 0) / batch,
        summed,
        quantum,
      )
      if best is None or pace.seconds(batch) / batch < 0.999 * _each(best.pace):
        best = Placement(pace, fsdp, copies, size)
  return best


def _each(pace: StepTime) -> float:
  return pace.seconds(2 * pace.quantum) / (2 * pace.quantum)


def alone(
  terms_: Terms, groups: Sequence[hardware.HostGroup], g: int
) -> Work | None:
  """Plans one host of a group as a full replica; None if impossible."""
  group, found = groups[g], shared_model(terms_.config, groups[g])
  if found is None:
    return None
  chosen = choose([(1, found.pace)], terms_, terms_.window)
  upload = terms_.payload / group.upload + group.latency
  fetched = terms_.others * terms_.payload
  gather = fetched / group.download + group.latency
  if not chosen or upload > terms_.put or gather > terms_.gather:
    return None
  steps, (batch,) = chosen
  tokens = steps * batch * terms_.context
  return Work(
    'replica',
    tuple(int(i == g) for i in range(len(groups))),
    island_lib.Island(steps, batch),
    tokens,
    tokens * worth.of_batch(terms_.config, batch),
    steps * found.pace.seconds(batch),
    busy(terms_, tokens, [(1, group)]),
    terms_.payload,
    fetched,
    0.0,
    upload,
    gather,
    found.text,
    g,
  )


def pool(
  terms_: Terms, groups: Sequence[hardware.HostGroup], hosts: tuple[int, ...]
) -> Work | None:
  """Plans hosts that each hold the whole model as workers of one uid.

  `pool.subrounds` times per round each worker fetches the parameters of the
  pool's machine and sends it a delta. That machine is the host with the
  fastest upload; it alone exchanges payloads with the network. All do equally
  many inner steps, each on its own batch.
  """
  members = [(n, groups[g]) for g, n in enumerate(hosts) if n]
  found = [shared_model(terms_.config, group) for _, group in members]
  count = sum(hosts)
  if count < 2 or None in found:
    return None
  hub = max(
    (i for i, n in enumerate(hosts) if n),
    key=lambda i: (groups[i].upload, groups[i].download),
  )
  head = groups[hub]
  subrounds = terms_.config.pool.subrounds
  state = memory.FLOAT * llama.num_params(terms_.config.model)
  delta = pool_delta_bytes(terms_.config)
  slowest = max(state / g.download + delta / g.upload for _, g in members)
  relayed = (count - 1) * max(state / head.upload, delta / head.download)
  latency = max(g.latency for _, g in members)
  inner = subrounds * (max(slowest, relayed) + 2 * latency)
  paces = [(n, f.pace) for (n, _), f in zip(members, found, strict=True) if f]
  chosen = None
  if inner < terms_.window:
    chosen = choose(paces, terms_, terms_.window - inner)
  payload, fetched = terms_.payload, terms_.others * terms_.payload
  upload = payload / head.upload + head.latency
  gather = fetched / head.download + head.latency
  if not chosen or upload > terms_.put or gather > terms_.gather:
    return None
  steps, batches = chosen
  whole = sum(n * b for (n, _), b in zip(members, batches, strict=True))
  tokens = steps * whole * terms_.context
  seconds = max(
    pace.seconds(b) for (_, pace), b in zip(paces, batches, strict=True)
  )
  low, high = min(batches), max(batches)
  return Work(
    'pool',
    hosts,
    island_lib.Island(steps, whole),
    tokens,
    tokens * worth.of_batch(terms_.config, whole),
    steps * seconds + inner,
    busy(terms_, tokens, members),
    payload,
    fetched,
    subrounds * (count - 1) * (state + delta),
    upload,
    gather,
    f'{count} x whole, batch {low}{f"-{high}" * (high > low)} each',
    hub,
    tuple(batches),
  )


@functools.cache
def pool_delta_bytes(config: config_lib.Config) -> int:
  """Returns the bytes of the delta that a pool's worker sends for a lease.

  A quarter of all elements travel, with two bits each
  (covenant/pool/deltas.py).
  """
  height, width = config.optim.compression.block
  compression = compression_lib.TopK(
    k=max(height * width // 4, 1),
    block=(height, width),
    quantizer=quantize.SignMagnitude(),
  )
  spec = payload_lib.make_spec(llama.abstract(config.model), compression)
  return spec.payload_bytes


def busy(
  terms_: Terms,
  tokens: float,
  members: Iterable[tuple[int, hardware.HostGroup]],
) -> float:
  """Returns the share of the window in which the devices do arithmetic."""
  speed = sum(
    n * g.size * g.device.peak * terms_.config.plan.peak_fraction
    for n, g in members
  )
  return tokens * terms_.flops / (speed * terms_.window)
