"""Which compressor is best at equal bits? This decides the default.

  python -m experiments.compression            3 seeds, about 20 minutes
  python -m experiments.compression --rates    quantizers, tuned: 45 minutes
  python -m experiments.compression --quick    1 seed, 4 rounds, 2 minutes

Every cell trains configs/shakespeare.py for 60 rounds with another compressor
whose k is the largest that keeps one 64 x 64 block within 656 bits, what k =
64 takes with the costliest 2-bit quantizer (10.25 bits a value). Everything
else is equal, the learning rates (5e-3 inner, 0.5 outer) too. A first run at
the main job's rates (1e-2, 0.7) decided nothing: on one seed of three, every
cell with error feedback was 0.1 nats worse than on the other two.

Criterion, written before the run. Cells are compared seed by seed. The best
has the lowest mean final held-out loss; the default is the smallest payload
among it and those within one standard error of the mean difference from it.
A cell is worse than the default if the mean difference exceeds two standard
errors, otherwise undecided.

The first run could not tell the quantizers apart, and some decode to larger
values than others, which is in part a larger outer rate. `--rates` gives each
of them the same four outer rates, over 100 rounds; a quantizer then stands
for itself at the rate with its lowest mean, and the criterion is the same. The
lowest and the highest rate are of one seed: on it none was best at either.

Finished cells are skipped when started again. Writes
experiments/results/compression.csv and .png, or quantizers.csv and .png.
"""

import argparse
import csv
import dataclasses
import hashlib
import itertools
import pathlib
import statistics
import sys
from typing import Any

from covenant import config as config_lib
from covenant.emulate import host
from covenant.node import replica as replica_lib
from covenant.report import metrics
from covenant.report import plots

ROOT = pathlib.Path(__file__).parent
BASE = str(ROOT.parent / 'configs' / 'shakespeare.py')
# name -> what is set in optim.compression, and the outer learning rate
CELLS: dict[str, dict[str, Any]] = {
  'top-k, sign per block': dict(quantizer='sign', k=73),
  'top-k, sign per tensor': dict(quantizer='sign-tensor', k=75),
  'top-k, sign and magnitude': dict(quantizer='sign-magnitude', k=64),
  'top-k, statistical 2-bit': dict(quantizer='statistical', k=66),
  'top-k, linear 2-bit': dict(quantizer='linear', k=66),
  'top-k, float32': dict(quantizer='none', k=15),
  'random-k, sign per block': dict(kind='randomk', quantizer='sign', k=73),
  'DCT top-k, sign per block': dict(kind='dct', quantizer='sign', k=73),
  'no error feedback': dict(quantizer='sign', k=73, error_decay=0.0),
}
TUNED = (
  'top-k, sign per block',
  'top-k, sign per tensor',
  'top-k, sign and magnitude',
  'top-k, statistical 2-bit',
  'top-k, linear 2-bit',
)
RATES = (0.33, 0.5, 0.75, 1.0)
FIRST_SEED_ONLY = (0.33, 1.0)
COLUMNS = (
  'cell', 'outer_rate', 'seed', 'config', 'rounds', 'tokens', 'bytes_up',
  'payload_bytes', 'nats_per_byte', 'seconds',
)  # fmt: skip


def make_config(
  cell: str, outer: float, seed: int, rounds: int
) -> config_lib.Config:
  sets = [f'optim.compression.{k}={v}' for k, v in CELLS[cell].items()]
  warmup = min(50, 2 * rounds)
  config = config_lib.load(
    BASE,
    [
      *sets,
      'miners=8',
      'adversaries=',
      'gauntlet.evaluate=0',
      f'seed={seed}',
      f'rounds={rounds}',
      f'optim.inner.warmup_steps={warmup}',
      'optim.inner.learning_rate=5e-3',
      f'optim.outer.learning_rate={outer}',
    ],
  )
  return dataclasses.replace(config, name=f'{cell}, seed {seed}')


def run_cell(
  cell: str, outer: float, seed: int, rounds: int, root: pathlib.Path
) -> Any:
  """The row of one run, and its records."""
  config = make_config(cell, outer, seed, rounds)
  text = config_lib.to_json(config)
  digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
  workdir = root / digest
  host.run(config, workdir)
  records = metrics.read(workdir / 'metrics.jsonl')
  trained = [r for r in records if isinstance(r, metrics.Round)]
  last = [r for r in records if isinstance(r, metrics.Evaluation)][-1]
  row = dict(
    cell=cell,
    outer_rate=outer,
    seed=seed,
    config=digest,
    rounds=last.round,
    tokens=last.tokens,
    bytes_up=last.bytes_up,
    payload_bytes=replica_lib.Replica(config).spec.payload_bytes,
    nats_per_byte=round(last.nats_per_byte, 5),
    seconds=round(sum(r.seconds for r in trained), 1),
  )
  return row, records


