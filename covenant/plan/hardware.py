"""Accelerators with their published specifications, and inventories of them.

The table holds peak numbers. The fraction that training reaches is an
assumption of the plan (`plan.peak_fraction`).

`parse_inventory` reads `plan.inventory`, such as '8xB200, 64xA100 in pairs'. A
piece names a count and a kind of device, followed by optional clauses in any
order:

  in pairs, in threes, in fours, in sixes, in eights, alone
      devices per host; hosts are joined by the internet only
  on 200 Mb/s, on 1 Gb/s / 300 Mb/s up
      internet link of a host: download, and upload if different
  with 24 GB, with 40 ms, with 80 TFLOP/s
      memory, latency and peak of a device, instead of the listed values
  with 64 GB RAM
      memory of a host, instead of the listed value for each of its devices
  at $2.10
      price of a device-hour, instead of `plan.device_price`

Mb/s are megabits, as internet providers count; the defaults `plan.upload` and
`plan.download` are megabytes. Data-center devices without a clause on hosts
fill hosts at one site; consumer cards have one host each. The kind 'any' needs
its peak and memory stated.
"""

import dataclasses
import re
from typing import NamedTuple

from covenant import config as config_lib

LATENCY = 0.05  # default round-trip time in seconds; assumed
_AT_HOME = ('5090', '4090', '3090')
_WORDS = {'pairs': 2, 'threes': 3, 'fours': 4, 'sixes': 6, 'eights': 8}
_PREFIX = {'': 1.0, 'k': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
_SPEED = r'(\d+(?:\.\d+)?)\s*([kMG]?)b/s'
_PIECE = re.compile(r'([1-9]\d*)\s*x\s*([\w-]+)\s*')
_HOSTS = re.compile(r'in\s+(\w+)\s*|alone\s*')
_LINK = re.compile(rf'on\s+{_SPEED}\s*(?:/\s*{_SPEED}\s+up\s*)?')
_WITH = re.compile(
  r'with\s+(\d+(?:\.\d+)?)\s*(?:([kMGT]?)(B\s+RAM|B|FLOP/s)|ms)\s*'
)
_PRICE = re.compile(r'at\s+\$(\d+(?:\.\d+)?)\s*')
_HOW = (
  'expected such as 64xA100 in pairs on 1 Gb/s / 300 Mb/s up with 40 GB, '
  'where Mb/s are megabits'
)


class Device(NamedTuple):
  """One accelerator; 1 GB is 10^9 bytes, link rates are per direction."""

  memory: float  # bytes
  peak: float  # bfloat16 FLOP/s, dense, float32 sums
  bandwidth: float  # device memory bandwidth, bytes/s
  inside: float  # link to devices of the same host, bytes/s
  outside: float  # link to devices of other hosts, bytes/s; assumed
  host_link: float  # link to host memory, bytes/s
  per_host: int  # devices per host
  host_memory: float  # of a host, bytes per device; assumed
  source: str


def _make(
  memory,
  tflops,
  bandwidth,
  inside,
  host_link,
  source,
  outside=50,
  per_host=8,
  host_memory=256,
):
  """Returns a device from GB, TFLOP/s and GB/s.

  The default `outside` is one 400 Gbit/s port per device, the default
  `host_memory` 2 TB per host of eight.
  """
  return Device(
    memory * 1e9,
    tflops * 1e12,
    bandwidth * 1e9,
    inside * 1e9,
    outside * 1e9,
    host_link * 1e9,
    per_host,
    host_memory * 1e9,
    source,
  )


# Consumer cards use PCIe inside a host. Between hosts a home or office network
# of 10 Gbit/s is assumed, and 64 GB of host memory. One interconnect joins all
# TPU chips of a slice.
DEVICES = {
  'B300': _make(288, 2250, 8000, 900, 64, 'NVIDIA HGX B300 page'),
  'B200': _make(192, 2250, 8000, 900, 64, 'NVIDIA HGX B200 data sheet; '
                '192 GB as Templar names it'),
  'H200': _make(141, 989, 4800, 450, 64, 'NVIDIA H200 SXM data sheet'),
  'H100': _make(80, 989, 3350, 450, 64, 'NVIDIA H100 SXM data sheet'),
  'A100': _make(80, 312, 2039, 300, 32, 'NVIDIA A100 80GB SXM data sheet'),
  'A100-40': _make(40, 312, 1555, 300, 32, 'NVIDIA A100 40GB SXM data sheet'),
  'L40S': _make(48, 362, 864, 32, 32, 'NVIDIA L40S data sheet', 12.5, 8, 128),
  '5090': _make(32, 209, 1792, 64, 64, 'NVIDIA Blackwell RTX whitepaper',
                1.25, 8, 64),
  '4090': _make(24, 165, 1008, 32, 32, 'NVIDIA Ada whitepaper', 1.25, 8, 64),
  '3090': _make(24, 71, 936, 32, 32, 'NVIDIA Ampere GA102 whitepaper',
                1.25, 8, 64),
  'v5e': _make(16, 197, 819, 100, 32, 'Google Cloud TPU v5e page', 100, 4, 48),
  'v5p': _make(95, 459, 2765, 300, 32, 'Google Cloud TPU v5p page',
                300, 4, 112),
  'v6e': _make(32, 918, 1640, 224, 32, 'Google Cloud TPU v6e page',
                224, 4, 180),
}  # fmt: skip


def peak_of(kind: str) -> float | None:
  """Returns the peak FLOP/s of a device by JAX's name of it; None: unknown.

  >>> peak_of('NVIDIA H100 80GB HBM3') == DEVICES['H100'].peak
  True
  """
  words = kind.lower().replace('tpu ', '').replace(' lite', 'e')
  fits = [name for name in DEVICES if name.lower() in words]
  return DEVICES[max(fits, key=len)].peak if fits else None


class Hardware(NamedTuple):
  """The devices of one peer."""

  count: int
  name: str
  device: Device

  @property
  def hosts(self) -> int:
    return -(-self.count // self.device.per_host)

  @property
  def link(self) -> float:
    """The rate between a device and all others of the peer, bytes/s."""
    return self.device.outside if self.hosts > 1 else self.device.inside


def parse(text: str) -> Hardware:
  """Parses `plan.hardware`.

  >>> parse('16xB200').hosts
  2

  Raises:
    ConfigError: the device kind is unknown; lists the known kinds.
  """
  match = re.fullmatch(r'([1-9]\d*)x(.+)', text)
  names = {name.lower(): name for name in DEVICES}
  if not match or match[2].lower() not in names:
    raise config_lib.ConfigError(
      'plan.hardware: expected COUNTxKIND, such as 8xB200; '
      f'kinds: {", ".join(DEVICES)}; got {text!r}'
    )
  name = names[match[2].lower()]
  return Hardware(int(match[1]), name, DEVICES[name])


def check(config: config_lib.Config) -> Hardware:
  """Returns the hardware of `config.plan`.

  Raises:
    ConfigError: the device count differs from the mesh in `config.devices`.
  """
  hardware, devices = parse(config.plan.hardware), config.devices
  data, fsdp, tensor = devices.data, devices.fsdp, devices.tensor
  if data * fsdp * tensor != hardware.count:
    raise config_lib.ConfigError(
      f'plan.hardware: {hardware.count} devices, but the mesh takes '
      f'devices.data * devices.fsdp * devices.tensor = {data} * {fsdp} * '
      f'{tensor} = {data * fsdp * tensor}; change these or the hardware'
    )
  return hardware


def resolve(config: config_lib.Config) -> config_lib.Config:
  """Replaces `devices.data` = 0 by the number of replicas that fit."""
  devices = config.devices
  if devices.data:
    return config
  count = parse(config.plan.hardware).count
  data = max(1, count // (devices.fsdp * devices.tensor))
  return dataclasses.replace(
    config, devices=dataclasses.replace(devices, data=data)
  )


class HostGroup(NamedTuple):
  """Identical hosts."""

  kind: str
  device: Device  # with per_host = size
  hosts: int
  size: int  # devices per host
  upload: float  # of a host to the internet, bytes/s
  download: float  # bytes/s
  latency: float  # round-trip time, seconds
  together: bool  # hosts share one site, joined by `device.outside`
  memory: float  # of a host, bytes
  price: float = 0.0  # dollars per device-hour

  @property
  def name(self) -> str:
    """The name of one host, such as 8xB200, or 4090 for a single device."""
    return f'{self.size}x{self.kind}' if self.size > 1 else self.kind


def parse_inventory(text: str, plan: config_lib.Plan) -> tuple[HostGroup, ...]:
  """Parses the groups of `plan.inventory`.

  >>> parse_inventory('64xA100 in pairs', config_lib.Plan())[0].hosts
  32

  Args:
    text: pieces, separated by commas.
    plan: the default links.

  Raises:
    ConfigError: a piece cannot be read; names it and what is allowed.
  """
  return tuple(_group(piece.strip(), plan) for piece in text.split(','))


def _group(piece: str, plan: config_lib.Plan) -> HostGroup:
  match = _PIECE.match(piece)
  if not match:
    raise _error(piece, _HOW)
  count, kind = int(match[1]), match[2]
  names = {name.lower(): name for name in DEVICES} | {'any': 'any'}
  if kind.lower() not in names:
    known = ', '.join(names.values())
    raise _error(piece, f'there is no kind {kind!r}; kinds: {known}')
  kind = names[kind.lower()]
  said = _said(piece, piece[match.end() :])
  device = _device(piece, kind, said)
  size = int(said.get('size', 0))
  together = not size and kind not in (*_AT_HOME, 'any')
  size = size or (min(device.per_host, count) if together else 1)
  if count % size:
    raise _error(
      piece, f'{count} devices do not fill hosts of {size}; write two pieces'
    )
  if kind == 'any':
    kind = f'any-{_metric(device.peak)}'
  return HostGroup(
    kind,
    device._replace(per_host=size),
    count // size,
    size,
    said.get('upload', plan.upload * 1e6),
    said.get('download', plan.download * 1e6),
    said.get('latency', LATENCY),
    together,
    said.get('host_memory', size * device.host_memory),
    said.get('price', plan.device_price),
  )


def _said(piece: str, rest: str) -> dict[str, float]:
  """Parses the clauses after the kind, in bytes, seconds and FLOP/s."""
  said: dict[str, float] = {}

  def say(name: str, value: float) -> None:
    if name in said:
      raise _error(piece, f'{name} is given twice')
    if not value:
      raise _error(piece, f'{name} is 0')
    said[name] = value

  while rest:
    if match := _HOSTS.match(rest):
      word = match[1]
      if word and word not in _WORDS:
        raise _error(piece, f'expected in {", in ".join(_WORDS)}, or alone')
      say('size', _WORDS[word] if word else 1)
    elif match := _LINK.match(rest):
      down = float(match[1]) * _PREFIX[match[2]] / 8
      say('download', down)
      up = float(match[3]) * _PREFIX[match[4]] / 8 if match[3] else down
      say('upload', up)
    elif match := _PRICE.match(rest):
      say('price', float(match[1]))
    elif match := _WITH.match(rest):
      of = {'B': 'memory', 'FLOP/s': 'peak', None: 'latency'}
      name = of.get(match[3], 'host_memory')
      unit = _PREFIX[match[2]] if match[3] else 1e-3
      say(name, float(match[1]) * unit)
    else:
      raise _error(piece, f'cannot read {rest!r}; {_HOW}')
    rest = rest[match.end() :]
  return said


def _device(piece: str, kind: str, said: dict[str, float]) -> Device:
  """Returns the listed device with the stated values replaced."""
  if kind != 'any':
    device = DEVICES[kind]
  elif {'peak', 'memory'} <= said.keys():
    device = DEVICES['4090']._replace(source='as said')
  else:
    raise _error(piece, 'expected such as 2xany with 80 TFLOP/s with 24 GB')
  return device._replace(
    peak=said.get('peak', device.peak), memory=said.get('memory', device.memory)
  )


def _metric(number: float) -> str:
  prefix = max(
    (p for p in _PREFIX if number >= _PREFIX[p]), key=lambda p: _PREFIX[p]
  )
  return f'{number / _PREFIX[prefix]:.3g}{prefix}'


def _error(piece: str, what: str) -> config_lib.ConfigError:
  return config_lib.ConfigError(f'plan.inventory: {piece!r}: {what}')
