"""The simulated wall-clock of a run, from its records and its inventory.

Every number is a pure function of the seed, the peer, and the round or the
time, so a wall-clock can be computed long after a run has ended.

A link delays a transfer by half a latency each way, sends lost bytes again, and
varies in speed from round to round by a log-normal factor of median 1. A peer
is away for whole hours, mostly in its night.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant import metrics
from covenant.models import llama
from covenant.plan import hardware
from covenant.plan import planner
from covenant.plan import timing

_DAY, _HOUR = 86_400.0, 3600.0


class Link(NamedTuple):
  """The link of one peer to the store."""

  upload: float  # bytes/s
  download: float
  latency: float = 0.0  # seconds, there and back
  jitter: float = 0.0  # standard deviation of the logarithm of the speed
  loss: float = 0.0  # share of bytes that have to be sent again
  churn: float = 0.0  # share of its time that the peer is away; at most half


class PeerTimes(NamedTuple):
  """The link of a uid, and the durations of its work."""

  link: Link
  train: float  # seconds of its inner steps
  outer: float  # seconds of the outer step, and of what is swapped for it


class PhaseSeconds(NamedTuple):
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
  peer: PeerTimes,
  sent: float,
  heard: float,
  agree: float,
  draw: Sequence[float] = (1.0, 1.0),
) -> PhaseSeconds:
  """Returns the seconds of each phase of a peer's round.

  Args:
    peer: the peer.
    sent: bytes of its payload.
    heard: bytes of the others' payloads.
    agree: seconds from the last upload to the decision.
    draw: factors of its upload and download rates; see `draws`.
  """
  link, (up, down) = peer.link, draw
  again = 1 / (1 - link.loss)
  return PhaseSeconds(
    peer.train,
    link.latency + sent * again / (link.upload * up),
    agree,
    link.latency + heard * again / (link.download * down),
    peer.outer,
  )


def draws(seed: int, uid: int, round_: int, jitter: float) -> Sequence[float]:
  """Returns the factors of a link's rates in a round, up and down."""
  if not jitter:
    return 1.0, 1.0
  return tuple(np.exp(jitter * _random(seed, uid, round_).normal(size=2)))


def is_there(seed: int, uid: int, time: float, churn: float) -> bool:
  """Returns True if a peer is there at a time, in seconds since the start.

  The probability of its absence is twice `churn` at its midnight and 0 at its
  noon; one draw decides for an hour.
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


def seconds(round_: Sequence[PhaseSeconds], overlap: bool = False) -> float:
  """Returns the length of a round of these peers; 0 without any.

  Without overlap a phase begins when every peer has ended the one before. With
  overlap the exchange of a round runs beside the training of the next, and only
  the outer step interrupts it.
  """
  if not round_:
    return 0.0
  if overlap:
    return max(max(p.train, p.exchange) + p.outer for p in round_)
  sent = max(p.train + p.upload for p in round_)
  agree = max(p.agree for p in round_)
  return sent + agree + max(p.gather + p.outer for p in round_)


def utilization(round_: Sequence[PhaseSeconds], overlap: bool = False) -> float:
  """Returns the mean share of a round in which peers train."""
  train = sum(p.train for p in round_) / len(round_)
  return train / seconds(round_, overlap)


class _Run(NamedTuple):
  """The traffic and the hardware of a peer in a published run."""

  params: float
  sent: float  # bytes per round
  heard: float  # bytes per round
  hardware: str


_SPARSE = 14 / 64 / 8  # bytes per parameter: 14 bits for one of 64
_RING = 2 * 13 / 14  # bytes per parameter: all-reduce, 8 bits, 14 peers
_RUNS = {
  'Covenant-72B': _Run(
    72.7e9, 72.7e9 * _SPARSE, 15.9 * 72.7e9 * _SPARSE, '8xB200'
  ),
  'INTELLECT-1': _Run(10.2e9, 10.2e9 * _RING, 10.2e9 * _RING, '8xH100'),
  'SparseLoCo 8B': _Run(
    8.05e9, 8.05e9 * _SPARSE, 14 * 8.05e9 * _SPARSE, '8xH200'
  ),
}


def published(name: str) -> tuple[PhaseSeconds, float]:
  """Returns a round of a published run, and the calibrated rate of its links.

  The rate is a multiple of 110 MB/s up and 500 MB/s down, with which transfers
  and the outer step take the reported time. The outer step is estimated by
  `outer_seconds`.

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
  peer = PeerTimes(link, reported.compute, outer)
  return phases(peer, run.sent, run.heard, 0.0), speed


def outer_seconds(params: float, device: hardware.Device) -> float:
  """Returns the seconds of the outer step of a device with `params` elements.

  Float32 parameters and momentum are loaded from host memory and stored again.
  """
  return 16 * params / device.host_link


