"""The share of indices that honest peers have in common.

  python -m experiments.overlap             3 core minutes
  python -m experiments.overlap --quick     some seconds

Gauntlet takes two payloads with many common indices for copies of each other,
as the deployed system does from a share of 0.4. In the setting of
experiments/study.py honest peers have no reason to agree but that they train
the same model. For each pair of peers and each round, a validator's sketches of
the indices (covenant/gauntlet/similarity.py) give the share that both sent.
Chance is one in 64.

Criterion, written before the runs; n = 3 seeds:
  C15  After the first ten rounds, no pair of any round of any seed reaches 0.4.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib.axes
import numpy as np
from matplotlib import figure

from covenant import files
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.gauntlet import similarity
from experiments import charts
from experiments import runner
from experiments import study

WARM = 10  # rounds, in which little but a few embeddings moves
LIMIT = 0.4


class Row(NamedTuple):
  """One round of a run."""

  seed: int
  round: int
  mean: float  # share of common indices, over all pairs of peers
  most: float  # the largest share
  config: str
  code: str
  seconds: float  # of one core, for the whole run


def run(seed: int, sets: Sequence[str]) -> list[Row]:
  began = time.process_time()
  config = study.make_config(study.Cell('overlap', seed, tuple(sets)))
  host = host_lib.Host(config, dataset.load(config))
  witness = host.validators[0]
  sketcher = similarity.Sketcher(
    host.shared_model.abstract_params, host.shared_model.method.compression
  )
  found = []
  for r in range(config.rounds):
    host.round()
    sketch_RxW = sketcher.sketch(witness.messages, b'C15')
    pairs = similarity.shared_fractions(sketch_RxW, sketch_RxW)
    pairs = pairs[np.triu_indices(len(pairs), 1)]
    found.append((r + 1, round(pairs.mean(), 5), round(pairs.max(), 5)))
  seconds = round(time.process_time() - began, 1)
  name = study.digest(config)
  return [Row(seed, *x, name, study.code(), seconds) for x in found]


def judge(rows: Sequence[Row]) -> Iterator[study.Verdict]:
  late = [row for row in rows if row.round > WARM]
  if not late:
    return
  most = max(row.most for row in late)
  seeds = len({row.seed for row in late})
  yield study.Verdict(
    'C15',
    'honest peers choose different values',
    'Covenant-72B, code: a threshold of 0.4',
    f'after {WARM} rounds no pair shares {LIMIT} of its indices',
    f'{statistics.mean(row.mean for row in late):.3f} in the mean, '
    f'{most:.3f} at most (n = {seeds})',
    'PASS' if most < LIMIT else 'FAIL',
  )


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
  fig = figure.Figure(figsize=(6.4, 4), dpi=150, layout='constrained')
  ax: matplotlib.axes.Axes = fig.subplots()
  for i, seed in enumerate(sorted({row.seed for row in rows})):
    of = [row for row in rows if row.seed == seed]
    rounds = [row.round for row in of]
    looks = charts.style(i) | {'linestyle': '-', 'ms': 3, 'markevery': (i, 3)}
    ax.plot(
      rounds, [row.most for row in of], label=f'most alike pair, seed {seed}',
      **looks,
    )  # fmt: skip
    ax.plot(
      rounds, [row.mean for row in of], label=f'mean of all pairs, seed {seed}',
      **(looks | {'linestyle': '--', 'mfc': 'w'}),
    )  # fmt: skip
  for level, label, where in (
    (LIMIT, 'above: taken for a copy', 4), (1 / 64, 'by chance', -11),
  ):  # fmt: skip
    ax.axhline(level, color='#8C8C8C', lw=1, ls=':')
    ax.annotate(
      label, (0.99, level), (0, where), xycoords=('axes fraction', 'data'),
      textcoords='offset points', ha='right', color='#606060', fontsize=8,
    )  # fmt: skip
  ax.set(xlabel='round', ylabel='share of indices in common')
  ax.set_ylim(-0.02, None)
  ax.legend(frameon=False, fontsize=8, ncols=2)
  ax.spines[['top', 'right']].set_visible(False)
  fig.savefig(path)


def main() -> None:
  arguments = runner.arguments(__doc__)
  work, results, seeds = pathlib.Path(arguments.workdir), study.RESULTS, 1
  sets: tuple[str, ...] = ()
  if arguments.quick:
    work = results = work / 'quick'
    sets = ('rounds=12',)
  else:
    seeds = arguments.seeds
  rows = []
  for seed in range(seeds):
    done = work / f'overlap-{seed}.json'
    if not done.exists():
      found = run(seed, sets)
      files.write(done, json.dumps(found))
    rows += [Row(*x) for x in json.loads(done.read_text())]
  study.write_csv(results / 'overlap.csv', rows)
  draw(rows, results / 'overlap.png')
  study.report(judge(rows))


if __name__ == '__main__':
  main()
