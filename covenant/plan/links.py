"""Transfer times, and the share of a round that computes.

Covenant-72B (arXiv 2603.08163) states its links as 110 Mb/s up and 500 Mb/s
down. As megabits, its 2 GB payloads would take over ten minutes per round,
where 70 s were measured; as megabytes they take about 70 s. Bandwidths here
are therefore megabytes per second.
"""

import math
from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama


class Links(NamedTuple):
  """The link of one peer to the store, bytes per second."""

  upload: float
  download: float


class Round(NamedTuple):
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


def make(plan: config_lib.Plan) -> Links:
  return Links(plan.upload * 1e6, plan.download * 1e6)


def utilization(compute: float, communication: float) -> float:
  """Returns the share of a round in which the devices train.

  >>> print(f'{utilization(20 * 60, 70):.3f}')
  0.945
  """
  return compute / (compute + communication)


def round_time(
  links: Links, compute: float, payload_bytes: float, peers: int
) -> Round:
  """Returns a round in which each peer fetches all other payloads directly.

  Args:
    links: the link of every peer.
    compute: seconds of the inner steps.
    payload_bytes: the size of one payload.
    peers: the number of contributors, this peer included.
  """
  upload = payload_bytes / links.upload
  return Round(compute, upload, (peers - 1) * payload_bytes / links.download)


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
