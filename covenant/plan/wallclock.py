"""The simulated wall-clock of a run, from its records and its inventory."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant import metrics
from covenant.models import llama
from covenant.plan import planner
from covenant.plan import simulated_links


def peers(config: config_lib.Config) -> tuple[simulated_links.Peer, ...]:
  """By uid, as `config.plan.inventory` is planned.

  A peer's link is what its hosts' are together: of a pipeline, each sends and
  fetches its part.

  Raises:
    ConfigError: there is no inventory, or no plan of it.
  """
  if not config.plan.inventory:
    raise config_lib.ConfigError(
      'plan.inventory: expected whose links there are, such as 4x4090 on '
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
    # Of all payloads that the plan reckons with, even if nobody else is there.
    heard = max(plan.terms.others, 1) * plan.terms.payload
    gather = max(work.gather - latency, 0.0) or heard / (
      min(g.download for _, g in members)
    )
    found.append(
      simulated_links.Peer(
        simulated_links.Link(
          plan.terms.payload / (work.upload - latency),
          heard / gather,
          latency,
          asked.jitter,
          asked.loss,
          asked.churn,
        ),
        work.computing,
        simulated_links.outer_seconds(share, slowest),
      )
    )
  return tuple(found)


def clock(
  config: config_lib.Config,
  records: Sequence[metrics.Round],
  overlap: bool = False,
) -> tuple[float, ...]:
  """Simulated seconds of each of the rounds.

  Who trained in a round, and what they sent, is the record's. Uids that the
  plan has no island for, such as those of more miners, cost no time. Who is
  away by its link's churn does not delay the others; a round of nobody lasts
  as long as the chain gives it.

  Args:
    config: of the run, with an inventory.
    records: of consecutive rounds, the first first.
    overlap: the exchange of a round runs beside the training of the next.
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
      if simulated_links.there(config.seed, uid, now, link.churn):
        draw = simulated_links.draws(
          config.seed, uid, record.round, link.jitter
        )
        taking_part.append(
          simulated_links.phases(known[uid], sent, heard, agree, draw)
        )
    length = simulated_links.seconds(taking_part, overlap)
    found.append(length or config.phases.round_blocks * block)
    now += found[-1]
  return tuple(found)


class Pace(NamedTuple):
  """A planned network, undisturbed."""

  tokens: int  # a round
  seconds: float  # a round
  utilization: float


def pace(config: config_lib.Config, overlap: bool = False) -> Pace:
  """What a round of the planned inventory trains and takes.

  All islands are there, and send payloads of the planned size.
  """
  plan, known = planner.plan(config), peers(config)
  agree = config.phases.select_blocks * config.network.block_seconds
  payload = plan.terms.payload
  heard = max(len(known) - 1, 0) * payload
  round_ = [
    simulated_links.phases(peer, payload, heard, agree) for peer in known
  ]
  if not round_:
    raise config_lib.ConfigError(
      f'plan.inventory: no island comes of {config.plan.inventory!r}'
    )
  return Pace(
    sum(work.tokens for work in plan.works),
    simulated_links.seconds(round_, overlap),
    simulated_links.utilization(round_, overlap),
  )


def without(config: config_lib.Config, peak: float) -> config_lib.Config:
  """The same inventory without devices of fewer FLOP/s than `peak`.

  Raises:
    ConfigError: nothing is left.
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
  """Tokens after which a run is at a loss, between its evaluations linearly.

  >>> tokens_to([(0, 4.0), (100, 2.0), (200, 1.0)], 1.5)
  150.0

  Args:
    curve: (tokens, loss) of its evaluations, in order.
    loss: to be reached.

  Raises:
    ValueError: the run never was there.
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
  """Simulated seconds until the planned network is at a loss.

  Args:
    config: with the inventory.
    curve: (tokens, loss) of evaluations, of a run of these islands.
    loss: to be reached.
    overlap: as in `clock`.

  Raises:
    ValueError: the run never was there.
  """
  planned = pace(config, overlap)
  return tokens_to(curve, loss) / planned.tokens * planned.seconds
