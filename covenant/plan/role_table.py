"""The sections of a plan about all roles, and about phases that can be kept."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory
from covenant.plan import phase_times
from covenant.plan import rates
from covenant.plan import roles

# The published links of Covenant-72B, read as megabits.
_MEGABITS = {'upload': 110 / 8, 'download': 500 / 8}


class Answer(NamedTuple):
  """The possibility of a round, and the reasons against it."""

  problems: tuple[str, ...]

  @property
  def text(self) -> str:
    if not self.problems:
      return 'a round is possible: yes'
    return 'a round is possible: no: ' + '; '.join(self.problems)


def answer(config: config_lib.Config) -> Answer:
  """Returns whether every role of a config can do its part of a round."""
  found = phase_times.times(config, memory.shards(config).payload_bytes)
  limit = memory.limit(config)
  problems = [*phase_times.problems(config, found)]
  worst = memory.largest_phase(config)
  of_roles = {f'miner, {worst.name}': worst.total} | {
    f'{phase.role}, {phase.name}': phase.device_bytes
    for phase in roles.phases(config)
  }
  problems += [
    f'{name}: needs ~{size / 1e9:,.1f} of the {limit / 1e9:,.1f} GB of a device'
    for name, size in of_roles.items()
    if size > limit
  ]
  length = config.phases.round_blocks * config.network.block_seconds
  busy = {p.name: p.seconds for p in roles.of_role(config, 'validator')}
  publish = busy.pop('publish')
  if sum(busy.values()) > length:
    problems.append(
      f'validator: its phases take ~{sum(busy.values()):.0f} s of the '
      f'{length:.0f} s of a round (phases.round_blocks)'
    )
  if publish > length * config.checkpoint.publish:
    needed = -(-publish // length)
    problems.append(
      f'checkpoint.publish: expected at least {needed:.0f}, as a checkpoint '
      f'takes ~{publish:.0f} s, got {config.checkpoint.publish}'
    )
  return Answer(tuple(problems))


def of_roles(config: config_lib.Config) -> Iterator[str]:
  """Yields the table of what each role needs in each phase."""
  limit = memory.limit(config)
  hosts = hardware_lib.parse(config.plan.hardware).hosts
  yield (
    'roles                    GB a device    GB of a host    GB of disk     '
    'seconds'
  )
  yield _miner(config, hosts)
  for phase in roles.phases(config):
    mark = 'x' if phase.device_bytes > limit else ' '
    yield (
      f'  {phase.role:10}{phase.name:14}{_gb(phase.device_bytes):>10} {mark}'
      f'{_gb(phase.host_bytes):>16}{_gb(phase.disk_bytes):>14}'
      f'{f"~{phase.seconds:,.0f}":>12}'
    )
  yield (
    '  a host also runs the processes of the system; publish runs beside the '
    'rounds'
  )


def _miner(config: config_lib.Config, hosts: int) -> str:
  """Returns the line of a miner, whose phases have a table of their own."""
  cut = memory.shards(config)
  found = list(memory.phases(config, cut, config.devices.offload))
  most = max(phase.total for phase in found)
  host = max(sum(phase.host.values()) for phase in found)
  host = host * cut.devices / hosts + roles.BASE
  disk = memory.checkpoint_bytes(config) * (config.checkpoint.keep + 1)
  mark = 'x' if most > memory.limit(config) else ' '
  return (
    f'  {"miner":10}{"largest":14}{_gb(most):>10} {mark}{_gb(host):>16}'
    f'{_gb(disk):>14}{"":>12}'
  )


def of_phases(config: config_lib.Config) -> Iterator[str]:
  """Yields what the phases of a round need and have, and what is left."""
  found = phase_times.times(config, memory.shards(config).payload_bytes)
  least = phase_times.least_phases(config, found)
  plan = phase_times.round_plan(config, found)
  phases, asked = config.phases, config.plan
  block = config.network.block_seconds
  whole = -(-(plan.compute + plan.idle) // block)
  yield (
    f'phases, in blocks of {block:g} s          needed     given, of '
    f'{asked.peers} payloads'
  )
  for name, needed, what in (
    ('put_blocks', least.put, f'upload ~{found.upload:.1f} s'),
    ('select_blocks', least.select, f'fetch, decode ~{found.collect:.1f} s'),
    ('takeover_blocks', least.takeover, 'follow another validator'),
    ('round_blocks', int(whole), f'~{plan.idle:.0f} s without training'),
  ):
    given = getattr(phases, name)
    mark = 'x' if given < needed else ' '
    yield f'  {name:30}{f"~{needed}":>11}{given:>10} {mark} {what}'
  yield from _rows(
    (
      'time to vote',
      f'~{plan.vote:.0f} s from the close of the put window to the last vote',
    ),
    (
      'to train again',
      f'~{plan.again:.0f} s from the decision: fetch ~{found.gather:.0f} s, '
      f'outer step ~{found.outer:.1f} s',
    ),
    ('overlap', _overlap(config, found, plan)),
    (
      'utilization',
      f'~{100 * plan.utilization:.1f} % of {plan.seconds / 60:.1f} min, with '
      'votes, decoding and applying',
    ),
  )
  yield from _of_megabits(config)
  yield from _rows(
    ('assumed', f'~{asked.cores} cores a host (plan.cores);'),
    ('', f'{rates.ASSUMED};'),
    ('', f'final blocks ~{asked.finality_blocks} late (plan.finality_blocks);'),
    ('', 'all cores, and all links, as fast together as alone;'),
    ('', f'{rates.COMPRESS_PASSES} passes over memory to compress; no loss'),
  )


def _overlap(
  config: config_lib.Config,
  found: phase_times.PhaseTimes,
  plan: phase_times.RoundPlan,
) -> str:
  steps = config.optim.overlap
  if not steps:
    return (
      f'none: devices wait ~{plan.exchange:.0f} s for the exchange '
      '(optim.overlap)'
    )
  return (
    f'{steps} early steps, ~{steps * found.step:.0f} s, beside an exchange of '
    f'~{plan.exchange:.0f} s'
  )


def _of_megabits(config: config_lib.Config) -> Iterator[str]:
  """Yields what is left on links of megabits, with the shortest phases."""
  slow = dataclasses.replace(config.plan, **_MEGABITS)
  if slow.download >= config.plan.download:
    return
  made, plan = phase_times.least_round(dataclasses.replace(config, plan=slow))
  phases, overlap = made.phases, made.optim.overlap
  yield from _rows(
    (
      'at 500 Mb/s',
      f'~{100 * plan.utilization:.1f} %, with 110 Mb/s up and the phases that '
      'hold then:',
    ),
    (
      '',
      f'put {phases.put_blocks}, select {phases.select_blocks}, '
      f'takeover {phases.takeover_blocks}, round {phases.round_blocks}, '
      f'overlap {overlap}',
    ),
  )


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
  for name, value in rows:
    yield f'  {name:15}{value}'


def _gb(size: float) -> str:
  return f'~{size / 1e9:,.1f}'
