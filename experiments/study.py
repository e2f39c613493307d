"""Runs that belong together: each done once, side by side, and judged.

A study says which runs it needs, given those that are done: first the sweep
of a learning rate, say, and then three seeds at the best. `main` runs what is
missing, so that a study which was killed goes on where it was, and a run that
two studies need is done once. It writes

  experiments/results/NAME.csv         a line a run
  experiments/results/curves/*.csv     the held-out losses of each run
  experiments/results/NAME.png         what `draw` makes of them

and prints a verdict for each claim. The name of a run is a digest of all that
its config has otherwise than the defaults: tests/experiments_test.py holds
the results against what the committed study asks for.
"""

import argparse
import concurrent.futures
import csv
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import statistics
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from absl import logging

from covenant import cli
from covenant import config as config_lib
from covenant import files
from covenant import metrics
from covenant.emulate import host

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / 'results'
BASE = str(ROOT.parent / 'configs' / 'shakespeare.py')
GOLDEN = ROOT.parent / 'tests' / 'golden' / 'traces.json'
SEEDS = 3
OUTER = (0.35, 0.7, 1.0)  # learning rates that are swept
# What is the same in all studies: 115,136 parameters on 2.3 million tokens, 20
# a parameter; eight honest miners who all count.
COMMON = (
  'miners=8',
  'adversaries=',
  'gauntlet.evaluate=0',
  'rounds=100',
  'optim.inner_steps=15',
  'optim.inner.batch_size=3',
  'optim.inner.warmup_steps=75',
  # Of the two best that experiments/methods.py finds for SparseLoCo, the one
  # with the lower inner rate, which no seed has found unstable.
  'optim.inner.learning_rate=0.006',
  'optim.outer.learning_rate=1',
  'eval.every=10',
  'checkpoint.every=100000',
)
_INDIFFERENT = ('name:', 'checkpoint.', 'devices.', 'network.', 'plan.')


class Program(Protocol):
  """Runs a config otherwise than the nodes do. Its text says all it does."""

  def run(self, config: config_lib.Config) -> list[metrics.Evaluation]: ...


class Cell(NamedTuple):
  """One run: what it is called in tables, its seed, and how it differs."""

  name: str
  seed: int
  sets: tuple[str, ...] = ()  # `path.to.field=value`, on top of COMMON
  program: Program | None = None  # None: emulated nodes


class Run(NamedTuple):
  """A cell that is done. Bytes are of one peer over the whole run."""

  cell: str
  seed: int
  config: str  # digest
  rounds: int
  tokens: int  # of all peers
  bytes_up: int
  bytes_down: int  # it fetches all others' payloads
  nats_per_byte: float  # held-out, at the end
  seconds: float  # of one core
  device: str
  code: str  # digest of the golden traces: what the code computed then


class Point(NamedTuple):
  """Of a curve: an evaluation."""

  round: int
  tokens: int
  bytes_up: int  # of one peer
  nats_per_byte: float


class Verdict(NamedTuple):
  """What became of a claim."""

  claim: str  # its number
  says: str
  source: str
  criterion: str
  measured: str
  outcome: str  # PASS, FAIL or UNDECIDED


class Study(NamedTuple):
  """What a module under experiments/ defines.

  Attributes:
    name: of its results.
    plan: (runs so far, seeds) -> all cells that these call for.
    judge: runs -> verdicts.
    draw: (runs, path of a PNG) -> None.
    quick: overrides of a run that takes seconds.
  """

  name: str
  plan: Callable[[Sequence[Run], int], Iterable[Cell]]
  judge: Callable[[Sequence[Run]], Iterable[Verdict]]
  draw: Callable[[Sequence[Run], pathlib.Path], None]
  quick: tuple[str, ...] = (
    'rounds=4',
    'eval.every=2',
    'optim.inner.warmup_steps=2',
  )


def make_config(cell: Cell, more: Iterable[str] = ()) -> config_lib.Config:
  sets = [*COMMON, f'seed={cell.seed}', *cell.sets, *more]
  return config_lib.load(BASE, sets)


def digest(config: config_lib.Config, program: Program | None = None) -> str:
  """Names a run by all that its config has otherwise than the defaults.

  But for what changes no number of it.
  """
  lines = [
    line
    for line in config_lib.differences(config_lib.Config(), config)
    if not line.startswith(_INDIFFERENT)
  ]
  if program is not None:
    lines.append(str(program))
  text = '\n'.join(lines)
  return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def code() -> str:
  """Names what the training methods compute (tests/emulate/host_test.py)."""
  return hashlib.blake2b(GOLDEN.read_bytes(), digest_size=4).hexdigest()


