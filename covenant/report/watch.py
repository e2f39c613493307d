"""Runs an emulation before people: live line, summary, figures and page."""

import contextlib
import importlib
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence

from covenant import config as config_lib
from covenant import extras
from covenant import metrics
from covenant import startup
from covenant.adversaries import registry
from covenant.emulate import emulation
from covenant.emulate import results
from covenant.node import multihost as multihost_lib
from covenant.report import page
from covenant.report import progress
from covenant.train import shared_state

_PLOTS = 'covenant.report.plots'  # it starts slowly


def run(
  config: config_lib.Config | str,
  overrides: Iterable[str] = (),
  *,
  workdir: str | os.PathLike[str] | None = None,
  callbacks: Sequence[results.Callback] = (),
) -> results.Results:
  """Runs an emulation as `covenant --config=...` does, and returns its results.

  A terminal or notebook shows its progress and a summary. The folder gets the
  figures and report.html. Ctrl-C, or interrupting the kernel, ends it after
  the round, with a checkpoint; the same call with this `workdir` goes on.

  Args:
    config: a config, or its name or file, such as `shakespeare:smoke`.
    overrides: changes of fields, such as `optim.inner_steps=20`.
    workdir: the folder of the run. Default: runs/DATE-NAME.
    callbacks: functions of each record, as `emulate` has them.

  Raises:
    ConfigError: the config cannot run here, or `workdir` has another one's.
    DivergedError: the round of every miner is lost.
  """
  startup.keep_compilations()
  config = results.prepare(config, overrides)
  folder = results.default_workdir(config, workdir)
  signals: contextlib.AbstractContextManager[Callable[[], bool]]
  signals = contextlib.nullcontext(lambda: False)
  if threading.current_thread() is threading.main_thread():
    signals = startup.stoppable('stopping soon, with a checkpoint')
  with signals as stop:
    group = multihost_lib.ProcessGroup()
    outcome = show(config, folder, stop, group, callbacks=callbacks)
  made = results.read_results(folder)
  return made._replace(params=outcome.state.shared.params)


def show(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  stop: Callable[[], bool],
  process_group: multihost_lib.ProcessGroup,
  profile: int | None = None,
  callbacks: Sequence[results.Callback] = (),
) -> emulation.Outcome:
  """Runs it, and prints where the results are.

  Args:
    config: the config of the run.
    workdir: the folder for all output.
    stop: returns True once the run is to end.
    process_group: the processes that share the emulation.
    profile: the round to trace; None: none.
    callbacks: called with each record; True ends the run after this round.
  """
  extras.require('run', 'matplotlib')
  # Beside the first round, which compiles.
  threading.Thread(
    target=importlib.import_module, args=(_PLOTS,), daemon=True
  ).start()
  bad, figures = registry.dishonest(config), list[pathlib.Path]()
  records: list[metrics.Record] = []
  with progress.Progress(config.rounds, stream=sys.stderr) as bar:
    observer = results.Observer([records.append, bar.update, *callbacks])

    def draw() -> None:
      plots = importlib.import_module(_PLOTS)
      figures.extend(plots.write_figures(records, f'{workdir}/figures', bad))

    outcome = emulation.run(
      config,
      workdir,
      observer,
      lambda: observer.stopped or stop(),
      process_group,
      profile,
      draw,
      bar.plan,
      stop,
    )
  print(f'\n{config.name}\n{progress.summary(records, bad)}')
  print(f'parameters: {shared_state.fingerprint(outcome.state.shared.params)}')
  print(f'everything is in {workdir}: config.json, metrics.jsonl, tensorboard/')
  print('figures:', *figures)
  print(f'report: {page.write(workdir)}')
  if not outcome.finished:
    print(
      f'\nstopped after round {outcome.state.counters.round} of '
      f'{outcome.rounds}. To go on: the same command with --workdir={workdir}'
    )
  return outcome
