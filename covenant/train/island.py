"""What one miner trains on, where miners are not alike.

An island is a uid's hardware, seen from the run: how much it trains in a
round, and how it is cut. `config.islands` lists them in the order of uids:

  2x steps=40,batch=16; 4x steps=10,stages=2,rank=4

are two fast full replicas and four slow pipelines. What is not said is as in
the run's config; an empty text means that all miners are alike. It is a node's
own affair, not part of the run's identity: a process has one island.
"""

import re
from typing import NamedTuple

from covenant import config as config_lib
from covenant.data import assignment
from covenant.train.pipeline import activation_quantization


class Island(NamedTuple):
  """Of one uid. 0 stands for what the run's config says."""

  steps: int = 0  # inner steps a round
  batch: int = 0  # sequences an inner step
  stages: int = 1  # of a pipeline; 1: a full replica
  # Numbers a position that pass between stages; 0: all, as the model's width.
  rank: int = 0
  bits: int = 0  # of each of them; 0: as computed
  rounds: int = 1  # that a contribution takes

  @property
  def sequences(self) -> int:
    """Of one contribution, once steps and batch are filled in."""
    return self.steps * self.batch * self.rounds


_ENTRY = re.compile(r'(?:([1-9]\d*)x\s*)?(.*)', re.DOTALL)
_DEFAULT = Island()


def parse(text: str) -> tuple[Island, ...]:
  """The islands that `config.islands` lists.

  >>> parse('2x steps=40; rank=4,stages=2')[1:]
  (Island(steps=40, batch=0, stages=1, rank=0, bits=0, rounds=1), \
Island(steps=0, batch=0, stages=2, rank=4, bits=0, rounds=1))

  Raises:
    ConfigError: naming the entry that cannot be read, and what is allowed.
  """
  islands: list[Island] = []
  for entry in filter(None, (part.strip() for part in text.split(';'))):
    match = _ENTRY.fullmatch(entry)
    assert match is not None
    island = _island(entry, match[2].strip())
    islands += [island] * int(match[1] or 1)
  return tuple(islands)


def _island(entry: str, said: str) -> Island:
  found: dict[str, int] = {}
  for pair in filter(None, (part.strip() for part in said.split(','))):
    name, _, value = pair.partition('=')
    if name not in Island._fields or not value.isdecimal() or name in found:
      raise config_lib.ConfigError(
        f'islands: {entry!r}: expected each of {", ".join(Island._fields)} at '
        f'most once, as in 2x steps=40,batch=16; got {pair!r}'
      )
    found[name] = int(value)
  island = Island(**found)
  if not (island.stages and island.rounds):
    raise config_lib.ConfigError(
      f'islands: {entry!r}: stages and rounds are 1 or more'
    )
  if island.rank and island.stages == 1:
    raise config_lib.ConfigError(
      f'islands: {entry!r}: rank is of what passes between stages; expected '
      'stages=2 or more with it'
    )
  if island.bits and not island.rank:
    raise config_lib.ConfigError(
      f'islands: {entry!r}: bits are of the numbers of a rank; expected a rank '
      'with them'
    )
  if island.bits not in (0, *activation_quantization.BITS):
    raise config_lib.ConfigError(
      f'islands: {entry!r}: expected bits of {activation_quantization.BITS}, or 0 for numbers '
      'as they are computed'
    )
  if island.bits == 4 and island.rank % 2:
    raise config_lib.ConfigError(
      f'islands: {entry!r}: numbers of four bits pass two in a byte; expected '
      'an even rank'
    )
  return island


def describe(islands: tuple[Island, ...]) -> str:
  """The text of `islands`: the inverse of `parse`."""
  groups: list[tuple[Island, int]] = []
  for island in islands:
    if groups and groups[-1][0] == island:
      groups[-1] = island, groups[-1][1] + 1
    else:
      groups.append((island, 1))
  return '; '.join(
    f'{count}x '
    + ','.join(
      f'{name}={value}'
      for name, value in island._asdict().items()
      if value != getattr(_DEFAULT, name)
    )
    for island, count in groups
  )


def of(config: config_lib.Config, uid: int) -> Island:
  """The island of a uid: of a list of one, that one.

  The steps and batch of the run are filled in.

  Raises:
    ConfigError: the list has neither one entry nor one a miner, or the island
      trains on more than it is assigned, or cuts the model as it cannot be.
  """
  islands = parse(config.islands) or (_DEFAULT,)
  if len(islands) not in (1, config.miners):
    raise config_lib.ConfigError(
      f'islands: expected one, or one for each of {config.miners} miners, '
      f'got {len(islands)}'
    )
  island = (
    islands[0] if len(islands) == 1 else islands[min(uid, len(islands) - 1)]
  )
  if config.model.layers % island.stages:
    raise config_lib.ConfigError(
      f'islands: stages={island.stages}: expected a divisor of model.layers = '
      f'{config.model.layers}'
    )
  if island.rank >= config.model.width:
    raise config_lib.ConfigError(
      f'islands: rank={island.rank}: expected less than model.width = '
      f'{config.model.width}, or 0 for all of it'
    )
  if island.rank and config.optim.method in ('ddp', 'demo'):
    raise config_lib.ConfigError(
      f'islands: rank={island.rank}: expected 0 with optim.method='
      f'{config.optim.method!r}, which has no inner optimizer'
    )
  island = island._replace(
    steps=island.steps or config.optim.inner_steps,
    batch=island.batch or config.optim.inner.batch_size,
  )
  needed, most = island.sequences, assignment.per_miner(config)
  if needed > most:
    raise config_lib.ConfigError(
      f'islands: that of uid {uid} trains on {needed} sequences; expected at '
      f'most {most}, or set optim.most_sequences to what the largest needs'
    )
  if island.rounds - 1 > config.optim.staleness:
    raise config_lib.ConfigError(
      f'islands: that of uid {uid} has rounds={island.rounds}; expected at '
      f'most {config.optim.staleness + 1}, or set optim.staleness='
      f'{island.rounds - 1}'
    )
  if config.optim.method in ('ddp', 'demo') and island.steps > 1:
    raise config_lib.ConfigError(
      f'islands: that of uid {uid} has steps={island.steps}; expected 1 with '
      f'optim.method={config.optim.method!r}'
    )
  return island
