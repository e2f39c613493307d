"""Bytes, links, and the share of a round that goes into computing.

The published systems give their links in Mb/s. Read as megabits, 110 up and
500 down, the 2 GB payloads of Covenant-72B would take 145 s to send and over
ten minutes to gather, where 70 s for both were measured; read as megaBYTES
they take about as long as they did (reference/papers.md 2). So bandwidths
here are megabytes a second, and every name says bytes.
"""

import math
from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama


class Links(NamedTuple):
  """Of one peer to the store, bytes a second."""

  upload: float
  download: float


class Round(NamedTuple):
  """Seconds of one round; its phases follow one another."""

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
  """What a run reported of an average round, in seconds."""

  compute: float
  communication: float
  utilization: float  # as reported, rounded


# reference/papers.md 2: arXiv 2603.08163, section 4.3.
PUBLISHED = {
  'Covenant-72B': Published(20 * 60, 70, 0.945),
  'INTELLECT-1': Published(38 * 60, 8.3 * 60, 0.821),
  'SparseLoCo 8B': Published(4.5 * 60, 12, 0.957),
}


def make(plan: config_lib.Plan) -> Links:
  return Links(plan.upload * 1e6, plan.download * 1e6)


def utilization(compute: float, communication: float) -> float:
  """The share of a round in which the devices train.

  >>> print(f'{utilization(20 * 60, 70):.3f}')
  0.945
  """
  return compute / (compute + communication)


def round_time(
  links: Links, compute: float, payload_bytes: float, peers: int
) -> Round:
  """A round in which `peers` count and each fetches all others directly.

  Args:
    links: of a peer.
    compute: seconds of its inner steps.
    payload_bytes: of one payload.
    peers: that count, this one among them.
  """
  upload = payload_bytes / links.upload
  return Round(compute, upload, (peers - 1) * payload_bytes / links.download)


class Gather(NamedTuple):
  """One way to hear `peers`: bytes that a peer fetches, seconds until it can.

  `seconds` is from the end of the inner steps: everybody's upload, what
  aggregators do on links like a peer's own, and the peer's fetch.
  """

  fetched: float
  seconds: float


def direct(links: Links, payload_bytes: float, peers: int) -> Gather:
  """Every peer fetches every other's payload."""
  fetched = (peers - 1) * payload_bytes
  return Gather(
    fetched, payload_bytes / links.upload + fetched / links.download
  )


def ways(
  config: config_lib.Config, links: Links, payload_bytes: float, peers: int
) -> dict[str, Gather]:
  """All ways to hear `peers`, by name."""
  params = llama.num_params(config.model)
  return {
    'directly': direct(links, payload_bytes, peers),
    'summed': aggregated(links, payload_bytes, peers, params, density(config)),
    'in a tree': tree(links, payload_bytes, peers),
  }


def union_density(density: float, peers: int) -> float:
  """The share of elements that at least one of `peers` sends.

  As if they chose independently: an upper bound where they agree.

  >>> print(f'{union_density(1 / 64, 20):.2f}')
  0.27
  """
  return -math.expm1(peers * math.log1p(-density))


def density(config: config_lib.Config) -> float:
  """The share of elements that a payload has."""
  compression = config.optim.compression
  height, width = compression.block
  if config.optim.method in ('diloco', 'ddp'):
    return 1.0
  return compression.k / (height * width)


def aggregate_bytes(params: int, density: float, peers: int) -> float:
  """Of the sum of all payloads: a bit an element, 16 for each that is set."""
  return params / 8 * (1 + 16 * union_density(density, peers))


def aggregated(
  links: Links,
  payload_bytes: float,
  peers: int,
  params: int,
  density: float,
  cores: float = 10e9 / 8 * 10,
) -> Gather:
  """Validators add everybody up and publish the sum, exactly.

  Args:
    links: of a peer.
    payload_bytes: of one.
    peers: that count.
    params: elements of the model.
    density: of a payload: the share of elements in it.
    cores: bytes a second of a validator; it splits the elements with others if
      one is not enough. Assumed 100 Gbit/s.
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
  """Groups of `fan_in` are added up and compressed again, level by level.

  At each level one of a group fetches the payloads of its group and sends
  one of the same size; all peers then fetch the last. Every compression loses
  something, which has to wait in an error feedback of its own: another
  algorithm, whose loss nobody has measured.
  """
  up, level = payload_bytes / links.upload, 0.0
  nodes = peers
  while nodes > 1:
    group = min(fan_in, nodes)
    level += (group - 1) * payload_bytes / links.download + up
    nodes = -(-nodes // fan_in)
  return Gather(payload_bytes, up + level + payload_bytes / links.download)
