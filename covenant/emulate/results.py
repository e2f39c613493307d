"""Emulated runs from Python, and their results as tables."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from covenant import config as config_lib
from covenant import metrics
from covenant import typing as ct
from covenant.data import dataset
from covenant.emulate import emulation

# Column by name; pandas, polars and pyarrow make a frame of it.
Table: TypeAlias = dict[str, list[ct.Json]]

# Called with each record; True ends the run after this round.
Callback: TypeAlias = Callable[[metrics.Record], bool | None]


class Results(NamedTuple):
  """The results of a run.

  Each table is a dict of columns, so that `pandas.DataFrame(results.rounds)`
  is a frame, and `results.rounds['loss']` is a list.

  Attributes:
    config: the config of the run, as nested dicts: its fields may be those of
      another version.
    workdir: its folder, with all files.
    finished: False for a run that was stopped, or that is in progress.
    rounds: a row per round; the columns are the fields of `metrics.Round`.
    evaluations: a row per evaluation, as `metrics.Evaluation`.
    steps: a row per inner step, as `metrics.Step`.
    miners: a row per round and miner: its loss, and its weight if it has one.
    params: the parameters at the end; None if only the files were read.
  """

  config: dict[str, ct.Json]
  workdir: pathlib.Path
  finished: bool
  rounds: Table
  evaluations: Table
  steps: Table
  miners: Table
  params: ct.Params | None = None


def emulate(
  config: config_lib.Config | str,
  overrides: Iterable[str] = (),
  *,
  workdir: str | os.PathLike[str] | None = None,
  callbacks: Sequence[Callback] = (),
) -> Results:
  """Emulates a run on this host, in virtual time, and prints nothing.

  Args:
    config: a config, or its name or file, such as `shakespeare:smoke`.
    overrides: changes of fields, such as `optim.inner_steps=20`.
    workdir: the folder of the run; one that has a part of it is continued.
      Default: runs/DATE-NAME.
    callbacks: functions that are called with every `metrics.Round` and
      `metrics.Evaluation`, those of earlier starts included. If one returns
      True, the run ends after this round, with a checkpoint.

  Raises:
    ConfigError: the config cannot run here, or `workdir` has another one's.
    DivergedError: the round of every miner is lost.
  """
  config = prepare(config, overrides)
  folder = default_workdir(config, workdir)
  observer = Observer(callbacks)
  outcome = emulation.run(
    config, folder, observe=observer, stop=lambda: observer.stopped
  )
  return read_results(folder)._replace(params=outcome.state.shared.params)


def read_results(workdir: str | os.PathLike[str]) -> Results:
  """Returns the results in the folder of an emulated run, without parameters.

  Raises:
    ConfigError: the folder has no config.json.
    MetricsError: a file of the run is malformed.
  """
  folder = pathlib.Path(workdir)
  path = folder / 'config.json'
  if not path.exists():
    raise config_lib.ConfigError(
      f'expected the folder of an emulated run; there is no {path}'
    )
  config = json.loads(path.read_text(encoding='utf-8'))
  records = metrics.read(folder / 'metrics.jsonl')
  rounds = metrics.rounds(records)
  path, steps = folder / 'steps.jsonl', list[metrics.Step]()
  if path.exists():
    steps = metrics.read(path, [metrics.Step])
  return Results(
    config=config,
    workdir=folder,
    finished=bool(rounds) and rounds[-1].round == config['rounds'],
    rounds=_columns(metrics.Round, rounds),
    evaluations=_columns(metrics.Evaluation, metrics.evaluations(records)),
    steps=_columns(metrics.Step, steps),
    miners=_miners(rounds),
  )


def prepare(
  config: config_lib.Config | str, overrides: Iterable[str]
) -> config_lib.Config:
  """Returns a checked config that knows the digest of its data."""
  if isinstance(config, str):
    config = config_lib.load(os.path.expanduser(config), overrides)
  else:
    config = config_lib.edit(config, overrides)
  return dataset.identified(config)


def default_workdir(
  config: config_lib.Config, workdir: str | os.PathLike[str] | None
) -> pathlib.Path:
  """Returns the folder of a run: runs/DATE-NAME unless another is asked for."""
  name = time.strftime('%Y%m%d-%H%M%S-') + config.name
  return pathlib.Path(workdir or f'runs/{name}').expanduser()


class Observer:
  """Calls callbacks with each record, and keeps whether one wants to stop.

  Args:
    callbacks: functions of a record.
  """

  def __init__(self, callbacks: Sequence[Callback]):
    self._callbacks = callbacks
    self.stopped = False

  def __call__(self, record: metrics.Record) -> None:
    for callback in self._callbacks:
      self.stopped |= bool(callback(record))


def _columns(
  kind: type[metrics.Line], records: Sequence[metrics.Line]
) -> Table:
  names = [field.name for field in dataclasses.fields(kind)]
  return {name: [getattr(r, name) for r in records] for name in names}


def _miners(rounds: Sequence[metrics.Round]) -> Table:
  rows = [
    (r.round, uid, loss, dict(enumerate(r.weights)).get(uid))
    for r in rounds
    for uid, loss in zip(r.uids, r.miner_losses, strict=True)
  ]
  names = 'round', 'uid', 'loss', 'weight'
  return {name: [row[i] for row in rows] for i, name in enumerate(names)}