def execute(cell: Cell, more: Sequence[str], work: pathlib.Path) -> Run:
  """Runs a cell, or reads what it did when it ran; writes its curve.

  A run that was interrupted goes on, or begins anew.
  """
  config = make_config(cell, more)
  name = digest(config, cell.program)
  folder = work / name
  done = folder / 'run.json'
  if done.exists():
    run = Run(**json.loads(done.read_text()))
    return run._replace(cell=cell.name)
  began = time.process_time()
  if cell.program is None:
    evaluations = _emulate(config, folder)
  else:
    evaluations = cell.program.run(config)
  seconds = time.process_time() - began
  last = evaluations[-1]
  write_csv(
    work / 'curves' / f'{name}.csv',
    [
      Point(e.round, e.tokens, e.bytes_up // config.miners, e.nats_per_byte)
      for e in evaluations
    ],
  )
  run = Run(
    cell.name,
    cell.seed,
    name,
    last.round,
    last.tokens,
    last.bytes_up // config.miners,
    last.bytes_up * (config.miners - 1) // config.miners,
    round(last.nats_per_byte, 5),
    round(seconds, 1),
    jax.devices()[0].device_kind,
    code(),
  )
  files.write(done, json.dumps(run._asdict()))
  return run


def _emulate(
  config: config_lib.Config, folder: pathlib.Path
) -> list[metrics.Evaluation]:
  host.run(config, folder)
  shutil.rmtree(folder / 'checkpoints')
  records = metrics.read(folder / 'metrics.jsonl')
  return [r for r in records if isinstance(r, metrics.Evaluation)]


def write_csv(path: pathlib.Path, rows: Sequence[Any]) -> None:
  """Writes named tuples of one type."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w', newline='') as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(rows[0]._fields)
    writer.writerows(rows)


def read_csv(path: pathlib.Path, kind: type[Any]) -> list[Any]:
  """The rows of a file that `write_csv` wrote, as named tuples `kind`."""
  types = typing.get_type_hints(kind)
  with open(path, newline='') as file:
    return [
      kind(**{name: types[name](text) for name, text in row.items()})
      for row in csv.DictReader(file)
    ]


def curve(run: Run, results: pathlib.Path = RESULTS) -> list[Point]:
  """The held-out losses of a run."""
  return read_csv(results / 'curves' / f'{run.config}.csv', Point)


def losses(runs: Iterable[Run], cell: str) -> dict[int, float]:
  """Seed -> final held-out loss in nats a byte."""
  return {r.seed: r.nats_per_byte for r in runs if r.cell == cell}


def best(runs: Sequence[Run], cells: Iterable[str]) -> str:
  """Of the cells that are done the one with the least mean final loss.

  Of seed 0 alone if that is what all have in common.
  """
  found = {cell: losses(runs, cell) for cell in cells}
  found = {cell: of for cell, of in found.items() if of}
  seeds = set.intersection(*(set(of) for of in found.values()))
  return min(
    found, key=lambda cell: statistics.mean(found[cell][s] for s in seeds)
  )


class Gap(NamedTuple):
  """How much higher one cell's loss is than another's, seed by seed."""

  mean: float  # nats a byte
  deviation: float  # standard deviation over the seeds
  n: int

  @property
  def error(self) -> float:
    """Standard error of the mean; not a number of a single seed."""
    return self.deviation / math.sqrt(self.n)

  def __str__(self) -> str:
    return f'{self.mean:+.4f} ± {self.deviation:.4f} (n = {self.n})'


def gap(runs: Iterable[Run], cell: str, other: str) -> Gap:
  """The loss of `cell` minus that of `other`, over the seeds of both."""
  runs = list(runs)
  here, there = losses(runs, cell), losses(runs, other)
  differences = [here[seed] - there[seed] for seed in here if seed in there]
  if not differences:
    raise LookupError(f'no seed of both {cell!r} and {other!r} is done')
  return spread(differences)


def spread(values: Sequence[float]) -> Gap:
  """Of one value a seed."""
  n = len(values)
  deviation = statistics.stdev(values) if n > 1 else math.nan
  return Gap(statistics.mean(values), deviation, n)


def at_most(found: Gap, bound: float = 0.0) -> str:
  """Whether a gap is at most `bound`: two standard errors decide."""
  return _decide(bound - found.mean, found.error)


def more_than(found: Gap, bound: float = 0.0) -> str:
  """Whether a gap is more than `bound`: two standard errors decide."""
  return _decide(found.mean - bound, found.error)


def _decide(margin: float, error: float) -> str:
  if not abs(margin) > 2 * error:  # also of one seed, whose error is unknown
    return 'UNDECIDED'
  return 'PASS' if margin > 0 else 'FAIL'


def tuned(
  runs: Sequence[Run],
  name: str,
  sets: tuple[str, ...],
  seeds: int,
  outer: Sequence[float] = OUTER,
) -> Iterator[Cell]:
  """The cells of one that gets the best of some outer learning rates."""
  rates = {
    f'{name}, {rate:g}': (*sets, f'optim.outer.learning_rate={rate:g}')
    for rate in outer
  }
  yield from swept(runs, name, rates, seeds)


def swept(
  runs: Sequence[Run],
  name: str,
  candidates: Mapping[str, tuple[str, ...]],
  seeds: int,
) -> Iterator[Cell]:
  """The cells of one that gets the best overrides of some.

  They are run with seed 0; once that is done, `name` has all seeds.
  """
  for cell, sets in candidates.items():
    yield Cell(cell, 0, sets)
  if candidates.keys() <= {r.cell for r in runs}:
    for seed in range(seeds):
      yield Cell(name, seed, candidates[best(runs, candidates)])


def table(runs: Sequence[Run]) -> str:
  """A line a cell: mean and deviation over its seeds."""
  lines = ['cell | n | nats a byte | bytes up | bytes down | core seconds']
  for cell in dict.fromkeys(r.cell for r in runs):
    of = [r for r in runs if r.cell == cell]
    found = [r.nats_per_byte for r in of]
    spread = f' ± {statistics.stdev(found):.4f}' if len(found) > 1 else ''
    lines.append(
      f'{cell} | {len(of)} | {statistics.mean(found):.4f}{spread} | '
      f'{of[0].bytes_up:,} | {of[0].bytes_down:,} | '
      f'{statistics.mean(r.seconds for r in of):.0f}'
    )
  return '\n'.join(lines)


def _begin(cores: Any) -> None:
  """A process for runs: one core is its own."""
  index = cores.get()
  if hasattr(os, 'sched_setaffinity'):
    own = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {own[index % len(own)]})
  logging.set_verbosity(logging.WARNING)  # Orbax is talkative
  cli.keep_compilations()


def workers(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
  """Processes for runs side by side, each on a core of its own."""
  context = multiprocessing.get_context('spawn')
  cores = context.Queue()
  for index in range(jobs):
    cores.put(index)
  return concurrent.futures.ProcessPoolExecutor(
    jobs, context, initializer=_begin, initargs=(cores,)
  )


def complete(
  study: Study, seeds: int, more: Sequence[str], work: pathlib.Path, jobs: int
) -> list[Run]:
  """All runs of a study, in the order of its plan. Shows progress."""
  done: dict[tuple[str, int], Run] = {}
  began = time.monotonic()
  with workers(jobs) as pool:
    while True:
      cells = list(study.plan(list(done.values()), seeds))
      missing = [c for c in cells if (c.name, c.seed) not in done]
      if not missing:
        return [done[c.name, c.seed] for c in cells]
      futures = {pool.submit(execute, c, more, work): c for c in missing}
      for i, future in enumerate(concurrent.futures.as_completed(futures), 1):
        cell, run = futures[future], future.result()
        done[cell.name, cell.seed] = run
        left = (time.monotonic() - began) / len(done) * (len(missing) - i)
        print(
          f'{study.name} {len(done)}/{len(done) + len(missing) - i}: '
          f'{cell.name}, seed {cell.seed}: {run.nats_per_byte:.4f} nats a byte '
          f'in {run.seconds:.0f} s; {left / 60:.0f} min left at least',
          file=sys.stderr,
          flush=True,
        )


def arguments(doc: str | None) -> argparse.Namespace:
  """The flags that all studies have."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='seconds a run')
  parser.add_argument('--seeds', type=int, default=SEEDS)
  parser.add_argument(
    '--workdir', default='runs/study', help='where finished runs stay'
  )
  parser.add_argument(
    '--jobs', type=int, default=os.cpu_count(), help='runs side by side'
  )
  return parser.parse_args()


def main(study: Study, doc: str | None) -> argparse.Namespace:
  """What `python -m experiments.NAME` does; returns its arguments."""
  said = arguments(doc)
  work, results = pathlib.Path(said.workdir), RESULTS
  seeds, more = said.seeds, ()
  if said.quick:
    work = results = work / 'quick'
    seeds, more = 1, study.quick
  runs = complete(study, seeds, more, work, said.jobs)
  write_csv(results / f'{study.name}.csv', runs)
  if work != results:
    (results / 'curves').mkdir(parents=True, exist_ok=True)
    for run in runs:
      name = f'{run.config}.csv'
      shutil.copy(work / 'curves' / name, results / 'curves' / name)
  study.draw(runs, results / f'{study.name}.png')
  print(table(runs))
  report(study.judge(runs))
  return said


def report(verdicts: Iterable[Verdict]) -> None:
  for verdict in verdicts:
    print(f'{verdict.claim} {verdict.outcome}: {verdict.says}')
    print(f'  {verdict.criterion}: {verdict.measured}')
