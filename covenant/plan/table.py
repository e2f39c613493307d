"""The plan of a config as a page of text.

'~' marks estimates and assumptions; other numbers are counted or read from a
compiled program.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import costs
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory
from covenant.plan import role_table
from covenant.plan import timing

_PEERS = (20, 100, 1000)


class Program(NamedTuple):
  """The compilation result of one program (covenant/plan/compile.py)."""

  name: str
  platform: str  # the compiler's; empty if only lowered
  lower_seconds: float
  compile_seconds: float = 0.0
  argument_bytes: int = 0  # per device
  temporary_bytes: int = 0  # per device; 0 if the compiler does not report it
  collectives: dict[str, tuple[int, int]] = {}  # count, elements of the largest
  error: str = ''  # why the compiler refused it


class _Plan(NamedTuple):
  """The inputs that all sections of the page share."""

  config: config_lib.Config
  hardware: hardware_lib.Hardware
  cut: memory.Shards
  step: timing.Step

  @property
  def steps_seconds(self) -> float:
    """Seconds of the inner steps of a round."""
    return self.config.optim.inner_steps * self.step.total

  @property
  def compute_seconds(self) -> float:
    """Seconds of a round reserved for computing."""
    return 60 * self.config.plan.compute_minutes or self.steps_seconds


def text(config: config_lib.Config, programs: Sequence[Program] = ()) -> str:
  """Returns the page of a plan.

  Args:
    config: the config, with `devices.data` above 0; see `hardware.resolve`.
    programs: its compiled programs, if any.

  Raises:
    ConfigError: the mesh, the model and the hardware do not match.
  """
  hardware = hardware_lib.check(config)
  plan = _Plan(
    config, hardware, memory.shards(config), timing.step(config, hardware)
  )
  sections = (
    _model(plan),
    _memory(plan),
    role_table.of_roles(config),
    _programs(plan, programs),
    _round(plan),
    role_table.of_phases(config),
    _costs(plan),
    _gathers(plan),
    _published(),
    textwrap.wrap(verdict(config), 79),
    textwrap.wrap(role_table.answer(config).text, 79),
  )
  pages = ('\n'.join(section) for section in sections)
  return '\n\n'.join(page for page in pages if page)


def verdict(config: config_lib.Config) -> str:
  """Returns one sentence: whether the config fits, or what would help."""
  worst, limit = memory.largest_phase(config), memory.limit(config)
  needs = (
    f'{worst.name} needs ~{_gb(worst.total)} of the {_gb(limit)} GB of a device'
  )
  if worst.total <= limit:
    return f'{config.name} FITS on {config.plan.hardware}: {needs}.'
  knobs = memory.knobs(config)
  help_ = 'With ' + ' '.join(f'--config.{knob}' for knob in knobs) + ' it fits.'
  return f'{config.name} DOES NOT FIT on {config.plan.hardware}: {needs}. ' + (
    help_ if knobs else 'No knob helps: it needs larger devices.'
  )


def _model(plan: _Plan) -> Iterator[str]:
  config, (count, name, device) = plan.config, plan.hardware
  params = llama.num_params(config.model)
  mesh, flops = config.devices, timing.flops(config)
  size, times = memory.microbatch(config)
  step = plan.step
  yield f'{config.name}: {params:,} parameters'
  yield from _rows(
    (
      'hardware',
      f'{count} x {name} on {_many(plan.hardware.hosts, "host")}, each '
      f'{device.memory / 1e9:.0f} GB, {device.peak / 1e12:,.0f} bf16 TFLOP/s',
    ),
    ('source', device.source),
    (
      'mesh',
      f'data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}: '
      f'{plan.cut.params:,} parameters a device',
    ),
    (
      'inner step',
      f'{config.optim.inner.batch_size} x {config.data.context} = '
      f'{timing.tokens(config):,} tokens; a device has '
      f'{_many(times, "microbatch", "es")} of {size}',
    ),
    (
      'arithmetic',
      f'{flops.total:.3g} FLOP: 6 x parameters x tokens = '
      f'{flops.weights:.3g}, and attention',
    ),
    (
      'time',
      f'~{step.total:.1f} s: arithmetic ~{step.compute:.1f} s, at '
      f'~{config.plan.peak_fraction:.2f} of the peak',
    ),
    (
      '',
      f'beside it weights and gradients ~{step.parameters:.1f} s, at '
      f'{plan.hardware.link / 1e9:.0f} GB/s a device',
    ),
  )
  if step.activations:
    yield f'{"":15}and between it activations ~{step.activations:.1f} s'
  if mesh.fsdp * mesh.tensor > device.per_host:
    hosts = -(-mesh.fsdp * mesh.tensor // device.per_host)
    yield f'  a copy of the parameters spans {hosts} hosts'


def _memory(plan: _Plan) -> Iterator[str]:
  config = plan.config
  there = list(memory.phases(config, plan.cut, offload=False))
  away = list(memory.phases(config, plan.cut, offload=True))
  limit, offload = memory.limit(config), config.devices.offload
  yield 'GB of a device    all on it   with offload   and in host memory'
  for kept, moved in zip(there, away, strict=True):
    marks = [_mark(p.total, limit) for p in (kept, moved)]
    yield (
      f'  {kept.name:14}{"~" + _gb(kept.total):>9} {marks[0]}   '
      f'{"~" + _gb(moved.total):>9} {marks[1]}   '
      f'{_gb(sum(moved.host.values())):>15}'
    )
  worst = memory.largest_phase(config)
  parts = [f'{k} {_gb(v)}' for k, v in worst.device.items() if v]
  yield from _wrapped(f'  {worst.name}{", offloaded" * offload}: ', parts)
  parts = [f'{k} {_gb(v)}' for k, v in memory.activations(config).items()]
  yield from _wrapped('  ~activations: ', parts)
  host = max(sum(phase.host.values()) for phase in away) * plan.cut.devices
  yield (
    f'  x: above {_gb(limit)} GB, ~{config.plan.memory_fraction:.2f} of a '
    f'device (plan.memory_fraction)'
  )
  yield (
    f'  devices.offload is {str(offload).lower()}; with it a host holds '
    f'{_gb(host / plan.hardware.hosts)} GB'
  )
  yield (
    f'  a checkpoint on disk, with all private state: '
    f'{_gb(memory.checkpoint_bytes(config))} GB'
  )


def _programs(plan: _Plan, programs: Sequence[Program]) -> Iterator[str]:
  if not programs:
    return
  yield (
    f'programs, {_many(plan.cut.devices, "device")}     lowered    compiled   '
    'GB a device that it takes'
  )
  for program in programs:
    line = f'  {program.name:25}{program.lower_seconds:5.1f} s'
    if program.platform:
      line += f'{program.compile_seconds:8.1f} s {program.platform}'
    if program.argument_bytes:
      line += f'{_gb(program.argument_bytes):>10}'
    if program.temporary_bytes:
      line += f' + {_gb(program.temporary_bytes)} beside it'
    yield line
    if program.error:
      yield f'    refused: {program.error}'
    moved = [
      f'{count} {kind} <= {elements:,}'
      for kind, (count, elements) in program.collectives.items()
    ]
    if moved:
      yield from _wrapped('    ', moved)
  if any(program.collectives for program in programs):
    yield '  <= elements of the largest; what is in a loop counts once'


def _round(plan: _Plan) -> Iterator[str]:
  config, links = plan.config, timing.links_of(plan.config.plan)
  asked, payload = config.plan, plan.cut.payload_bytes
  times = timing.round_time(links, plan.compute_seconds, payload, asked.peers)
  params = llama.num_params(config.model)
  seconds = config.network.block_seconds
  length = config.phases.round_blocks * seconds
  bits = 8 * payload / (params * timing.density(config))
  window = f', given {asked.compute_minutes:g} min' * bool(
    asked.compute_minutes
  )
  yield f'a round of {asked.peers} peers'
  yield from _rows(
    (
      'payload',
      f'{size_text(payload)} up: {bits:.2f} bits a value sent, '
      f'1/{4 * params / payload:.0f} of float32',
    ),
    (
      'gather',
      f'{size_text((asked.peers - 1) * payload)} down: the others, directly',
    ),
    (
      'links',
      f'~{asked.upload:,.0f} MB/s up, ~{asked.download:,.0f} MB/s down; '
      'megabytes, not megabits',
    ),
    (
      'time',
      f'{config.optim.inner_steps} steps in '
      f'~{plan.steps_seconds / 60:.1f} min{window}; '
      f'{times.upload:.1f} s up, {times.gather:.1f} s down',
    ),
    ('utilization', f'~{100 * times.utilization:.1f} %, transfers alone'),
    (
      'chain',
      f'{config.phases.round_blocks} blocks of {seconds:g} s = '
      f'{length / 60:.1f} min',
    ),
  )
  if 0 < asked.compute_minutes < plan.steps_seconds / 60:
    yield (
      f'{"":15}too slow: more devices, or fewer optim.inner_steps, by '
      f'{1 - plan.compute_seconds / plan.steps_seconds:.0%}'
    )


def _costs(plan: _Plan) -> Iterator[str]:
  asked, payload = plan.config.plan, plan.cut.payload_bytes
  links = timing.links_of(asked)
  times = timing.round_time(links, plan.compute_seconds, payload, asked.peers)
  fetched = (asked.peers - 1) * payload
  if plan.config.optim.overlap:  # beside the training
    times = times._replace(upload=0.0, gather=0.0)
  lines = [*costs.rows(plan.config, plan.hardware.count, times, fetched)]
  if lines:
    yield 'costs of a peer'
    yield from _rows(*lines)


def _gathers(plan: _Plan) -> Iterator[str]:
  config, links = plan.config, timing.links_of(plan.config.plan)
  yield 'to hear       directly              ~summed              ~in a tree'
  for peers in _PEERS:
    ways = timing.ways(config, links, plan.cut.payload_bytes, peers)
    line = f'  {peers:4} peers'
    for way in ways.values():
      share = timing.utilization(plan.compute_seconds, way.seconds)
      line += (
        f' {size_text(way.fetched):>8}{way.seconds:6.0f} s{100 * share:3.0f} %'
      )
    yield line
  yield '  bytes that a peer fetches, seconds from its last step, utilization'
  yield '  summed: exactly, by validators with 100 Gbit/s; random choices'
  yield '  in a tree: by groups of 20, compressed again at each level: lossy'


def _published() -> Iterator[str]:
  yield 'utilization of published rounds, by the same formula'
  for name, run in timing.PUBLISHED.items():
    share = timing.utilization(run.compute, run.communication)
    yield (
      f'  {name:15}{run.compute / 60:5.1f} min computing, '
      f'{run.communication:3.0f} s of transfers: {100 * share:.1f} %'
    )


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
  for name, value in rows:
    yield f'  {name:13}{value}'


def _wrapped(head: str, parts: Iterable[str]) -> Iterator[str]:
  """Yields `head` and the parts, wrapped at 79 characters."""
  line = head
  for i, part in enumerate(parts):
    more = f', {part}' if i else part
    if len(line) + len(more) > 79:
      yield line + ','
      line, more = '    ', part
    line += more
  yield line


def _many(count: int, noun: str, plural: str = 's') -> str:
  return f'{count} {noun}{"" if count == 1 else plural}'


def _mark(size: float, limit: float) -> str:
  return 'x' if size > limit else ' '


def _gb(size: float) -> str:
  return f'{size / 1e9:,.1f}'


def size_text(size: float) -> str:
  """Formats bytes with a unit.

  >>> size_text(1_378_903_642), size_text(24.0e12)
  ('1.38 GB', '24 TB')
  """
  return metric(size, 'B')


def metric(number: float, unit: str = '') -> str:
  """Formats a number with a prefix of powers of 1000, and a unit.

  >>> metric(12_190_000), metric(960), metric(200e6, 'b/s')
  ('12.2 M', '960', '200 Mb/s')
  """
  for prefix in ('', 'k', 'M', 'G', 'T'):
    if number < 1000 or prefix == 'T':
      break
    number /= 1000
  digits = f'{number:.3g}' if number < 1000 else f'{number:,.0f}'
  return f'{digits} {prefix}{unit}'.rstrip()