def peers(config: config_lib.Config) -> tuple[PeerTimes, ...]:
  """Returns the peers of `config.plan.inventory` as planned, by uid.

  The head of a pipeline sends, and each stage fetches its part.

  Raises:
    ConfigError: there is no inventory, or no plan for it.
  """
  if not config.plan.inventory:
    raise config_lib.ConfigError(
      'plan.inventory: expected the hosts with their links, such as 4x4090 on '
      "200 Mb/s; got ''"
    )
  plan, found = planner.plan(config), []
  count, asked = llama.num_params(config.model), config.plan
  for work in plan.works:
    members = [
      (n, g) for n, g in zip(work.hosts, plan.groups, strict=True) if n
    ]
    latency = max(g.latency for _, g in members)
    devices = sum(n * g.size for n, g in members)
    share = count / (devices if work.kind == 'pipeline' else members[0][1].size)
    slowest = min((g.device for _, g in members), key=lambda d: d.host_link)
    # The payloads of all peers in the plan, even if no other peer is there.
    heard = max(plan.terms.others, 1) * plan.terms.payload
    gather = max(work.gather - latency, 0.0) or heard / (
      min(g.download for _, g in members)
    )
    found.append(
      PeerTimes(
        Link(
          plan.terms.payload / (work.upload - latency),
          heard / gather,
          latency,
          asked.jitter,
          asked.loss,
          asked.churn,
        ),
        work.computing,
        outer_seconds(share, slowest),
      )
    )
  return tuple(found)


def clock(
  config: config_lib.Config,
  records: Sequence[metrics.Round],
  overlap: bool = False,
) -> tuple[float, ...]:
  """Returns the simulated seconds of each round.

  The records say who trained and how much was sent. Uids without an island in
  the plan cost no time, and absent peers do not delay the others; a round
  without peers takes the time that the chain gives it.

  Args:
    config: the config of the run, with an inventory.
    records: consecutive rounds, from the first one.
    overlap: True if the exchange of a round runs beside the training of the
      next.
  """
  known, found, now = peers(config), [], 0.0
  block = config.network.block_seconds
  agree = config.phases.select_blocks * block
  for record in records:
    sent = record.bytes_round / max(len(record.uids), 1)
    heard = max(record.payloads - 1, 0) * sent
    taking_part = []
    for uid in record.uids:
      if uid >= len(known):
        continue
      link = known[uid].link
      if is_there(config.seed, uid, now, link.churn):
        draw = draws(config.seed, uid, record.round, link.jitter)
        taking_part.append(phases(known[uid], sent, heard, agree, draw))
    length = seconds(taking_part, overlap)
    found.append(length or config.phases.round_blocks * block)
    now += found[-1]
  return tuple(found)


class Pace(NamedTuple):
  """The rate of a planned network in which all peers are there."""

  tokens: int  # per round
  seconds: float  # per round
  utilization: float  # share of a round in which peers train


def pace(config: config_lib.Config, overlap: bool = False) -> Pace:
  """Returns the tokens and the seconds of a round of the planned inventory.

  All islands are there, and send payloads of the planned size.
  """
  plan, known = planner.plan(config), peers(config)
  agree = config.phases.select_blocks * config.network.block_seconds
  payload = plan.terms.payload
  heard = max(len(known) - 1, 0) * payload
  round_ = [phases(peer, payload, heard, agree) for peer in known]
  if not round_:
    raise config_lib.ConfigError(
      f'plan.inventory: expected hosts that make an island, got '
      f'{config.plan.inventory!r}'
    )
  return Pace(
    sum(work.tokens for work in plan.works),
    seconds(round_, overlap),
    utilization(round_, overlap),
  )


def without(config: config_lib.Config, peak: float) -> config_lib.Config:
  """Returns the config without devices of fewer FLOP/s than `peak`.

  Raises:
    ConfigError: no device is left.
  """
  plan, inventory = planner.plan(config), config.plan.inventory
  pieces = [
    piece
    for piece, group in zip(inventory.split(','), plan.groups, strict=True)
    if group.device.peak >= peak
  ]
  if not pieces:
    raise config_lib.ConfigError(
      f'plan.inventory: expected a device of {peak:g} FLOP/s or more, got '
      f'{inventory!r}'
    )
  return dataclasses.replace(
    config, plan=dataclasses.replace(config.plan, inventory=','.join(pieces))
  )


def tokens_to(curve: Sequence[tuple[float, float]], loss: float) -> float:
  """Returns the tokens at which a run reaches a loss, by interpolation.

  >>> tokens_to([(0, 4.0), (100, 2.0), (200, 1.0)], 1.5)
  150.0

  Args:
    curve: (tokens, loss) of its evaluations, in order.
    loss: the loss to reach.

  Raises:
    ValueError: the run never reached it.
  """
  if not curve or loss < min(value for _, value in curve):
    raise ValueError(f'expected a loss that the run has reached, got {loss}')
  i = next(i for i, (_, value) in enumerate(curve) if value <= loss)
  if not i:
    return float(curve[0][0])
  (a, high), (b, low) = curve[i - 1], curve[i]
  return a + (b - a) * (high - loss) / (high - low)


def seconds_to(
  config: config_lib.Config,
  curve: Sequence[tuple[float, float]],
  loss: float,
  overlap: bool = False,
) -> float:
  """Returns the simulated seconds until the planned network reaches a loss.

  Args:
    config: the config with the inventory.
    curve: (tokens, loss) of evaluations of a run with these islands.
    loss: the loss to reach.
    overlap: as in `clock`.

  Raises:
    ValueError: the run never reached it.
  """
  planned = pace(config, overlap)
  return tokens_to(curve, loss) / planned.tokens * planned.seconds
