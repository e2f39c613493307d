"""Runs a study: what is missing, side by side, then its table and verdicts.

A study that was killed goes on where it was, and a run that two studies need is
done once. Before runs begin it prints how many core minutes they will take,
from the seconds of earlier ones. Cells run in parallel, each on one core.

While a claim is UNDECIDED that names its cells, each of them gets another seed,
up to `study.MOST_SEEDS`, as long as the core minutes of `--budget` last.

`--part=i/n` does the i-th of n parts, from 1 on, with a workdir that all parts
share, in a Slurm array for example:

  sbatch --array=1-8 --wrap \
    'python -m experiments.methods --part=$SLURM_ARRAY_TASK_ID/8'

A part ends when the rest of a stage is up to the others. When all have ended,
the same command goes on with the next stage, and the command without `--part`
writes the results.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import logging

from covenant import config as config_lib
from covenant import files
from covenant import metrics
from covenant import startup
from covenant.emulate import emulation
from experiments import costs
from experiments import study as study_lib


def execute(
  cell: study_lib.Cell, more: Sequence[str], work: pathlib.Path
) -> study_lib.Run:
  """Runs a cell and writes its curve, or reads the result of an earlier run.

  An interrupted run is resumed, or starts again.

  Args:
    cell: the run.
    more: overrides on top of the cell's.
    work: the folder of all finished runs.
  """
  config = study_lib.make_config(cell, more)
  name = study_lib.digest(config, cell.program)
  folder = work / name
  done = folder / 'run.json'
  if done.exists():
    run = study_lib.Run(**json.loads(done.read_text()))
    return run._replace(cell=cell.name)
  began = time.process_time()
  shared = _is_shared()
  if cell.program is None:
    evaluations = _emulate(config, folder)
  else:
    evaluations = cell.program.run(config)
  seconds = time.process_time() - began
  last = evaluations[-1]
  run = study_lib.Run(
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
    study_lib.code(),
    'shared' if shared or _is_shared() else 'own',
  )
  study_lib.write_csv(
    work / 'curves' / study_lib.curve_name(run),
    [
      study_lib.Point(
        e.round, e.tokens, e.bytes_up // config.miners, e.nats_per_byte
      )
      for e in evaluations
    ],
  )
  files.write(done, json.dumps(run._asdict()))
  return run


def _is_shared() -> bool:
  """Returns whether the machine had more work than cores in the last minute."""
  return os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5


def _emulate(
  config: config_lib.Config, folder: pathlib.Path
) -> list[metrics.Evaluation]:
  emulation.run(config, folder)
  shutil.rmtree(folder / 'checkpoints')
  records = metrics.read(folder / 'metrics.jsonl')
  return [r for r in records if isinstance(r, metrics.Evaluation)]


def _begin() -> None:
  """Starts a worker process that computes on one core, whichever is free."""
  if hasattr(os, 'sched_setaffinity'):
    # JAX makes a thread for each core that it may use when it starts.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    jax.devices()
    for thread in os.listdir('/proc/self/task'):
      with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.sched_setaffinity(int(thread), cores)
  logging.set_verbosity(logging.WARNING)  # Orbax logs much
  startup.keep_compilations()


def workers(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
  """Returns processes for runs side by side, which compute on one core each."""
  context = multiprocessing.get_context('spawn')
  return concurrent.futures.ProcessPoolExecutor(
    jobs, context, initializer=_begin
  )


class Part(NamedTuple):
  """The i-th of n parts of a study's runs, from 1 on."""

  index: int = 1
  of: int = 1

  def has(self, cell: study_lib.Cell, more: Sequence[str]) -> bool:
    config = study_lib.make_config(cell, more)
    name = study_lib.digest(config, cell.program)
    return int(name, 16) % self.of == self.index - 1


def read_part(text: str) -> Part:
  """Reads `i/n`, for argparse."""
  try:
    part = Part(*map(int, text.split('/')))
  except (TypeError, ValueError):
    part = Part(0, 0)
  if not 1 <= part.index <= part.of:
    raise argparse.ArgumentTypeError(
      f'expected i/n with 1 <= i <= n, such as 2/8, got {text!r}'
    )
  return part


class Options(NamedTuple):
  """The options of a study's run.

  Attributes:
    work: the folder of finished runs.
    seeds: the number of seeds of all cells.
    jobs: runs side by side.
    more: overrides on top of all cells'.
    budget: core minutes after which no claim gets more seeds.
    part: the runs that this process does.
  """

  work: pathlib.Path
  seeds: int = study_lib.SEEDS
  jobs: int = 1
  more: tuple[str, ...] = ()
  budget: float = math.inf
  part: Part = Part()


