"""A study: runs that belong together, each done once, and judged.

A study names the runs it needs, given those that are done: first the sweep of
a learning rate, for example, and then three seeds at the best one.
experiments/runner.py does the missing ones and writes

  experiments/results/NAME.csv         a line per run
  experiments/results/curves/*.csv     the held-out losses of each run
  experiments/results/NAME.png         the figure

A run is named by a digest of all fields of its config that are not the default.
tests/experiments_test.py compares the results with the committed study. In
tables and errors ± is a standard deviation over seeds.
"""

import collections
import csv
import hashlib
import math
import pathlib
import statistics
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from covenant import config as config_lib
from covenant import metrics
from covenant.gauntlet import units
from covenant.gauntlet import work

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / 'results'
BASE = str(ROOT.parent / 'configs' / 'shakespeare.py')
GOLDEN = ROOT.parent / 'tests' / 'golden' / 'traces.json'
# Code whose results stand though its arithmetic was another: digest and commit.
EARLIER = {'4e42d073': '4203039'}
SEEDS = 3
MOST_SEEDS = 7  # of the cells of a claim that fewer seeds leave undecided
OUTER = (0.35, 0.7, 1.0)  # learning rates that are swept
# Common to all studies: 115,008 parameters on 2.3 million tokens, 20 per
# parameter; eight honest miners, all of which count.
COMMON = (
  'miners=8',
  'adversaries=',
  'gauntlet.evaluate=0',
  'rounds=100',
  'optim.inner_steps=15',
  'optim.inner.batch_size=3',
  'optim.inner.warmup_steps=75',
  # The better of the two best inner rates that experiments/methods.py finds for
  # SparseLoCo is 0.012; this one is stable with every seed.
  'optim.inner.learning_rate=0.006',
  'optim.outer.learning_rate=1',
  'optim.compression.error_decay=0.95',  # as published
  'eval.every=10',
  'checkpoint.every=100000',
)
QUICK = (
  'rounds=2',
  'eval.every=1',
  'eval.sequences=64',
  'optim.inner.warmup_steps=1',
)
_INDIFFERENT = ('name:', 'checkpoint.', 'devices.', 'network.', 'plan.')


class Program(Protocol):
  """Runs a config without nodes. Its `str` names all that it does."""

  def run(self, config: config_lib.Config) -> list[metrics.Evaluation]: ...


class Cell(NamedTuple):
  """One run: its name in tables, its seed, and its overrides."""

  name: str
  seed: int
  sets: tuple[str, ...] = ()  # `path.to.field=value`, on top of COMMON
  program: Program | None = None  # None: emulated nodes


class Run(NamedTuple):
  """A finished cell. Bytes are those of one peer over the whole run."""

  cell: str
  seed: int
  config: str  # digest of the config
  rounds: int
  tokens: int  # of all peers
  bytes_up: int
  bytes_down: int  # all other peers' payloads
  nats_per_byte: float  # held-out, at the end
  seconds: float  # of one core
  device: str
  code: str  # digest of the golden traces of the code that ran it
  machine: str = ''  # 'shared' with other work, 'own', or '': not recorded


class Point(NamedTuple):
  """One evaluation of a curve."""

  round: int
  tokens: int
  bytes_up: int  # of one peer
  nats_per_byte: float


class Verdict(NamedTuple):
  """The outcome of a claim."""

  claim: str  # number
  says: str  # the claim in words
  source: str
  criterion: str
  measured: str
  outcome: str  # PASS, FAIL or UNDECIDED
  cells: tuple[str, ...] = ()  # get more seeds while it is UNDECIDED


