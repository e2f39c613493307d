"""Costs of runs in core seconds, estimated from earlier runs.

The seconds of a run are those of the passes through its model, of its
optimizer, and of its compilation. Earlier runs of the committed results give
the seconds per token and parameter, for AdamW and Muon; runs that are done
already are counted as if they were not.
"""

import functools
import statistics
from collections.abc import Iterable, Sequence

import jax

from covenant import config as config_lib
from covenant.models import llama
from experiments import study

COMPILATION = 20.0  # seconds of a run before its first step


def work(config: config_lib.Config) -> float:
  """Returns tokens times parameters of a run: a sixth of its products."""
  optim = config.optim
  tokens = (
    config.rounds
    * optim.inner_steps
    * config.miners
    * optim.inner.batch_size
    * config.data.context
  )
  leaves = jax.tree.leaves(llama.abstract(config.model))
  return float(tokens * sum(x.size for x in leaves))


@functools.cache
def pace(kind: str) -> float:
  """Returns seconds per token and parameter with an inner optimizer.

  It is the median of the study of Muon, whose runs are of both optimizers.
  """
  runs = study.read_csv(study.RESULTS / 'muon.csv', study.Run)
  size = work(study.make_config(study.Cell('', 0)))
  return statistics.median(
    run.seconds / size
    for run in runs
    if run.cell.startswith('Muon') == (kind == 'muon')
  )


def seconds(cells: Iterable[study.Cell], more: Sequence[str] = ()) -> float:
  """Returns the core seconds that runs will take."""
  total = 0.0
  for cell in cells:
    config = study.make_config(cell, more)
    total += COMPILATION + work(config) * pace(config.optim.inner.kind)
  return total
