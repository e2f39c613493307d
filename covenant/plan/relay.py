"""The traffic of the stages of a pipeline, which passes its head.

Every device is a stage. Stages are behind home routers, so all their
connections go out to the head, the machine that has the uid and also the
device with the embeddings. What one stage sends to the next passes the link of
the head in and out; only the head's own stages are beside it. Machines at one
site use their fabric instead of the internet.

Once per round each stage but the last sends the next one the fit of its
boundary and the tokens that it was fitted to, one stage after the other
(covenant/train/pipeline/subspace.py); then the first step begins. At the end of
a round stages send the head their sections of the payload, which it uploads as
one. The head fetches all other payloads, which it verifies whole; each stage
fetches its sections of them from the stores, and those of the embeddings, which
all stages track.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from covenant.plan import hardware
from covenant.train.pipeline import boundary_bytes


class Ring(NamedTuple):
  """The hosts of a pipeline."""

  groups: Sequence[hardware.HostGroup]
  hosts: Sequence[int]  # per group
  head: int  # index of the group of the head
  near: bool  # all hosts are at one site

  @property
  def hub(self) -> 'Link':
    """The link of the head."""
    return self.link(self.groups[self.head])

  def link(self, group: hardware.HostGroup) -> 'Link':
    """Returns the link of a host of a group."""
    if self.near:
      fabric = group.size * group.device.outside
      return Link(fabric, fabric, 0.0)
    return Link(group.upload, group.download, group.latency)

  def others(self) -> Iterator[tuple[int, int, hardware.HostGroup]]:
    """Yields the index, the hosts beside the head, and each such group."""
    for i, (n, group) in enumerate(zip(self.hosts, self.groups, strict=True)):
      if count := n - (i == self.head):
        yield i, count, group

  @property
  def remote(self) -> int:
    """The number of stages that are not beside the head."""
    return sum(n * group.size for _, n, group in self.others())


class Link(NamedTuple):
  """The link of a host."""

  upload: float  # bytes/s
  download: float
  latency: float  # seconds, there and back

  def legs(self, hub: 'Link') -> tuple[float, float]:
    """Returns the seconds per byte to the head, and back."""
    return (
      1 / min(self.upload, hub.download),
      1 / min(hub.upload, self.download),
    )


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
  hub, life = ring.hub, 0.0
  slot = ring.remote * crossing / min(hub.upload, hub.download)
  for _, n, group in ring.others():
    link = ring.link(group)
    slot = max(slot, group.size * crossing / min(link.upload, link.download))
    to, back = link.legs(hub)
    # To the head and back, both ways.
    life += n * group.size * (crossing * (to + back) + 2 * link.latency)
  return Transfers(slot, life, 2 * ring.remote * crossing)


class Fit(NamedTuple):
  """The fits of a round's boundaries."""

  seconds: float  # transfers, one after the other
  sent: float  # bytes that leave hosts


def fit(ring: Ring, width: int, rank: int, passed: float) -> Fit:
  """Returns the transfers of the fits of a round.

  The last stage is beside the head; the first one receives no fit, if it is
  elsewhere.

  Args:
    ring: the hosts.
    width: the width of the model.
    rank: numbers per position.
    passed: bytes of the fitted sequences' activations at one boundary.
  """
  size, seconds = boundary_bytes.fit_bytes(width, rank) + passed, 0.0
  for _, n, group in ring.others():
    link = ring.link(group)
    seconds += n * group.size * (size * sum(link.legs(ring.hub)) + link.latency)
  return Fit(seconds, 2 * ring.remote * size)


class Sections(NamedTuple):
  """The payload of a pipeline, by its stages, in bytes."""

  own: Sequence[float]  # of a stage of each group, without the embeddings
  whole: float  # all of it
  tables: float  # of the embeddings, which all stages track


class Exchange(NamedTuple):
  """The exchange of a round with the network."""

  relayed: float  # bytes from stages to the head
  fetched: float  # bytes from the stores, by all hosts
  upload: float  # seconds
  gather: float  # seconds of the slowest host


def exchange(ring: Ring, sections: Sections, others: int) -> Exchange:
  """Returns the exchange of a round.

  Args:
    ring: the hosts.
    sections: the parts of the payload.
    others: the number of other payloads.
  """
  store = ring.groups[ring.head]
  hub, relayed, slowest = ring.hub, 0.0, 0.0
  fetched = others * sections.whole
  gather = fetched / store.download + store.latency
  for i, n, group in ring.others():
    link, own = ring.link(group), sections.own[i]
    sent = group.size * own
    theirs = group.size * others * (own + sections.tables)
    relayed += n * sent
    fetched += n * theirs
    slowest = max(slowest, sent / link.upload + link.latency)
    gather = max(gather, theirs / group.download + group.latency)
  upload = max(slowest, relayed / hub.download)
  upload += sections.whole / store.upload + store.latency
  return Exchange(relayed, fetched, upload, gather)