class Study(NamedTuple):
  """A module under experiments/.

  Attributes:
    name: the name of its results.
    plan: (runs so far, number of seeds) -> all cells needed.
    judge: (runs, folder that has their curves/) -> verdicts.
    draw: (runs, path of a PNG) -> None.
    table: runs -> Markdown, printed below the table of cells.
    brief: the plan of --quick, where `plan` has more cells of a kind than it
      takes to show that they work.
  """

  name: str
  plan: Callable[[Sequence[Run], int], Iterable[Cell]]
  judge: Callable[[Sequence[Run], pathlib.Path], Iterable[Verdict]]
  draw: Callable[[Sequence[Run], pathlib.Path], None]
  table: Callable[[Sequence[Run]], str] | None = None
  brief: Callable[[Sequence[Run], int], Iterable[Cell]] | None = None

  def quick(self) -> 'Study':
    """Returns the study with runs of seconds, which show only that it works.

    All have the same learning rates: one run stands for a whole grid of them.
    """

    def plan(runs: Sequence[Run], seeds: int) -> Iterator[Cell]:
      for cell in (self.brief or self.plan)(runs, seeds):
        config = make_config(cell)
        others = (s for s in cell.sets if 'learning_rate=' not in s)
        sets = (*others, *QUICK)
        if not config.islands:  # which have steps of their own
          # A fraction: cells that differ in their steps still do.
          steps = max(config.optim.inner_steps // 3, 1)
          sets = (*sets, f'optim.inner_steps={steps}', 'model.layers=1')
        yield cell._replace(sets=sets)

    return self._replace(plan=plan)


def make_config(cell: Cell, more: Iterable[str] = ()) -> config_lib.Config:
  sets = [*COMMON, f'seed={cell.seed}', *cell.sets, *more]
  return config_lib.load(BASE, sets)


def digest(config: config_lib.Config, program: Program | None = None) -> str:
  """Names a run by all fields of its config that are not the default.

  Fields that change no number of the run are left out.
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
  """Names the code by its golden traces (tests/emulate/host_test.py)."""
  return hashlib.blake2b(GOLDEN.read_bytes(), digest_size=4).hexdigest()


def rule() -> str:
  """Names the rule of pay, of which golden traces show little.

  >>> print(rule())
  units=4 parts=16 outlier=8 gain=0.85 proof=0.5..0.8 author=0.9 strictness=1.5
  """
  return (
    f'units={units.UNITS} parts={units.PARTS} outlier={units.OUTLIER:g} '
    f'gain={work.FULL_GAIN:g} proof={work.NO_PROOF:g}..{work.FULL_PROOF:g} '
    f'author={work.AUTHOR:g} strictness={work.STRICTNESS:g}'
  )


def write_csv(path: pathlib.Path, rows: Sequence[Any]) -> None:
  """Writes named tuples of one type."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w', newline='') as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(rows[0]._fields)
    writer.writerows(rows)


def read_csv(path: pathlib.Path, kind: type[Any]) -> list[Any]:
  """Reads the rows of a file that `write_csv` wrote, as named tuples `kind`."""
  types = typing.get_type_hints(kind)
  with open(path, newline='') as file:
    return [
      kind(**{name: types[name](text) for name, text in row.items()})
      for row in csv.DictReader(file)
    ]


def with_more_seeds(
  cells: Iterable[Cell], seeds: Mapping[str, int]
) -> list[Cell]:
  """Returns a plan with more seeds of some cells, in the order of the plan.

  Args:
    cells: the plan with `SEEDS` seeds.
    seeds: the number of seeds of each cell that has more.
  """
  found = list(cells)
  last = {cell.name: cell for cell in found}
  for name, cell in last.items():
    more = range(cell.seed + 1, seeds.get(name, 0))
    place = found.index(cell) + 1
    found[place:place] = [cell._replace(seed=seed) for seed in more]
  return found


def undecided(
  verdicts: Iterable[Verdict], runs: Iterable[Run]
) -> dict[str, int]:
  """Returns the seeds that undecided claims ask for, by cell.

  Each cell of an undecided claim gets one seed more than it has, up to
  `MOST_SEEDS`.
  """
  names = {
    name for v in verdicts if v.outcome == 'UNDECIDED' for name in v.cells
  }
  has = collections.Counter(run.cell for run in runs)
  return {name: n + 1 for name in names if (n := has[name]) < MOST_SEEDS}


def curve_name(run: Run) -> str:
  """Returns the name of a run's curve: two codes may have run one config."""
  earlier = run.code in EARLIER
  return f'{run.config}.csv' if earlier else f'{run.config}-{run.code}.csv'


def curve(run: Run, results: pathlib.Path) -> list[Point]:
  """Reads the held-out losses of a run from the folder of its results."""
  return read_csv(results / 'curves' / curve_name(run), Point)


def losses(runs: Iterable[Run], cell: str) -> dict[int, float]:
  """Maps seeds to final held-out losses in nats per byte."""
  return {r.seed: r.nats_per_byte for r in runs if r.cell == cell}


def best(runs: Sequence[Run], cells: Iterable[str]) -> str:
  """Returns the finished cell with the lowest mean final loss.

  The mean is over the seeds that all of them have.
  """
  found = {cell: losses(runs, cell) for cell in cells}
  found = {cell: of for cell, of in found.items() if of}
  seeds = set.intersection(*(set(of) for of in found.values()))
  return min(
    found, key=lambda cell: statistics.mean(found[cell][s] for s in seeds)
  )


class Gap(NamedTuple):
  """The difference of two cells' losses, seed by seed."""

  mean: float  # nats per byte
  deviation: float  # standard deviation over the seeds
  n: int

  @property
  def error(self) -> float:
    """Standard error of the mean; nan with a single seed."""
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
  """Returns the mean and the standard deviation of one value per seed."""
  n = len(values)
  deviation = statistics.stdev(values) if n > 1 else math.nan
  return Gap(statistics.mean(values), deviation, n)


def at_most(found: Gap, bound: float = 0.0) -> str:
  """Decides if a gap is at most `bound`, by two standard errors."""
  return _decide(bound - found.mean, found.error)


def more_than(found: Gap, bound: float = 0.0) -> str:
  """Decides if a gap is more than `bound`, by two standard errors."""
  return _decide(found.mean - bound, found.error)


def _decide(margin: float, error: float) -> str:
  if not abs(margin) > 2 * error:  # also with one seed, whose error is nan
    return 'UNDECIDED'
  return 'PASS' if margin > 0 else 'FAIL'


def tuned(
  runs: Sequence[Run],
  name: str,
  sets: tuple[str, ...],
  seeds: int,
  outer: Sequence[float] = OUTER,
) -> Iterator[Cell]:
  """Yields the cells of a method at the best of some outer learning rates."""
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
  """Yields the cells of a method at the best of some overrides.

  All candidates run with seed 0; then the best one gets all seeds as `name`.
  """
  for cell, sets in candidates.items():
    yield Cell(cell, 0, sets)
  if candidates.keys() <= {r.cell for r in runs}:
    for seed in range(seeds):
      yield Cell(name, seed, candidates[best(runs, candidates)])


def table(runs: Sequence[Run]) -> str:
  """Returns a line per cell: mean and standard deviation over its seeds."""
  lines = ['cell | n | nats per byte | bytes up | bytes down | core seconds']
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


def report(verdicts: Iterable[Verdict]) -> None:
  for verdict in verdicts:
    print(f'{verdict.claim} {verdict.outcome}: {verdict.says}')
    print(f'  {verdict.criterion}: {verdict.measured}')
