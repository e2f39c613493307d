"""The worth of a token by how it is trained, which the planner counts with.

  python -m experiments.worth             about 8 core minutes
  python -m experiments.worth --quick     1 minute

The setting is that of experiments/study.py with four peers and 48 rounds, at
two widths. Two peers are full replicas and two are pipelines of two stages,
which pass an eighth, about a twentieth or the least possible part of the bytes
of their width, as numbers of four bits. Runs of three quarters of the rounds
tell how many plain tokens reach a loss: the worth of a token of a pipeline is
that number less those of the replicas, over those of the pipelines.

The critical batch comes from a run that does the same work in a third of the
steps, of three times the sequences.

The tables are those of covenant/plan/worth.py; a test compares them.
"""

import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence

from covenant import config as config_lib
from covenant.models import llama
from covenant.train.pipeline import boundary_bytes
from experiments import runner
from experiments import study

# Numbers of four bits per position, by width.
RANKS = {64: (60, 20, 4), 32: (28, 8, 2)}
SMALL = ('miners=4', 'rounds=48', 'eval.every=24')
FEWER = ('rounds=36', 'eval.every=18')
_SHARE = 36 / 48
BATCH = 9  # sequences per step, instead of 3


def _cell(width: int, what: str) -> str:
  return f'width {width}, {what}'


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  del runs
  for seed in range(seeds):
    for width, ranks in RANKS.items():
      own = (f'model.width={width}', *SMALL)
      yield study.Cell(_cell(width, 'alike'), seed, own)
      yield study.Cell(_cell(width, 'fewer rounds'), seed, (*own, *FEWER))
      if width == 64:
        text = f'islands=4x steps=5,batch={BATCH}'
        yield study.Cell(_cell(64, f'batches of {BATCH}'), seed, (*own, text))
      for rank in ranks:
        text = f'islands=2x steps=15; 2x stages=2,rank={rank},bits=4'
        yield study.Cell(_cell(width, f'rank {rank}'), seed, (*own, text))


def plain_share(runs: Sequence[study.Run], width: int, loss: float) -> float:
  """Returns the share of the tokens by which plain training reaches a loss.

  The loss is linear in the logarithm of the tokens.
  """
  whole, part = (
    statistics.mean(study.losses(runs, _cell(width, what)).values())
    for what in ('alike', 'fewer rounds')
  )
  return _SHARE ** ((loss - whole) / (part - whole))


def compression(
  runs: Sequence[study.Run],
) -> dict[int, tuple[tuple[float, float], ...]]:
  """Returns (compression ratio, worth) by the parameters of the model."""
  found = {}
  for width, ranks in RANKS.items():
    config = study.make_config(study.Cell('', 0, (f'model.width={width}',)))
    points = []
    for rank in ranks:
      dtype = config.model.compute_dtype
      fold = boundary_bytes.position_bytes(width, 0, dtype)
      fold /= boundary_bytes.position_bytes(rank, 4, dtype)
      losses = study.losses(runs, _cell(width, f'rank {rank}'))
      share = plain_share(runs, width, statistics.mean(losses.values()))
      points.append((round(fold, 2), round(min(2 * share - 1, 1.0), 2)))
    found[llama.num_params(config.model)] = tuple(points)
  return found


def critical_batch(runs: Sequence[study.Run]) -> float:
  """Returns the critical batch of a peer, in tokens."""
  losses = study.losses(runs, _cell(64, f'batches of {BATCH}'))
  worth = plain_share(runs, 64, statistics.mean(losses.values()))
  config = config_lib.load(study.BASE, study.COMMON)
  own = config.optim.inner.batch_size
  # worth = (own + critical) / (batch + critical)
  return config.data.context * (BATCH * worth - own) / (1 - worth)


def table(
  found: Mapping[int, Sequence[tuple[float, float]]], critical: float
) -> Iterator[str]:
  """Yields the lines of the results."""
  yield 'parameters | compression | worth of a token'
  for params, points in found.items():
    for fold, worth in points:
      yield f'{params:,} | {fold:.1f} | {worth:.2f}'
  yield f'critical batch of a peer: {critical:.0f} tokens'


STUDY = study.Study('worth', plan, lambda runs, results: (), lambda *_: None)


def quick() -> study.Study:
  """Returns the study in short, in which fewer rounds are one of two."""
  short = STUDY.quick()

  def shorter(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
    for cell in short.plan(runs, seeds):
      sets = ('rounds=1',) if cell.name.endswith('fewer rounds') else ()
      yield cell._replace(sets=(*cell.sets, *sets))

  return short._replace(plan=shorter)


def main() -> None:
  options = runner.arguments(__doc__)
  work, results = pathlib.Path(options.workdir), study.RESULTS
  used = STUDY
  if options.quick:
    work = results = work / 'quick'
    used = quick()
  seeds = 1 if options.quick else options.seeds
  runs = runner.complete(used, runner.Options(work, seeds, options.jobs))
  assert runs is not None
  study.write_csv(results / 'worth.csv', runs)
  print('\n'.join(table(compression(runs), critical_batch(runs))))


if __name__ == '__main__':
  main()
