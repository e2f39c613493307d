"""The phases of a round that can be kept on given hardware and links.

`times` has the seconds of everything that happens between two rounds, and
`least_phases` the fewest blocks in which it happens, by the schedule of
covenant/protocol/round.py. A node sees final blocks only: what it sends at a
block is in the next one after `plan.finality_blocks`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory
from covenant.plan import rates
from covenant.plan import timing
from covenant.plan import wallclock

_POLL = 0.5  # blocks until a node sees a new one


class PhaseTimes(NamedTuple):
  """Seconds of the parts of a round that are not inner steps."""

  step: float  # one inner step, which a round does not cut short
  compress: float
  seal: float  # encoding and digest of the own payload
  upload: float
  collect: float  # a validator's fetch, decoding and checks
  gather: float  # a miner's fetch and decoding
  one: float  # fetch and decoding of one payload
  outer: float  # outer step on the devices
  fingerprint: float  # beside the training, on the host


class LeastPhases(NamedTuple):
  """The fewest blocks of each phase that can be kept."""

  put: int
  select: int
  takeover: int


class RoundPlan(NamedTuple):
  """The time of a round, by its phases."""

  compute: float  # seconds that the devices train
  idle: float  # seconds that they do not
  vote: float  # seconds from the close of the put window to the last vote
  again: float  # seconds from the decision until its effect is trained on
  exchange: float  # seconds of early steps that hide the exchange
  seconds: float  # length of the round: its blocks, or more if they are too few

  @property
  def utilization(self) -> float:
    """The share of the round in which devices train."""
    return self.compute / self.seconds


def times(config: config_lib.Config, payload_bytes: int) -> PhaseTimes:
  """Estimates the seconds of the parts of a round from `config.plan`.

  Args:
    config: the config of the plan.
    payload_bytes: the size of a payload.
  """
  hardware = hardware_lib.parse(config.plan.hardware)
  links, device = timing.links_of(config.plan), hardware.device
  peers, params = config.plan.peers, llama.num_params(config.model)
  own = params / hardware.count  # elements of a device
  state = 4 * own * (1 + memory.outer_moments(config.optim))
  message = 3 * timing.density(config) * own  # decoded bytes of a device
  swapped = 12 * own / device.host_link if config.devices.offload else 0.0
  passes = 4 * own * rates.COMPRESS_PASSES / device.bandwidth
  outer = 4 * state / device.bandwidth
  if config.devices.offload:
    outer += wallclock.outer_seconds(own, device)

  def fetched(count: int) -> float:
    """Fetches and decodes side by side; the last payload is decoded alone."""
    size = count * payload_bytes
    parts = size / links.download, rates.decode_seconds(config, size)
    return max(parts) + rates.decode_seconds(config, payload_bytes)

  checks = peers * message / device.host_link
  step = timing.step(config, hardware).total
  if config.plan.compute_minutes:  # given for all steps
    step = 60 * config.plan.compute_minutes / config.optim.inner_steps
  return PhaseTimes(
    step,
    swapped + passes,
    rates.encode_seconds(config, payload_bytes),
    payload_bytes / links.upload,
    fetched(peers) + checks,
    fetched(max(peers - 1, 1)),
    fetched(1),
    outer + checks,
    rates.fingerprint_seconds(config, state * hardware.count),
  )


def least_phases(config: config_lib.Config, found: PhaseTimes) -> LeastPhases:
  """Returns the fewest blocks of the phases in which nodes keep them."""
  blocks = lambda seconds: math.ceil(seconds / _block_seconds(config))  # noqa: E731
  unsure, sent = config.phases.confirmations, _sent_blocks(config)
  # The step under way ends, the payload is made, and with overlap the next
  # round is begun before it is committed to.
  begun = unsure if config.optim.overlap else 0
  made = 1 + blocks(found.step + found.compress + found.seal) + begun
  # A payload follows its final commitment, and may take until it is collected.
  closes = 2 * unsure - 1
  put = made + sent + max(0, unsure + blocks(found.upload) - closes)
  # Half of the time to the decision is left to agree.
  collect, agree = blocks(found.collect), 2 * sent + unsure + 1
  select = closes + max(2 * collect, collect + agree)
  takeover = 2 * (sent + unsure + blocks(found.one))
  return LeastPhases(max(put, 2), max(select, 2 * unsure + 1), takeover)


def round_plan(config: config_lib.Config, found: PhaseTimes) -> RoundPlan:
  """Returns the time of a round with the phases of a config."""
  phases, block = config.phases, _block_seconds(config)
  unsure, sent = phases.confirmations, _sent_blocks(config)
  steps = config.optim.inner_steps * found.step
  compute = 60 * config.plan.compute_minutes or steps
  vote = (2 * unsure - 1 + 2 * sent + unsure + 1) * block + found.collect
  again = unsure * block + found.gather + found.outer
  made = found.compress + found.seal
  # From the end of training to the state after the round.
  exchange = (phases.put_blocks + phases.select_blocks + unsure) * block
  exchange += found.gather
  if config.optim.overlap:
    # Data of the next round are known when the put window's first block is
    # final; early steps run from then on.
    begin = max((unsure + _POLL) * block, made)
    exchange -= begin
    early = config.optim.overlap * found.step
    idle = begin + max(exchange - early, 0.0) + found.outer
  else:
    idle = max(exchange, made) + found.outer
  seconds = max(compute + idle, phases.round_blocks * block)
  return RoundPlan(compute, idle, vote, again, exchange, seconds)


def least_round(
  config: config_lib.Config,
) -> tuple[config_lib.Config, RoundPlan]:
  """Returns a config with the shortest round on its links, and its plan.

  Phases are the shortest that can be kept. With `optim.overlap` as many steps
  as hide the exchange are trained early, or all but one.
  """
  found = times(config, memory.shards(config).payload_bytes)
  least = least_phases(config, found)
  # A round must be longer than its phases; its length follows.
  phases = dataclasses.replace(
    config.phases,
    put_blocks=least.put,
    select_blocks=least.select,
    takeover_blocks=least.takeover,
    round_blocks=1 << 20,
  )
  optim = config.optim
  if optim.overlap:
    made = dataclasses.replace(config, phases=phases)
    hidden = math.ceil(round_plan(made, found).exchange / found.step)
    most = optim.inner_steps - 1
    optim = dataclasses.replace(optim, overlap=min(max(hidden, 1), most))
  made = dataclasses.replace(config, phases=phases, optim=optim)
  plan = round_plan(made, found)
  needed = math.ceil((plan.compute + plan.idle) / _block_seconds(config))
  phases = dataclasses.replace(
    phases,
    round_blocks=max(needed, _others(phases) + 1),
  )
  made = dataclasses.replace(made, phases=phases)
  return made, round_plan(made, found)


def problems(config: config_lib.Config, found: PhaseTimes) -> Iterator[str]:
  """Yields the phases that cannot be kept, with the numbers that would do."""
  least, phases = least_phases(config, found), config.phases
  why = {
    'put_blocks': (least.put, 'to commit to a payload and to upload it'),
    'select_blocks': (least.select, 'to fetch, decode and vote'),
    'takeover_blocks': (least.takeover, 'to follow another validator'),
  }
  for name, (needed, what) in why.items():
    if (given := getattr(phases, name)) < needed:
      yield f'phases.{name}: expected at least {needed} {what}, got {given}'
  plan = round_plan(config, found)
  block = _block_seconds(config)
  over = math.ceil((plan.compute + plan.idle) / block)
  if over > phases.round_blocks:
    yield (
      f'phases.round_blocks: expected at least {over} for '
      f'{plan.compute:.0f} s of training and {plan.idle:.0f} s without, got '
      f'{phases.round_blocks}'
    )


def _others(phases: config_lib.Phases) -> int:
  """Returns the length of all phases of a round but training."""
  return (
    phases.put_blocks
    + phases.select_blocks
    + phases.takeover_blocks
    + 2 * phases.confirmations
  )


def _block_seconds(config: config_lib.Config) -> float:
  return config.network.block_seconds


def _sent_blocks(config: config_lib.Config) -> int:
  """Returns the blocks from sending a commitment to seeing it final."""
  return 1 + config.plan.finality_blocks
