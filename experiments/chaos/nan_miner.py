"""A miner's process whose rounds are lost by chance: its loss is not finite.

It takes the flags of run.py. In some rounds it trains from parameters that are
not numbers, as a broken device would make them.
"""

import functools

import jax
import numpy as np

from covenant import cli
from covenant import config as config_lib
from covenant import startup
from covenant import typing as ct
from covenant.node import miner as miner_lib
from covenant.node import process
from covenant.train import local as local_lib
from experiments.chaos import faults

RATE = 0.2  # of the rounds


def spoiled(
  honest: miner_lib.MinerPolicy, seed: int = 0, rate: float = RATE
) -> miner_lib.MinerPolicy:
  """Returns a policy that trains some rounds from numbers that are none."""

  def train(
    node: miner_lib.Miner,
    task: local_lib.Task,
    params: ct.Params,
    batches: miner_lib.Batches,
  ) -> miner_lib.Future[local_lib.TrainedRound | None]:
    if faults.draw(seed, 'nan', task.uid, task.round) < rate:
      params = jax.tree.map(lambda x: x * np.float32('nan'), params)
    return honest.train(node, task, params, batches)

  return honest._replace(train=train)


def miner(config: config_lib.Config, workdir: str) -> None:
  """Runs the miner, until the run is over or SIGTERM."""
  policy = spoiled(miner_lib.HONEST, config.seed)
  with startup.stoppable('stopping') as stop:
    process.Process(
      config,
      'miner',
      workdir,
      build=functools.partial(process.build_miner, policy=policy),
    ).run(stop)


if __name__ == '__main__':
  cli.ROLES['miner'] = miner
  cli.main()
