"""Islands of unequal hardware in one run: their cost and their gain.

  python -m experiments.islands             about 35 core minutes
  python -m experiments.islands --quick     4 minutes

The setting is that of experiments/study.py, and all cells see the same tokens.

  alike            eight full replicas of 15 steps of 3 sequences per round
  mixed            12 steps of 8, 4, 2 and 1 sequences, the same total, twice:
                   as full replicas, and as pipelines of two stages that pass 20
                   numbers of four bits per position, 12 bytes instead of 256
                   (95.3 % less; 95.1 % with the fixed bytes of a round).
                   Weights are by tokens. The planner, too, gives fast islands
                   large batches before many steps.
  mixed, by steps  32, 16, 8 and 4 steps of 3 sequences instead
  few              three full replicas, those that remain of 8b's inventory
                   without devices below an H100
  overlap          the first of 15 steps of a round runs during the exchange of
                   the last round; in Covenant-72B's setting 70 s of exchange
                   are 0.9 steps of 15

A first version of pipelines passed 3 whole numbers in those bytes, in a
subspace that weights were projected on, as in Protocol Models: `mixed` was 8.2
% above `alike` (three seeds), and pipelines were redesigned. At the
compressions of C17 whole numbers pass: 8, 3 and 1.

Pools (experiments/pools.py) have bars of their own, and run after these cells.

Bars, written before the runs; n = 3 seeds, compared seed by seed; two standard
errors decide where there is an error. While they do not, mixed islands and
islands alike get more seeds:
  mixed       The loss is at most 1.5 % above that of `alike`. The same bar for
              `mixed, by steps` was added when it had the lower loss, as was the
              one for `wall-clock`.
  C16         Eight pipelines that pass 8 of 64 numbers per position are at most
              1.5 % above `alike`. (tests/train/pipeline/subspace_test.py shows
              that nothing is lost if all outputs lie in the span.)
  C17         Half of eight equal islands compressed are better than all of
              them, at 87.5, 95.3 and 98.4 %, and by more at 98.4 than at
              87.5 %.
  wall-clock  8b's inventory of unequal hardware reaches the final loss of
              `mixed` 1.8 times as fast, by its plan and the link model, as
              without all devices below an H100, which follows the curve of
              `few`. (It was 72b's, until the planner counted what keeps all
              but the fastest of these devices out of a run of that size.)
  overlap     In Covenant-72B's setting at least 99 % of a round compute, and
              the loss is at most 0.5 % above that with waiting.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from covenant import config as config_lib
from covenant.plan import memory
from covenant.plan import timing
from covenant.plan import wallclock
from experiments import charts
from experiments import pools
from experiments import runner
from experiments import study

ALIKE = 'alike'
BATCHES = (8, 4, 2, 1)  # sequences, in 12 steps per round
STEPS = (32, 16, 8, 4)  # steps per round, of 3 sequences
RANKS = {8: '87.5 %', 3: '95.3 %', 1: '98.4 %'}
MOST = f'optim.most_sequences={12 * max(BATCHES)}'  # equals 3 * max(STEPS)
FEW = ('miners=3', 'rounds=266', 'eval.every=14')
LARGE = str(study.ROOT.parent / 'configs' / '72b.py')
UNEQUAL = str(study.ROOT.parent / 'configs' / '8b.py')
INVENTORY = '8xB200, 16xH100, 64xA100 in pairs, 400x4090 on 200 Mb/s'
H100 = 989e12  # FLOP/s
PEERS = (20, 100, 1000)


def _mixed(kinds: Sequence[str]) -> tuple[str, str]:
  """The overrides for a replica and a compressed pipeline of each kind."""
  pipelines = [f'{kind},stages=2,rank=20,bits=4' for kind in kinds]
  entries = '; '.join(f'1x {kind}' for kind in (*kinds, *pipelines))
  return f'islands={entries}', MOST


BY_BATCH = _mixed([f'steps=12,batch={batch}' for batch in BATCHES])
BY_STEPS = _mixed([f'steps={steps}' for steps in STEPS])
MIXES = {
  'mixed': (*BY_BATCH, 'optim.aggregation.weight=tokens'),
  'mixed, unweighted': (*BY_BATCH, 'optim.aggregation.weight=equal'),
  'mixed, by steps': (*BY_STEPS, 'optim.aggregation.weight=tokens'),
}


def _compressed(rank: int, who: str) -> str:
  return f'{who} at {RANKS[rank]}'


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  del runs
  for seed in range(seeds):
    yield study.Cell(ALIKE, seed)
    for name, sets in MIXES.items():
      yield study.Cell(name, seed, sets)
    for rank in RANKS:
      pipeline = f'stages=2,rank={rank}'
      for who, text in (
        ('half', f'islands=4x steps=15; 4x {pipeline}'),
        ('all', f'islands=8x {pipeline}'),
      ):
        yield study.Cell(_compressed(rank, who), seed, (text,))
    yield study.Cell('overlap', seed, ('optim.overlap=1',))
    yield study.Cell('few', seed, FEW)


def _above(runs: Sequence[study.Run], cell: str, other: str) -> study.Gap:
  """The relative difference of two cells' losses, seed by seed."""
  here, there = study.losses(runs, cell), study.losses(runs, other)
  return study.spread([here[seed] / there[seed] - 1 for seed in here])


