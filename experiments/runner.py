"""Runs a study: what is missing, side by side, then its table and verdicts.

A study that was killed goes on where it was, and a run that two studies need is
done once.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from covenant import config as config_lib
from covenant import files
from covenant import metrics
from covenant import startup
from covenant.emulate import emulation
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
  if cell.program is None:
    evaluations = _emulate(config, folder)
  else:
    evaluations = cell.program.run(config)
  seconds = time.process_time() - began
  last = evaluations[-1]
  study_lib.write_csv(
    work / 'curves' / f'{name}.csv',
    [
      study_lib.Point(
        e.round, e.tokens, e.bytes_up // config.miners, e.nats_per_byte
      )
      for e in evaluations
    ],
  )
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
  )
  files.write(done, json.dumps(run._asdict()))
  return run


def _emulate(
  config: config_lib.Config, folder: pathlib.Path
) -> list[metrics.Evaluation]:
  emulation.run(config, folder)
  shutil.rmtree(folder / 'checkpoints')
  records = metrics.read(folder / 'metrics.jsonl')
  return [r for r in records if isinstance(r, metrics.Evaluation)]


def _begin(cores: Any) -> None:
  """Starts a worker process on a core of its own."""
  index = cores.get()
  if hasattr(os, 'sched_setaffinity'):
    own = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {own[index % len(own)]})
  logging.set_verbosity(logging.WARNING)  # Orbax logs much
  startup.keep_compilations()


def workers(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
  """Returns processes for runs side by side, each on a core of its own."""
  context = multiprocessing.get_context('spawn')
  cores = context.Queue()
  for index in range(jobs):
    cores.put(index)
  return concurrent.futures.ProcessPoolExecutor(
    jobs, context, initializer=_begin, initargs=(cores,)
  )


def complete(
  study: study_lib.Study,
  seeds: int,
  more: Sequence[str],
  work: pathlib.Path,
  jobs: int,
) -> list[study_lib.Run]:
  """Does all runs of a study that are missing and shows progress.

  Returns:
    All runs, in the order of the study's plan.
  """
  done: dict[tuple[str, int], study_lib.Run] = {}
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
          f'{cell.name}, seed {cell.seed}: {run.nats_per_byte:.4f} nats per '
          f'byte in {run.seconds:.0f} s; at least {left / 60:.0f} min left',
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
  parser.add_argument('--seeds', type=int, default=study_lib.SEEDS)
  parser.add_argument(
    '--workdir',
    default='runs/study',
    help='the folder of finished runs; of all results with --quick',
  )
  parser.add_argument(
    '--jobs', type=int, default=os.cpu_count(), help='runs side by side'
  )
  return parser.parse_args()


def main(study: study_lib.Study, doc: str | None) -> argparse.Namespace:
  """Runs `python -m experiments.NAME`; returns its arguments."""
  options = arguments(doc)
  work, results = pathlib.Path(options.workdir), study_lib.RESULTS
  seeds = options.seeds
  if options.quick:
    work = results = work / 'quick'
    seeds, study = 1, study.quick()
  runs = complete(study, seeds, (), work, options.jobs)
  study_lib.write_csv(results / f'{study.name}.csv', runs)
  if work != results:
    (results / 'curves').mkdir(parents=True, exist_ok=True)
    for run in runs:
      name = f'{run.config}.csv'
      shutil.copy(work / 'curves' / name, results / 'curves' / name)
  study.draw(runs, results / f'{study.name}.png')
  print(study_lib.table(runs))
  study_lib.report(study.judge(runs, results))
  return options
