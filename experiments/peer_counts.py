"""One to 32 peers at equal tokens and bytes, tuned for each number of them.

  python -m experiments.peer_counts             about 70 core minutes
  python -m experiments.peer_counts --quick     1 minute

A step has 32 sequences in all, so that 32 peers have one each and a single one
has all. Each number of peers has 5, 15 or 30 inner steps per round and the
inner rate that are best on a quarter of the tokens, with seed 0, on a grid that
extends itself (experiments/grids.py). A peer sends 21, 64 or 128 of 4096 values
of one bit: as many per step. The error decay is 0.8 and the outer rate 1.

Synchronous AdamW is one miner with the whole batch, without compression, at the
best inner rate on all tokens. A run has 1200 steps, 21 tokens a parameter.

The numbers of peers and the test of equivalence are those of a grid that
hypertrain announced and did not run (`parity_prereg.json`: 0 of 150 runs). It
has about 1 million parameters, context 256, 3000 steps, 10, 30 and 100 inner
steps, dense DiLoCo and Muon as well, and hierarchies of peers; here are 115
thousand, context 64, fewer inner steps and SparseLoCo alone, and the rates are
tuned for each number of peers.

Criteria, written before the runs; n = 3 seeds, compared seed by seed, and up to
7 while undecided:
  P1  The final loss of each number of peers is not worse than that of
      synchronous AdamW: the upper end of the 90 % interval of the difference is
      at most 0.5 % of its loss (experiments/equivalence.py).
  P2  32 peers are at most 0.05 nats worse than 4, as for the untuned ones of
      experiments/peers.py; two standard errors decide.
"""

import functools
import pathlib
import statistics
from collections.abc import Iterator, Sequence

from experiments import charts
from experiments import equivalence
from experiments import grids
from experiments import methods
from experiments import recipe
from experiments import runner
from experiments import study

PEERS = (1, 2, 4, 8, 16, 32)
BATCH = 32  # sequences of all peers in a step
TOTAL = 1200  # inner steps of a peer
STEPS = {5: 21, 15: 64, 30: 128}  # inner steps per round -> values per block
ADAMW = 'AdamW, synchronous'


def _steps(inner_steps: int) -> tuple[str, ...]:
  rounds = TOTAL // inner_steps
  return (
    f'optim.inner_steps={inner_steps}',
    f'rounds={rounds}',
    f'eval.every={rounds // 10}',
    f'optim.inner.warmup_steps={TOTAL // 20}',
  )


REFERENCE = grids.Grid(
  ADAMW,
  (*methods.ALONE, f'optim.inner.batch_size={BATCH}', *_steps(15)),
  {grids.INNER: (3e-3, 6e-3, 1.2e-2)},
  share=1,
)


def name(peers: int) -> str:
  return f'{peers} peer{"s" if peers > 1 else ""}'


def grid(peers: int, inner_steps: int) -> grids.Grid:
  """Returns the candidates of a number of peers at a number of inner steps."""
  sets = (
    f'miners={peers}',
    f'optim.inner.batch_size={BATCH // peers}',
    f'optim.compression.k={STEPS[inner_steps]}',
    'optim.compression.error_decay=0.8',
    *_steps(inner_steps),
  )
  return grids.Grid(
    f'{name(peers)}, {inner_steps} steps',
    sets,
    {grids.INNER: (6e-3, 1.2e-2)},
    recipe.PROGRAM,
  )


def best(
  runs: Sequence[study.Run], peers: int
) -> tuple[int, grids.Point] | None:
  """Returns the best number of inner steps and its rate; None before."""
  tuned = {r.cell: r.nats_per_byte for r in runs}
  found: dict[int, grids.Point] = {}
  for steps in STEPS:
    point = grids.best(grid(peers, steps), runs)
    if point is None:
      return None
    found[steps] = point
  steps = min(found, key=lambda h: tuned[grid(peers, h).trial(found[h]).name])
  return steps, found[steps]


def plan(
  runs: Sequence[study.Run], seeds: int, counts: Sequence[int] = PEERS
) -> Iterator[study.Cell]:
  yield from grids.plan(REFERENCE, runs, seeds)
  for peers in counts:
    for steps in STEPS:
      yield from grids.plan(grid(peers, steps), runs, 0)
    found = best(runs, peers)
    for seed in range(seeds if found else 0):
      assert found
      steps, point = found
      yield grid(peers, steps).cell(point, seed)._replace(name=name(peers))


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  done = {run.cell for run in runs}
  reference = statistics.mean(study.losses(runs, ADAMW).values())
  for peers in PEERS:
    if name(peers) not in done:
      continue
    gap = study.gap(runs, name(peers), ADAMW)
    yield study.Verdict(
      f'P1, {name(peers)}',
      'tuned for their number, peers are not worse than synchronous AdamW',
      'hypertrain, parity_prereg.json',
      '90 % interval of the loss at most 0.5 % above',
      equivalence.describe(gap, reference),
      equivalence.not_worse(gap, equivalence.MARGIN * reference),
      (name(peers), ADAMW),
    )
  few, many = name(4), name(PEERS[-1])
  if {few, many} <= done:
    gap = study.gap(runs, many, few)
    yield study.Verdict(
      'P2',
      'more peers cost little, each number of them tuned',
      'ours',
      'at most 0.05 nats worse than 4',
      str(gap),
      study.at_most(gap, 0.05),
      (many, few),
    )


def table(runs: Sequence[study.Run]) -> str:
  """Returns Markdown: a row per number of peers."""
  adamw = statistics.mean(study.losses(runs, ADAMW).values())
  lines = [
    '| peers | sequences of each | inner steps | rate | seeds | nats per byte '
    '| over AdamW |',
    '| ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
  ]
  for peers in PEERS:
    found = best(runs, peers)
    losses = list(study.losses(runs, name(peers)).values())
    if not found or not losses:
      continue
    gap, spread = study.gap(runs, name(peers), ADAMW), study.spread(losses)
    lines.append(
      f'| {peers} | {BATCH // peers} | {found[0]} | {found[1][0]:g} | '
      f'{len(losses)} | {spread.mean:.4f} ± {spread.deviation:.4f} | '
      f'{gap.mean / adamw:+.1%} |'
    )
  return '\n'.join(lines)


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  lines: dict[str, dict[float, str]] = {
    'SparseLoCo, inner steps and rate tuned': {p: name(p) for p in PEERS}
  }
  level = ('synchronous AdamW', ADAMW)
  charts.ends(runs, lines, path, 'peers', level=level)


STUDY = study.Study(
  'peer_counts',
  plan,
  judge,
  draw,
  table,
  brief=functools.partial(plan, counts=(4, 32)),
)


if __name__ == '__main__':
  runner.main(STUDY, __doc__)
