"""The island of each uid: the share of the training of one miner.

An island is a uid's hardware as the run sees it: how much it trains per round
and how it is split. `config.islands` lists the islands in the order of uids
(covenant/config/network.py); an empty list means that all miners are equal. It
is a node's own affair, not part of the run's identity: a process has one
island.
"""

import dataclasses
import itertools

from covenant import config as config_lib
from covenant.data import assignment

Island = config_lib.Island


def of(config: config_lib.Config, uid: int) -> Island:
  """Returns the island of a uid, with the steps and batch of the run filled in.

  A list of one island is that of every uid.

  Raises:
    ConfigError: the list has neither one entry nor one per miner, or the
      island trains on more than it is assigned, or cannot split the model.
  """
  listed = config.islands or (Island(),)
  counts = [island.count for island in listed]
  total = sum(counts)
  if total not in (1, config.miners):
    raise config_lib.ConfigError(
      f'islands: expected one, or one for each of {config.miners} miners, '
      f'got {total}'
    )
  ends = itertools.accumulate(counts)
  place = min(uid, total - 1)
  island = next(i for i, end in zip(listed, ends, strict=True) if place < end)
  _check_model(config, island)
  island = dataclasses.replace(
    island,
    count=1,
    steps=island.steps or config.optim.inner_steps,
    batch=island.batch or config.optim.inner.batch_size,
  )
  _check_work(config, uid, island)
  return island


def _check_model(config: config_lib.Config, island: Island) -> None:
  """Raises ConfigError unless the island can split the model."""
  if island.layers and sum(island.layers) != config.model.layers:
    raise config_lib.ConfigError(
      f'islands: layers={"-".join(map(str, island.layers))}: expected a sum of '
      f'model.layers = {config.model.layers}'
    )
  if not island.layers and config.model.layers % island.stages:
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


def _check_work(config: config_lib.Config, uid: int, island: Island) -> None:
  """Raises ConfigError if the island does more than the run allows."""
  who = f'islands: the island of uid {uid}'
  needed, most = island.sequences, assignment.per_miner(config)
  if needed > most:
    raise config_lib.ConfigError(
      f'{who} trains on {needed} sequences; expected at most {most}, or set '
      'optim.most_sequences to what the largest needs'
    )
  if config.optim.method in ('ddp', 'demo') and island.steps > 1:
    raise config_lib.ConfigError(
      f'{who} has steps={island.steps}; expected 1 with optim.method='
      f'{config.optim.method!r}'
    )
