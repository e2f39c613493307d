"""The hardware of one uid, as the run sees it, and its text form for flags.

In a flag, entries are separated by semicolons, their fields by commas:

  2x steps=40,batch=16; 4x steps=10,stages=2,rank=4

stands for two fast full replicas and four slow pipelines.
"""

import dataclasses
import re
from collections.abc import Iterable

from covenant.config import schema

_ENTRY = re.compile(r'(?:([1-9]\d*)x\s*)?(.*)', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Island(schema.Section):
  """One or more uids of equal hardware. 0 stands for the run's own value."""

  steps: int = schema.bounded(0, low=0)  # inner steps per round
  batch: int = schema.bounded(0, low=0)  # sequences per inner step
  stages: int = schema.positive(1)  # of a pipeline; 1: a full replica
  # Numbers per position that pass between stages; 0: the model's width.
  rank: int = schema.bounded(0, low=0)
  # Bits of each of these numbers; 0: the model's own precision.
  bits: int = schema.bounded(0, choices=(0, 4, 8))
  rounds: int = schema.positive(1)  # rounds per contribution
  count: int = schema.positive(1)  # uids

  @property
  def sequences(self) -> int:
    """The sequences of one contribution, if steps and batch are not 0."""
    return self.steps * self.batch * self.rounds

  def check(self) -> None:
    entry = f'islands: {show((self,))!r}'
    schema.require(
      not self.rank or self.stages > 1,
      entry,
      'rank is the width of what passes between stages; expected stages=2 or '
      'more with it',
    )
    schema.require(
      not self.bits or self.rank > 0,
      entry,
      'bits is the precision of the numbers of a rank; expected a rank with it',
    )
    schema.require(
      self.bits != 4 or self.rank % 2 == 0,
      entry,
      'two numbers of four bits share a byte; expected an even rank',
    )


_DEFAULT = Island()


def read(text: str) -> tuple[Island, ...]:
  """Reads islands from a flag; `show` is the inverse.

  >>> read('2x steps=40; rank=4,stages=2') == (
  ...   Island(count=2, steps=40),
  ...   Island(stages=2, rank=4),
  ... )
  True

  Raises:
    ConfigError: names the entry that cannot be read, and what is allowed.
  """
  entries = filter(None, (part.strip() for part in text.split(';')))
  return tuple(map(_read, entries))


def _read(entry: str) -> Island:
  match = _ENTRY.fullmatch(entry)
  assert match is not None
  allowed = [field.name for field in dataclasses.fields(Island)][:-1]
  found: dict[str, int] = {}
  for pair in filter(None, (part.strip() for part in match[2].split(','))):
    name, _, value = pair.partition('=')
    schema.require(
      name in allowed and value.isdecimal() and name not in found,
      f'islands: {entry!r}',
      f'expected each of {", ".join(allowed)} at most once, as in '
      f'2x steps=40,batch=16; got {pair!r}',
    )
    found[name] = int(value)
  path = f'islands: {entry!r}'
  raw = found | {'count': int(match[1] or 1)}
  return schema.build(Island, raw, f'{path}: ', [])


def show(islands: Iterable[Island]) -> str:
  """The text of islands for a flag, equal neighbors in one entry.

  >>> show([Island(steps=40), Island(steps=40), Island(stages=2)])
  '2x steps=40; 1x stages=2'
  """
  groups: list[Island] = []
  for island in islands:
    if groups and dataclasses.replace(groups[-1], count=island.count) == island:
      count = groups[-1].count + island.count
      groups[-1] = dataclasses.replace(island, count=count)
    else:
      groups.append(island)
  return '; '.join(map(_show, groups))


def _show(island: Island) -> str:
  fields = ','.join(
    f'{field.name}={getattr(island, field.name)}'
    for field in dataclasses.fields(island)[:-1]
    if getattr(island, field.name) != getattr(_DEFAULT, field.name)
  )
  return f'{island.count}x {fields}'.rstrip()
