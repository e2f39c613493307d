"""Exchanges beside the next round, at three shares of values.

  python -m experiments.overlap_density             about 15 core minutes
  python -m experiments.overlap_density --quick     1 minute

With `optim.overlap` the first steps of a round run while the last one is being
exchanged: what the peers have sent arrives so many inner steps late, and the
change of these steps is added to it. Here it arrives at once, after 5 of 15
steps, or after 14, in 50 rounds of eight peers, half of the tokens of
experiments/study.py. A peer sends 16, 64 or 256 of 4096 values of one bit, with
an error decay of 0.8. Rates are those of experiments/study.py.

Contributions that are whole rounds late were measured, and removed, before
(docs/results.md). No criterion is set: the study makes a table.
"""

import functools
import pathlib
import statistics
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import runner
from experiments import study

OVERLAPS = (0, 5, 14)  # inner steps of 15
VALUES = (16, 64, 256)  # of 4096
SEEDS = 2


def name(values: int, overlap: int) -> str:
  return f'{values} of 4096, {overlap} steps late'


def plan(
  runs: Sequence[study.Run],
  seeds: int,
  shares: Sequence[int] = VALUES,
  overlaps: Sequence[int] = OVERLAPS,
) -> Iterator[study.Cell]:
  del runs
  for seed in range(min(seeds, SEEDS)):
    for values in shares:
      for overlap in overlaps:
        sets = (
          'rounds=50',
          'eval.every=5',
          'optim.inner.warmup_steps=37',
          'optim.compression.error_decay=0.8',
          f'optim.compression.k={values}',
          f'optim.overlap={overlap}',
        )
        yield study.Cell(name(values, overlap), seed, sets)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del runs, results
  yield from ()


def table(runs: Sequence[study.Run]) -> str:
  """Returns Markdown: a row per share of values, a column per overlap."""
  lines = [
    '| values sent | ' + ' | '.join(f'{o} steps late' for o in OVERLAPS) + ' |',
    '| ---: |' + ' ---: |' * len(OVERLAPS),
  ]
  for values in VALUES:
    cells = []
    for overlap in OVERLAPS:
      losses = study.losses(runs, name(values, overlap))
      if not losses:
        cells.append('')
        continue
      cells.append(f'{statistics.mean(losses.values()):.4f}')
      if overlap:
        at_once = study.losses(runs, name(values, 0))
        above = study.spread([losses[s] / at_once[s] - 1 for s in losses])
        cells[-1] += f' ({above.mean:+.1%} ± {above.deviation:.1%})'
    if any(cells):
      lines.append(f'| {values} of 4096 | {" | ".join(cells)} |')
  return '\n'.join(lines)


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  lines = {
    f'{overlap} steps late': {float(v): name(v, overlap) for v in VALUES}
    for overlap in OVERLAPS
  }
  charts.ends(runs, lines, path, 'values sent of 4096; 15 steps per round')


STUDY = study.Study(
  'overlap_density',
  plan,
  judge,
  draw,
  table,
  # Shortened rounds have 5 steps, fewer than are late here.
  brief=functools.partial(plan, overlaps=(0,)),
)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