def complete(
  study: study_lib.Study, options: Options
) -> list[study_lib.Run] | None:
  """Does all runs of a study that are missing and shows progress.

  Returns:
    All runs, in the order of the study's plan; None if other parts have not
    done theirs.
  """
  done: dict[tuple[str, int], study_lib.Run] = {}
  extra: dict[str, int] = {}
  with workers(options.jobs) as pool:
    while True:
      cells = list(study.plan(list(done.values()), options.seeds))
      if extra:
        cells = study_lib.with_more_seeds(cells, extra)
      missing = [c for c in cells if (c.name, c.seed) not in done]
      if missing:
        own = [c for c in missing if _is_own(c, options)]
        _run(study, own, options, pool, done)
        if len(own) < len(missing):
          print(
            f'{study.name}: {len(missing) - len(own)} runs of other parts are '
            'missing; run this again when they have ended',
            file=sys.stderr,
          )
          return None
        continue
      runs = [done[c.name, c.seed] for c in cells]
      minutes = sum(run.seconds for run in runs) / 60
      wanted = study_lib.undecided(study.judge(runs, options.work), runs)
      if not wanted or minutes >= options.budget:
        return runs
      extra.update(wanted)


def _is_own(cell: study_lib.Cell, options: Options) -> bool:
  """Returns whether this process does a run, or finds it done."""
  if options.part.has(cell, options.more):
    return True
  config = study_lib.make_config(cell, options.more)
  name = study_lib.digest(config, cell.program)
  return (options.work / name / 'run.json').exists()


def _run(
  study: study_lib.Study,
  cells: Sequence[study_lib.Cell],
  options: Options,
  pool: concurrent.futures.ProcessPoolExecutor,
  done: dict[tuple[str, int], study_lib.Run],
) -> None:
  """Runs cells side by side and adds their results to `done`."""
  seconds = costs.seconds(cells, options.more)
  print(
    f'{study.name}: {len(cells)} runs, about {seconds / 60:.0f} core minutes '
    f'in all, {seconds / 60 / options.jobs:.0f} minutes with {options.jobs} at '
    'once; runs that their results call for are not counted',
    file=sys.stderr,
    flush=True,
  )
  same: dict[str, list[study_lib.Cell]] = {}  # cells of one run, by its digest
  for cell in cells:
    config = study_lib.make_config(cell, options.more)
    same.setdefault(study_lib.digest(config, cell.program), []).append(cell)
  futures = {
    pool.submit(execute, of[0], options.more, options.work): of
    for of in same.values()
  }
  for i, future in enumerate(concurrent.futures.as_completed(futures), 1):
    of, run = futures[future], future.result()
    done.update({(c.name, c.seed): run._replace(cell=c.name) for c in of})
    print(
      f'{study.name} {i}/{len(same)}: {of[0].name}, seed {of[0].seed}: '
      f'{run.nats_per_byte:.4f} nats per byte in {run.seconds:.0f} s',
      file=sys.stderr,
      flush=True,
    )


def arguments(doc: str | None) -> argparse.Namespace:
  """Parses the flags that all studies have."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--quick', action='store_true', help='runs of seconds, one seed'
  )
  parser.add_argument(
    '--draw', action='store_true', help='only draws what was measured'
  )
  parser.add_argument('--seeds', type=int, default=study_lib.SEEDS)
  parser.add_argument(
    '--workdir',
    default='runs/study',
    help='the folder of finished runs; of all results with --quick',
  )
  parser.add_argument(
    '--jobs', type=int, default=_cores(), help='runs side by side'
  )
  parser.add_argument(
    '--part',
    type=read_part,
    default=Part(),
    help='i/n: the i-th of n parts of the runs, without results',
  )
  parser.add_argument(
    '--budget',
    type=float,
    default=math.inf,
    help='core minutes after which no claim gets more seeds',
  )
  return parser.parse_args()


def _cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def main(study: study_lib.Study, doc: str | None) -> argparse.Namespace:
  """Runs `python -m experiments.NAME`; returns its arguments."""
  options = arguments(doc)
  work, results = pathlib.Path(options.workdir), study_lib.RESULTS
  seeds = options.seeds
  if options.draw:
    runs = study_lib.read_csv(results / f'{study.name}.csv', study_lib.Run)
    study.draw(runs, results / f'{study.name}.png')
    return options
  if options.quick:
    work = results = work / 'quick'
    seeds, study = 1, study.quick()
  runs = complete(
    study,
    Options(
      work,
      seeds,
      options.jobs,
      budget=0.0 if options.quick else options.budget,
      part=options.part,
    ),
  )
  if runs is None or options.part.of > 1:
    return options
  study_lib.write_csv(results / f'{study.name}.csv', runs)
  if work != results:
    (results / 'curves').mkdir(parents=True, exist_ok=True)
    for run in runs:
      name = study_lib.curve_name(run)
      shutil.copy(work / 'curves' / name, results / 'curves' / name)
  study.draw(runs, results / f'{study.name}.png')
  print(study_lib.table(runs))
  if study.table:
    print(study.table(runs))
  study_lib.report(study.judge(runs, results))
  return options