def report(rows: list[dict[str, Any]]) -> str:
  """The table, best first, with the verdicts."""
  losses = {
    cell: [r['nats_per_byte'] for r in rows if r['cell'] == cell]
    for cell in dict.fromkeys(r['cell'] for r in rows)
  }
  size = {r['cell']: r['payload_bytes'] for r in rows}
  means = {cell: statistics.mean(x) for cell, x in losses.items()}

  def difference(cell: str, other: str) -> tuple[float, float]:
    """Mean over the seeds, and its standard error."""
    pairs = zip(losses[cell], losses[other], strict=True)
    gaps = [a - b for a, b in pairs]
    if len(gaps) < 2:
      return gaps[0], float('nan')
    return statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5

  def within(cell: str, other: str, errors: float) -> bool:
    gap, error = difference(cell, other)
    return gap <= errors * error or cell == other

  best = min(means, key=means.__getitem__)
  near = [cell for cell in means if within(cell, best, 1)]
  default = min(near, key=size.__getitem__)
  lines = ['cell | payload bytes | nats a byte | minus default | n | verdict']
  for cell in sorted(means, key=means.__getitem__):
    gap, error = difference(cell, default)
    verdict = 'undecided' if within(cell, default, 2) else 'worse'
    lines.append(
      f'{cell} | {size[cell]} | {means[cell]:.4f} | {gap:+.4f} +- {error:.4f} '
      f'| {len(losses[cell])} | {"DEFAULT" if cell == default else verdict}'
    )
  return '\n'.join(lines)


def _means(rows: list[dict[str, Any]]) -> dict[tuple[str, float], float]:
  """Cell and outer rate -> mean final loss over the seeds."""
  losses: dict[tuple[str, float], list[float]] = {}
  for r in rows:
    losses.setdefault((r['cell'], r['outer_rate']), []).append(
      r['nats_per_byte']
    )
  return {key: statistics.mean(x) for key, x in losses.items()}


def tuned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows of each cell at the rate where it is best."""
  rows = [r for r in rows if r['outer_rate'] not in FIRST_SEED_ONLY]
  means = _means(rows)
  best: dict[str, float] = {}
  for cell, rate in sorted(means, key=means.__getitem__):
    best.setdefault(cell, rate)
  return [r for r in rows if r['outer_rate'] == best[r['cell']]]


def rate_table(rows: list[dict[str, Any]]) -> str:
  """Mean final loss, a row a cell, a column an outer rate."""
  means = _means(rows)
  rates = sorted({rate for _, rate in means})
  lines = ['nats a byte at outer rate | ' + ' | '.join(map(str, rates))]
  for cell in dict.fromkeys(cell for cell, _ in means):
    numbers = (f'{means[cell, rate]:.4f}' for rate in rates)
    lines.append(f'{cell} | ' + ' | '.join(numbers))
  return '\n'.join(lines) + '\n'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  only = parser.add_mutually_exclusive_group()
  only.add_argument('--rates', action='store_true')
  only.add_argument('--quick', action='store_true')
  parser.add_argument('--seeds', type=int)
  parser.add_argument('--workdir', default='runs/compression')
  arguments = parser.parse_args()
  name, cells, rates, seeds, rounds = 'compression', [*CELLS], [0.5], 3, 60
  results = ROOT / 'results'
  if arguments.rates:
    name, cells, rates, rounds = 'quantizers', [*TUNED], [*RATES], 100
  elif arguments.quick:
    seeds, rounds, results = 1, 4, pathlib.Path(arguments.workdir)
  results.mkdir(parents=True, exist_ok=True)
  rows, curves = [], {}
  for seed, outer, cell in itertools.product(
    range(arguments.seeds or seeds), rates, cells
  ):
    if seed and outer in FIRST_SEED_ONLY:
      continue
    row, records = run_cell(
      cell, outer, seed, rounds, pathlib.Path(arguments.workdir)
    )
    rows.append(row)
    curves.setdefault((cell, outer), records)  # of the first seed
    print(
      f'{cell}, rate {outer}, seed {seed}: {row["nats_per_byte"]}',
      file=sys.stderr,
    )
    with open(results / f'{name}.csv', 'w', newline='') as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)
  if len(rates) > 1:
    print(rate_table(rows))
    rows = tuned(rows)
  chosen = {r['cell']: curves[r['cell'], r['outer_rate']] for r in rows}
  plots.compare(chosen, results / f'{name}.png', axis='bytes')
  print(report(rows))


if __name__ == '__main__':
  main()