def _share(gap: study.Gap) -> str:
  return f'{gap.mean:+.2%} ± {gap.deviation:.2%} (n = {gap.n})'


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  for cell, name in (('mixed', ''), ('mixed, by steps', ', by steps')):
    above = _above(runs, cell, ALIKE)
    yield study.Verdict(
      f'Mixed islands{name}',
      'pipelines and speeds of 8:1 cost little',
      'ours',
      'at most 1.5 % over the same tokens on islands alike',
      _share(above),
      study.at_most(above, 0.015),
      (cell, ALIKE),
    )
  for name in list(MIXES)[1:]:
    gap = study.gap(runs, 'mixed', name)
    yield study.Verdict(
      f'Mixed, not {name.removeprefix("mixed, ")}',
      'large batches and weights by tokens are the better way',
      'ours',
      'loss minus that of the other at most 0',
      str(gap),
      study.at_most(gap),
    )
  above = _above(runs, _compressed(8, 'all'), ALIKE)
  yield study.Verdict(
    'C16, loss',
    'pipelines that pass an eighth of the width lose little',
    'Protocol Models',
    'all at 87.5 % at most 1.5 % over none compressed',
    _share(above),
    study.at_most(above, 0.015),
  )
  yield from _judge_compression(runs)
  above = _above(runs, 'overlap', ALIKE)
  yield study.Verdict(
    'Overlap, loss',
    'an exchange beside the next round costs little',
    'ours',
    'at most 0.5 % over waiting for it',
    _share(above),
    study.at_most(above, 0.005),
  )
  yield _utilization()
  yield _wall_clock(runs, results, 'mixed', '')
  yield _wall_clock(runs, results, 'mixed, by steps', ', by steps')


def _judge_compression(runs: Sequence[study.Run]) -> Iterator[study.Verdict]:
  gains = {}
  for rank, share in RANKS.items():
    whole, half = (_compressed(rank, who) for who in ('all', 'half'))
    gap = study.gap(runs, half, whole)
    gains[rank] = {
      seed: study.losses(runs, whole)[seed] - loss
      for seed, loss in study.losses(runs, half).items()
    }
    yield study.Verdict(
      f'C17, {share}',
      'compressing some beats compressing all',
      'Heterogeneous SparseLoCo, abstract',
      'half compressed minus all compressed at most 0',
      str(gap),
      study.at_most(gap),
    )
  more = study.spread([gains[1][seed] - gains[8][seed] for seed in gains[1]])
  yield study.Verdict(
    'C17, growth',
    'the more so the more they are compressed',
    'Heterogeneous SparseLoCo, abstract',
    'what half gains over all, at 98.4 % minus at 87.5 %, above 0',
    str(more),
    study.more_than(more),
    tuple(_compressed(r, w) for r in (1, 8) for w in ('all', 'half')),
  )


def _utilization() -> study.Verdict:
  round_, _ = wallclock.published('Covenant-72B')
  waiting = wallclock.utilization([round_])
  found = wallclock.utilization([round_], overlap=True)
  return study.Verdict(
    'Overlap, utilization',
    'it leaves nearly all of a round to computing',
    'ours; Covenant-72B, 4.3',
    'at least 99 % in its setting, which had 94.5 %',
    f'{waiting:.1%} without, {found:.1%} with',
    'PASS' if found >= 0.99 else 'FAIL',
  )


def _curve(run: study.Run, results: pathlib.Path) -> list[tuple[float, float]]:
  points = study.curve(run, results)
  return [(point.tokens, point.nats_per_byte) for point in points]


def _wall_clock(
  runs: Sequence[study.Run], results: pathlib.Path, cell: str, name: str
) -> study.Verdict:
  """Judges how much sooner the unequal network reaches a loss."""
  config = config_lib.load(UNEQUAL, [f'plan.inventory={INVENTORY}'])
  fast = wallclock.without(config, H100)
  ratios = []
  for seed in sorted(study.losses(runs, 'few')):
    mixed, few = (
      _curve(next(r for r in runs if (r.cell, r.seed) == (of, seed)), results)
      for of in (cell, 'few')
    )
    loss = max(mixed[-1][1], few[-1][1])  # the loss that both reach
    ratios.append(
      wallclock.seconds_to(fast, few, loss)
      / wallclock.seconds_to(config, mixed, loss)
    )
  gap = study.spread(ratios)
  return study.Verdict(
    f'Wall-clock{name}',
    'unequal islands reach a loss sooner than the fast ones alone',
    'ours',
    'at least 1.8 times, by the plan of 8b and the link model',
    f'{gap.mean:.2f} ± {gap.deviation:.2f} times (n = {gap.n})',
    study.more_than(gap, 1.8),
  )


def gather_table() -> str:
  """Returns a table of the bytes and seconds of a gather in 72b."""
  config = config_lib.load(LARGE)
  payload = memory.shards(
    dataclasses.replace(config, devices=config_lib.Devices())
  ).payload_bytes
  own = timing.links_of(config.plan)
  lines = [
    f'a payload of {payload / 1e9:.2f} GB, {config.plan.upload:g} MB/s up, '
    f'{config.plan.download:g} MB/s down',
    'peers | way | GB fetched | seconds',
  ]
  for peers in PEERS:
    for way, found in timing.ways(config, own, payload, peers).items():
      lines.append(
        f'{peers} | {way} | {found.fetched / 1e9:.1f} | {found.seconds:.0f}'
      )
  return '\n'.join(lines)


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  lines = {
    f'{who} of the islands compressed': {
      100 * (1 - rank / 64): _compressed(rank, who) for rank in RANKS
    }
    for who in ('half', 'all')
  }
  charts.ends(
    runs,
    lines,
    path,
    'compression between stages (%)',
    log=False,
    level=('none compressed', ALIKE),
  )


STUDY = study.Study('islands', plan, judge, draw)

if __name__ == '__main__':
  arguments = runner.main(STUDY, __doc__)
  if not arguments.draw:
    pools.main(arguments)
  print(gather_table())
