"""Parsing of `plan.inventory`, such as '8xB200, 64xA100 in pairs'.

A piece names a count and a kind of device (covenant/plan/hardware.py), followed
by optional clauses in any order:

  in pairs, in threes, in fours, in sixes, in eights, alone
      devices per host; hosts are joined by the internet only
  on 200 Mb/s, on 1 Gb/s / 300 Mb/s up
      internet link of a host: download, and upload if different
  with 24 GB, with 40 ms, with 80 TFLOP/s
      memory, latency and peak of a device, instead of the listed values

Mb/s are megabits, as internet providers count; the defaults `plan.upload` and
`plan.download` are megabytes. Data-center devices without a clause on hosts
fill hosts at one site; consumer cards have one host each. The kind 'any' needs
its peak and memory stated.
"""

import re
from typing import NamedTuple

from covenant import config as config_lib
from covenant.plan import hardware

LATENCY = 0.05  # default round-trip time in seconds; assumed
_AT_HOME = ('5090', '4090', '3090')
_WORDS = {'pairs': 2, 'threes': 3, 'fours': 4, 'sixes': 6, 'eights': 8}
_PREFIX = {'': 1.0, 'k': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
_SPEED = r'(\d+(?:\.\d+)?)\s*([kMG]?)b/s'
_PIECE = re.compile(r'([1-9]\d*)\s*x\s*([\w-]+)\s*')
_HOSTS = re.compile(r'in\s+(\w+)\s*|alone\s*')
_LINK = re.compile(rf'on\s+{_SPEED}\s*(?:/\s*{_SPEED}\s+up\s*)?')
_WITH = re.compile(r'with\s+(\d+(?:\.\d+)?)\s*(?:([kMGT]?)(B|FLOP/s)|ms)\s*')
_HOW = (
  'expected such as 64xA100 in pairs on 1 Gb/s / 300 Mb/s up with 40 GB, '
  'where Mb/s are megabits'
)


class Group(NamedTuple):
  """Identical hosts."""

  kind: str
  device: hardware.Device  # with per_host = size
  hosts: int
  size: int  # devices per host
  upload: float  # of a host to the internet, bytes/s
  download: float  # bytes/s
  latency: float  # round-trip time, seconds
  together: bool  # hosts share one site, joined by `device.outside`

  @property
  def name(self) -> str:
    """The name of one host, such as 8xB200, or 4090 for a single device."""
    return f'{self.size}x{self.kind}' if self.size > 1 else self.kind


def parse(text: str, plan: config_lib.Plan) -> tuple[Group, ...]:
  """Parses the groups of `plan.inventory`.

  >>> parse('64xA100 in pairs', config_lib.Plan())[0].hosts
  32

  Args:
    text: pieces, separated by commas.
    plan: the default links.

  Raises:
    ConfigError: a piece cannot be read; names it and what is allowed.
  """
  return tuple(_group(piece.strip(), plan) for piece in text.split(','))


def _group(piece: str, plan: config_lib.Plan) -> Group:
  match = _PIECE.match(piece)
  if not match:
    raise _error(piece, _HOW)
  count, kind = int(match[1]), match[2]
  names = {name.lower(): name for name in hardware.DEVICES} | {'any': 'any'}
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
  return Group(
    kind,
    device._replace(per_host=size),
    count // size,
    size,
    said.get('upload', plan.upload * 1e6),
    said.get('download', plan.download * 1e6),
    said.get('latency', LATENCY),
    together,
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
    elif match := _WITH.match(rest):
      name = {'B': 'memory', 'FLOP/s': 'peak', None: 'latency'}[match[3]]
      unit = _PREFIX[match[2]] if match[3] else 1e-3
      say(name, float(match[1]) * unit)
    else:
      raise _error(piece, f'cannot read {rest!r}; {_HOW}')
    rest = rest[match.end() :]
  return said


def _device(piece: str, kind: str, said: dict[str, float]) -> hardware.Device:
  """Returns the listed device with the stated values replaced."""
  if kind != 'any':
    device = hardware.DEVICES[kind]
  elif {'peak', 'memory'} <= said.keys():
    device = hardware.DEVICES['4090']._replace(source='as said')
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
