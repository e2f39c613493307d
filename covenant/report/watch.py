"""Runs an emulation in a terminal: live line, summary, figures and page."""

import importlib
import pathlib
import sys
import threading
from collections.abc import Callable

from covenant import config as config_lib
from covenant import extras
from covenant import metrics
from covenant.adversaries import registry
from covenant.emulate import emulation
from covenant.node import multihost as multihost_lib
from covenant.report import page
from covenant.report import progress
from covenant.train import shared_state

_PLOTS = 'covenant.report.plots'  # it starts slowly


def run(
  config: config_lib.Config,
  workdir: str,
  stop: Callable[[], bool],
  process_group: multihost_lib.ProcessGroup,
  profile: int | None = None,
) -> None:
  """Runs it, and prints where the results are.

  Args:
    config: the config of the run.
    workdir: the folder for all output.
    stop: returns True once the run is to end after this round.
    process_group: the processes that share the emulation.
    profile: the round to trace; None: none.
  """
  extras.require('run', 'matplotlib')
  # Beside the first round, which compiles.
  threading.Thread(
    target=importlib.import_module, args=(_PLOTS,), daemon=True
  ).start()
  bad, figures = registry.dishonest(config), list[pathlib.Path]()
  records: list[metrics.Record] = []
  with progress.Progress(config.rounds, stream=sys.stderr) as bar:

    def observe(record: metrics.Record) -> None:
      records.append(record)
      bar.update(record)

    def draw() -> None:
      plots = importlib.import_module(_PLOTS)
      figures.extend(plots.write_figures(records, f'{workdir}/figures', bad))

    outcome = emulation.run(
      config, workdir, observe, stop, process_group, profile, draw
    )
  print(f'\n{config.name}\n{progress.summary(records, bad)}')
  print(f'parameters: {shared_state.fingerprint(outcome.state.shared.params)}')
  print(f'everything is in {workdir}: config.json, metrics.jsonl, tensorboard/')
  print('figures:', *figures)
  print(f'report: {page.write(workdir)}')
  if not outcome.finished:
    print(
      f'\nstopped after round {outcome.state.counters.round} of '
      f'{config.rounds}. To go on: the same command with --workdir={workdir}'
    )
