"""Peers' links in virtual time: what every phase of a round takes.

All is a pure function of the seed, the peer, and the round or the time, so a
wall-clock can be drawn for a run that is long over. Seconds that come from here
are simulated, and are called so.

What a link does to a transfer: half a latency each way; bytes that are lost are
sent again; its speed varies from round to round, by a log-normal factor of
median 1. A peer is away for whole hours, mostly in its night.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covenant.plan import hardware
from covenant.plan import timing

_DAY, _HOUR = 86_400.0, 3600.0


class Link(NamedTuple):
  """Of one peer to the store."""

  upload: float  # bytes/s
  download: float
  latency: float = 0.0  # seconds, there and back
  jitter: float = 0.0  # standard deviation of the logarithm of the speed
  loss: float = 0.0  # share of bytes that have to be sent again
  churn: float = 0.0  # share of its time that the peer is away; at most half


class Peer(NamedTuple):
  """What a uid does in a round."""

  link: Link
  train: float  # seconds of its inner steps
  outer: float  # seconds of the outer step, and of what is swapped for it


class Phases(NamedTuple):
  """Seconds of one peer's round."""

  train: float
  upload: float
  agree: float
  gather: float
  outer: float

  @property
  def exchange(self) -> float:
    return self.upload + self.agree + self.gather


def phases(
  peer: Peer,
  sent: float,
  heard: float,
  agree: float,
  draw: Sequence[float] = (1.0, 1.0),
) -> Phases:
  """What a round takes a peer.

  Args:
    peer: whose.
    sent: bytes of its payload.
    heard: bytes of the others' payloads.
    agree: seconds from the last upload until it is known who counts.
    draw: factors of its speed up and down; see `draws`.
  """
  link, (up, down) = peer.link, draw
  again = 1 / (1 - link.loss)
  return Phases(
    peer.train,
    link.latency + sent * again / (link.upload * up),
    agree,
    link.latency + heard * again / (link.download * down),
    peer.outer,
  )


def draws(seed: int, uid: int, round_: int, jitter: float) -> Sequence[float]:
  """By which factors a peer's link is faster in a round, up and down."""
  if not jitter:
    return 1.0, 1.0
  return tuple(np.exp(jitter * _random(seed, uid, round_).normal(size=2)))


def there(seed: int, uid: int, time: float, churn: float) -> bool:
  """Whether a peer is there at a time, in seconds since the start.

  Its chance to be away is twice `churn` at its midnight and 0 at its noon;
  whether it is, is drawn once an hour.
  """
  if not churn:
    return True
  midnight = _random(seed, uid, -1).uniform()
  hour = math.floor(time / _HOUR)
  dark = 1 + math.cos(2 * math.pi * (hour * _HOUR / _DAY - midnight))
  return bool(_random(seed, uid, -2 - hour).uniform() >= churn * dark)


def _random(seed: int, uid: int, number: int) -> np.random.Generator:
  words = [seed, uid, abs(number), int(number < 0)]
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def seconds(round_: Sequence[Phases], overlap: bool = False) -> float:
  """The length of a round of all peers that are there; 0 if nobody is.

  Without overlap phases follow one another, and a phase of all begins when
  the last has ended that of before. With overlap the exchange of a round runs
  beside the training of the next, and only the outer step interrupts it.
  """
  if not round_:
    return 0.0
  if overlap:
    return max(max(p.train, p.exchange) + p.outer for p in round_)
  sent = max(p.train + p.upload for p in round_)
  agree = max(p.agree for p in round_)
  return sent + agree + max(p.gather + p.outer for p in round_)


def utilization(round_: Sequence[Phases], overlap: bool = False) -> float:
  """The share of a round in which peers train, on average."""
  train = sum(p.train for p in round_) / len(round_)
  return train / seconds(round_, overlap)


class _Run(NamedTuple):
  """What peers of a published run sent and held (reference/papers.md 1, 2)."""

  params: float
  sent: float  # bytes a peer and round
  heard: float
  hardware: str


_SPARSE = 14 / 64 / 8  # bytes a parameter: one of 64 values, of 14 bits
_RING = 2 * 13 / 14  # bytes a parameter: an all-reduce of 8 bits among 14
_RUNS = {
  'Covenant-72B': _Run(
    72.7e9, 72.7e9 * _SPARSE, 15.9 * 72.7e9 * _SPARSE, '8xB200'
  ),
  'INTELLECT-1': _Run(10.2e9, 10.2e9 * _RING, 10.2e9 * _RING, '8xH100'),
  'SparseLoCo 8B': _Run(
    8.05e9, 8.05e9 * _SPARSE, 14 * 8.05e9 * _SPARSE, '8xH200'
  ),
}


def published(name: str) -> tuple[Phases, float]:
  """A round of a published run, and how fast its links must have been.

  Calibrated by one number: the speed of its links as a multiple of 110 MB/s up
  and 500 MB/s down, so that the transfers and the outer step take what was
  reported. The outer step is reckoned; see `outer_seconds`.

  >>> round_, speed = published('Covenant-72B')
  >>> print(f'{utilization([round_]):.3f} {speed:.2f}')
  0.945 1.20
  """
  reported, run = timing.PUBLISHED[name], _RUNS[name]
  hosts = hardware.parse(run.hardware)
  outer = outer_seconds(run.params / hosts.count, hosts.device)
  left = reported.communication - outer
  speed = (run.sent / 110e6 + run.heard / 500e6) / left
  link = Link(110e6 * speed, 500e6 * speed)
  peer = Peer(link, reported.compute, outer)
  return phases(peer, run.sent, run.heard, 0.0), speed


def outer_seconds(params: float, device: hardware.Device) -> float:
  """Of the outer step of a device that holds so many parameters.

  Parameters and momentum, in float32, come from host memory and go back.
  """
  return 16 * params / device.host_link
