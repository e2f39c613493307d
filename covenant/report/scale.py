"""Numbers on an axis: where ticks are, how they read, which points are kept."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

_T = TypeVar('_T')
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def thin(items: Sequence[_T], most: int) -> list[_T]:
  """At most `most` of the items, evenly spaced, with the first and the last.

  >>> thin(range(10), 4)
  [0, 3, 6, 9]
  """
  if len(items) <= most:
    return list(items)
  step = (len(items) - 1) / (most - 1)
  return [items[round(i * step)] for i in range(most)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round numbers from `low` to `high`, inclusive.

  >>> ticks(0, 400), ticks(1.5, 1.5)
  ([0.0, 100.0, 200.0, 300.0, 400.0], [1.5])
  """
  if high <= low:
    return [low]
  rough = (high - low) / count
  unit = 10 ** math.floor(math.log10(rough))
  step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= 0.99 * rough)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [float(f'{i * step:.12g}') for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten, with 2 and 5 times of them where there is room.

  >>> log_ticks(30, 4000)
  [50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0]
  """
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  every = math.ceil(len(decades) / 6)
  subs = (1, 2, 5) if high < 300 * low else (1,)
  candidates = (s * 10.0**d for d in decades[::every] for s in subs)
  return [t for t in candidates if low <= t <= high]


def short(value: float) -> str:
  """A number on an axis, in powers of 1000.

  >>> short(2_500_000), short(0.125), short(0)
  ('2.5 M', '0.125', '0')
  """
  prefix = ''
  for larger in ('k', 'M', 'G', 'T', 'P'):
    if abs(value) < 1000:
      break
    value, prefix = value / 1000, larger
  return f'{value:.4g} {prefix}'.rstrip()


def short_bytes(value: float) -> str:
  """As `short`, of bytes.

  >>> short_bytes(200), short_bytes(5e6)
  ('200 B', '5 MB')
  """
  number = short(value)
  return number + ('B' if number[-1].isalpha() else ' B')


class Unit(NamedTuple):
  """A unit of time that fits a duration."""

  name: str
  seconds: float


def time_unit(seconds: float) -> Unit:
  """The largest unit of which `seconds` has at least two.

  >>> time_unit(90).name, time_unit(7200).name
  ('seconds', 'hours')
  """
  for name, size in (('days', _DAY), ('hours', _HOUR), ('minutes', _MINUTE)):
    if seconds >= 2 * size:
      return Unit(name, size)
  return Unit('seconds', 1)


def ranges(numbers: Sequence[int], most: int = 40) -> str:
  """Rising integers as ranges; of more than `most`, the last ones.

  >>> ranges([1, 2, 3, 7]), ranges([1, 3, 5, 6], most=2)
  ('1-3, 7', '..., 3, 5-6')
  """
  runs: list[list[int]] = []
  for number in numbers:
    if runs and runs[-1][1] == number - 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  words = [f'{a}-{b}' if a < b else f'{a}' for a, b in runs]
  return ', '.join(['...', *words[-most:]] if len(words) > most else words)
