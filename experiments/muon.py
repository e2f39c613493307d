"""Muon as the inner optimizer of SparseLoCo, against AdamW.

  python -m experiments.muon             about 20 core minutes
  python -m experiments.muon --quick     1 minute

Both get the best of the same learning rates on seed 0: inner rates of 3e-3,
6e-3 and 1.2e-2, outer rates of 0.7 and 1 (experiments/study.py). Muon updates
matrices, with constants of its own; AdamW updates embeddings and gains.

Criterion, written before the runs; n = 3 seeds, compared seed by seed; two
standard errors decide:
  Muon  The final loss is lower than with AdamW.
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import runner
from experiments import study

INNER = (3e-3, 6e-3, 1.2e-2)
OUTER = (0.7, 1.0)
KINDS = {'AdamW inside': 'adamw', 'Muon inside': 'muon'}


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  for name, kind in KINDS.items():
    cells = {
      f'{name}, {inner:g} and {outer:g}': (
        f'optim.inner.kind={kind}',
        f'optim.inner.learning_rate={inner:g}',
        f'optim.outer.learning_rate={outer:g}',
      )
      for inner in INNER
      for outer in OUTER
    }
    yield from study.swept(runs, name, cells, seeds)


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  gap = study.gap(runs, 'Muon inside', 'AdamW inside')
  yield study.Verdict(
    'Muon',
    'Muon inside SparseLoCo is better than AdamW',
    'ours; MuLoCo for DiLoCo',
    'loss minus that with AdamW below 0',
    str(gap),
    study.at_most(gap),
  )


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  charts.curves(runs, list(KINDS), path)


STUDY = study.Study('muon', plan, judge, draw)

if __name__ == '__main__':
  runner.main(STUDY, __doc__)
