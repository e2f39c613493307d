"""Seconds of a round: arithmetic of inner steps, and transfers.

Covenant-72B (arXiv 2603.08163) states its links as 110 Mb/s up and 500 Mb/s
down. As megabits, its 2 GB payloads would take over ten minutes per round,
where 70 s were measured; as megabytes they take about 70 s. Bandwidths here
are therefore megabytes per second.
"""

import math
from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory


class Flops(NamedTuple):
  """Model FLOPs of one inner step of a peer, without rematerialization."""

  weights: float  # 6 per parameter and token
  attention: float  # 12 x layers x context x width per token

  @property
  def total(self) -> float:
    return self.weights + self.attention


class Step(NamedTuple):
  """Seconds of each part of one inner step."""

  compute: float
  parameters: float  # gathering weights, scattering gradients
  activations: float  # summing over the axis 'tensor'

  @property
  def total(self) -> float:
    """Seconds of the step; gathers overlap with arithmetic, sums do not."""
    return max(self.compute, self.parameters) + self.activations


def tokens(config: config_lib.Config) -> int:
  """Returns the tokens of one inner step of a peer."""
  return config.optim.inner.batch_size * config.data.context


def flops(config: config_lib.Config) -> Flops:
  """Returns the model FLOPs of one inner step (PaLM, 2204.02311, app. B).

  >>> config = config_lib.Config()
  >>> llama.num_params(config.model), tokens(config)
  (123200, 512)
  """
  m, count = config.model, tokens(config)
  return Flops(
    6.0 * llama.num_params(m) * count,
    12.0 * m.layers * config.data.context * m.width * count,
  )


def traffic(config: config_lib.Config) -> tuple[float, float]:
  """Returns the bytes that a device receives per step.

  Each microbatch gathers all weights in the compute dtype, once forward and
  once backward, and scatters float32 gradients. Replicas along the axis
  'data' sum their gradients once per step.

  Returns:
    Bytes of parameters and gradients, and bytes of activations.
  """
  m, devices = config.model, config.devices
  wide = 2 if m.compute_dtype == 'bfloat16' else 4
  size, times = memory.microbatch(config)
  held = llama.num_params(m) / devices.tensor
  fsdp, data = devices.fsdp, devices.data
  gathered = times * (2 * wide + 4) * held * (fsdp - 1) / fsdp
  copied = 2 * 4 * held / fsdp * (data - 1) / data
  sums = 6 if m.remat == 'block' else 4
  share = 2 * (devices.tensor - 1) / devices.tensor
  summed = times * size * config.data.context * m.width * wide
  return gathered + copied, m.layers * sums * summed * share


def step(config: config_lib.Config, hardware: hardware_lib.Hardware) -> Step:
  """Estimates the seconds of an inner step from `config.plan`."""
  device = hardware.device
  of_parameters, of_activations = traffic(config)
  tensor = config.devices.tensor
  near = device.inside if tensor <= device.per_host else device.outside
  return Step(
    flops(config).total
    / (hardware.count * device.peak * config.plan.peak_fraction),
    of_parameters / hardware.link,
    of_activations / near,
  )


class Links(NamedTuple):
  """The link of one peer to the store, bytes per second."""

  upload: float
  download: float


class RoundSeconds(NamedTuple):
  """Seconds of the phases of one round, which run one after another."""

  compute: float
  upload: float
  gather: float

  @property
  def total(self) -> float:
    return self.compute + self.upload + self.gather

  @property
  def utilization(self) -> float:
    return utilization(self.compute, self.upload + self.gather)


class Published(NamedTuple):
  """The average round that a run reported, in seconds."""

  compute: float
  communication: float
  utilization: float  # as reported, rounded


# arXiv 2603.08163, section 4.3.
PUBLISHED = {
  'Covenant-72B': Published(20 * 60, 70, 0.945),
  'INTELLECT-1': Published(38 * 60, 8.3 * 60, 0.821),
  'SparseLoCo 8B': Published(4.5 * 60, 12, 0.957),
}


