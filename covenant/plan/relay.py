"""The traffic between the machines of a pipeline, which passes its head.

Stages are behind home routers, so all their connections go out to the head, the
machine that has the uid and the embeddings. What one stage sends to the next
passes the link of the head twice, in and out. Machines at one site use their
fabric instead.

Once per round each stage but the last sends the next one the fit of its
boundary, and the tokens that it was fitted to, one stage after the other
(covenant/train/pipeline/subspace.py); then the first step begins. At the end of
a round stages send the head their sections of the payload, which it uploads as
one, and each fetches its sections of the other payloads from the stores itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

from covenant.plan import hardware
from covenant.train.pipeline import subspace


class Ring(NamedTuple):
  """The hosts of a pipeline."""

  groups: Sequence[hardware.HostGroup]
  hosts: Sequence[int]  # per group
  head: int  # index of the group of the head
  near: bool  # all hosts are at one site

  @property
  def count(self) -> int:
    return sum(self.hosts)

  @property
  def hub(self) -> hardware.HostGroup:
    """The group of the head."""
    return self.groups[self.head]

  def stages(self) -> list[tuple[int, hardware.HostGroup]]:
    """Returns the hosts beside the head, by group."""
    pairs = enumerate(zip(self.hosts, self.groups, strict=True))
    found = [(n - (i == self.head), group) for i, (n, group) in pairs]
    return [(n, group) for n, group in found if n]


class Transfers(NamedTuple):
  """The transfers of one sequence, forward and back."""

  slot: float  # seconds of the busiest link
  life: float  # seconds of all transfers, one after the other
  sent: float  # bytes that leave hosts


def sequence(ring: Ring, crossing: float) -> Transfers:
  """Returns the transfers of a sequence.

  Args:
    ring: the hosts.
    crossing: bytes that pass a boundary, forward and back.
  """
  if ring.near:
    each = [
      crossing / (group.size * group.device.outside)
      for n, group in zip(ring.hosts, ring.groups, strict=True)
      if n
    ]
    return Transfers(max(each), ring.count * max(each), 0.0)
  hub, others = ring.hub, ring.count - 1
  relayed = others * crossing
  slot = relayed / min(hub.upload, hub.download)
  life = 0.0
  for n, group in ring.stages():
    slot = max(slot, crossing / min(group.upload, group.download))
    to, back = _legs(hub, group)
    life += n * (crossing * (to + back) + 2 * group.latency)
  return Transfers(slot, life, 2 * others * crossing)


class Fit(NamedTuple):
  """The fits of a round's boundaries."""

  seconds: float  # transfers, one after the other
  sent: float  # bytes that leave hosts


def fit(ring: Ring, width: int, rank: int, passed: float) -> Fit:
  """Returns the transfers of the fits of a round.

  Args:
    ring: the hosts.
    width: the width of the model.
    rank: numbers per position; without a rank nothing is fitted.
    passed: bytes of the fitted sequences' activations at one boundary.
  """
  if ring.near or not rank:
    return Fit(0.0, 0.0)
  size = subspace.fit_bytes(width, rank) + passed
  seconds = 0.0
  for n, group in ring.stages():
    to, back = _legs(ring.hub, group)
    seconds += n * (size * (to + back) + group.latency)
  # The last stage sends no fit.
  return Fit(seconds - size * to, (2 * ring.count - 3) * size)


def _legs(
  hub: hardware.HostGroup, group: hardware.HostGroup
) -> tuple[float, float]:
  """Returns the seconds per byte from a host to the head, and back."""
  return (
    1 / min(group.upload, hub.download),
    1 / min(hub.upload, group.download),
  )


class Sections(NamedTuple):
  """The payload of a pipeline, by its hosts: bytes of each host's section."""

  own: Sequence[float]  # of a host of each group, without the embeddings
  tables: float  # of the embeddings, which the head sends and all fetch


class Exchange(NamedTuple):
  """The exchange of a round with the network."""

  sent: float  # bytes to the store
  fetched: float  # bytes from the store, all hosts
  relayed: float  # bytes from stages to the head
  upload: float  # seconds
  gather: float  # seconds of the slowest host


def exchange(ring: Ring, sections: Sections, others: int) -> Exchange:
  """Returns the exchange of a round.

  Args:
    ring: the hosts.
    sections: the parts of the payload.
    others: the number of other payloads.
  """
  hub, relayed, slowest, gather, fetched = ring.hub, 0.0, 0.0, 0.0, 0.0
  parts = list(zip(ring.hosts, sections.own, ring.groups, strict=True))
  for n, own, group in parts:
    if n:
      # All hosts track the embeddings.
      size = others * (own + sections.tables)
      fetched += n * size
      gather = max(gather, size / group.download + group.latency)
  for n, group in ring.stages():
    own = sections.own[ring.groups.index(group)]
    relayed += n * own
    slowest = max(slowest, own / group.upload + group.latency)
  whole = relayed + sections.own[ring.head] + sections.tables
  if ring.near:
    slowest, inside = 0.0, 0.0
  else:
    slowest, inside = max(slowest, relayed / hub.download), relayed
  upload = slowest + whole / hub.upload + hub.latency
  return Exchange(whole, fetched, inside, upload, gather)