def links_of(plan: config_lib.Plan) -> Links:
  """Returns the links that the plan assumes of every peer."""
  return Links(plan.upload * 1e6, plan.download * 1e6)


def utilization(compute: float, communication: float) -> float:
  """Returns the share of a round in which the devices train.

  >>> print(f'{utilization(20 * 60, 70):.3f}')
  0.945
  """
  return compute / (compute + communication)


def round_time(
  links: Links, compute: float, payload_bytes: float, peers: int
) -> RoundSeconds:
  """Returns a round in which each peer fetches all other payloads directly.

  Args:
    links: the link of every peer.
    compute: seconds of the inner steps.
    payload_bytes: the size of one payload.
    peers: the number of contributors, this peer included.
  """
  upload = payload_bytes / links.upload
  return RoundSeconds(
    compute, upload, (peers - 1) * payload_bytes / links.download
  )


class Gather(NamedTuple):
  """The cost of one way to gather: bytes fetched per peer, and seconds.

  `seconds` starts at the end of the inner steps and covers the uploads, the
  work of aggregators and the peer's own fetch.
  """

  fetched: float
  seconds: float


def direct(links: Links, payload_bytes: float, peers: int) -> Gather:
  """Returns the cost of fetching every other peer's payload."""
  fetched = (peers - 1) * payload_bytes
  return Gather(
    fetched, payload_bytes / links.upload + fetched / links.download
  )


def ways(
  config: config_lib.Config, links: Links, payload_bytes: float, peers: int
) -> dict[str, Gather]:
  """Returns the cost of every way to gather, by name."""
  params = llama.num_params(config.model)
  return {
    'directly': direct(links, payload_bytes, peers),
    'summed': aggregated(links, payload_bytes, peers, params, density(config)),
    'in a tree': tree(links, payload_bytes, peers),
  }


def union_density(density: float, peers: int) -> float:
  """Returns the share of elements that at least one of `peers` sends.

  Assumes independent choices: an upper bound where peers agree.

  >>> print(f'{union_density(1 / 64, 20):.2f}')
  0.27
  """
  return -math.expm1(peers * math.log1p(-density))


def density(config: config_lib.Config) -> float:
  """Returns the share of elements that a payload carries."""
  compression = config.optim.compression
  height, width = compression.block
  if config.optim.method in ('diloco', 'ddp'):
    return 1.0
  return compression.k / (height * width)


def aggregate_bytes(params: int, density: float, peers: int) -> float:
  """Returns the size of the sum: 1 bit per element, 16 per nonzero one."""
  return params / 8 * (1 + 16 * union_density(density, peers))


def aggregated(
  links: Links,
  payload_bytes: float,
  peers: int,
  params: int,
  density: float,
  cores: float = 10e9 / 8 * 10,
) -> Gather:
  """Returns the cost when validators publish the exact sum of all payloads.

  Args:
    links: the link of a peer.
    payload_bytes: the size of one payload.
    peers: the number of contributors.
    params: elements of the model.
    density: the share of elements in a payload.
    cores: the link of a validator, bytes per second; assumed 100 Gbit/s.
      Several validators may split the elements.
  """
  whole = aggregate_bytes(params, density, peers)
  return Gather(
    whole,
    payload_bytes / links.upload
    + peers * payload_bytes / cores
    + whole / cores
    + whole / links.download,
  )


def tree(
  links: Links, payload_bytes: float, peers: int, fan_in: int = 20
) -> Gather:
  """Returns the cost of a tree that sums and recompresses groups of peers.

  At each level one member of a group fetches the group's payloads and sends
  one of the same size; all peers fetch the root. Each recompression is lossy
  and needs an error feedback of its own, so this is a different algorithm,
  whose loss has not been measured.
  """
  up, level = payload_bytes / links.upload, 0.0
  nodes = peers
  while nodes > 1:
    group = min(fan_in, nodes)
    level += (group - 1) * payload_bytes / links.download + up
    nodes = -(-nodes // fan_in)
  return Gather(payload_bytes, up + level + payload_bytes / links.download)
