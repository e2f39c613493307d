"""Experiment trackers: one interface, with adapters of wandb and trackio.

Both are optional (extra `track`). Offline, which is the default, they write to
the folder of the process and reach nobody; `wandb sync FOLDER` uploads later.
A tracker of your own is a function of a `Run`, as docs/extending.md shows.
"""

import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from covenant import config as config_lib
from covenant import errors
from covenant import extras
from covenant import plugins

# Variables that make trackio send what it gets.
_REMOTE = (
  'TRACKIO_SPACE_ID',
  'TRACKIO_SERVER_URL',
  'TRACKIO_DATASET_ID',
  'TRACKIO_BUCKET_ID',
  'TRACKIO_WEBHOOK_URL',
)


class Run(NamedTuple):
  """The run of a process, as trackers name it."""

  project: str
  name: str
  folder: pathlib.Path  # of the process
  config: Mapping[str, Any]  # fields by path
  online: bool


# Sections that are nobody else's affair, and hold places and secrets.
_OWN = ('network.', 'alerts.', 'telemetry.', 'pool.')


def run_of(
  config: config_lib.Config, name: str, folder: str | os.PathLike[str]
) -> Run:
  """Returns the run of a process, without what trackers must not know."""
  fields = config_lib.flatten(config).items()
  told = {k: v for k, v in fields if not k.startswith(_OWN)}
  return Run(
    config.telemetry.project,
    f'{config.name}-{name}',
    pathlib.Path(folder),
    config_lib.hide_secrets(told),
    config.telemetry.mode == 'online',
  )


class Tracker(Protocol):
  """A place that measurements are sent to."""

  def log(self, values: Mapping[str, float]) -> None:
    """Adds the numbers of a record, by 'kind/field'."""
    ...

  def finish(self) -> None:
    """Completes the run."""
    ...


def wandb(run: Run) -> Tracker:
  """Returns an adapter of Weights & Biases."""
  extras.require('track', 'wandb')
  if not run.online:
    os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')
  import wandb as library

  folder = run.folder / 'wandb'
  folder.mkdir(parents=True, exist_ok=True)
  made = library.init(
    project=run.project,
    name=run.name,
    dir=str(run.folder),
    config=dict(run.config),
    mode='online' if run.online else 'offline',
    settings=library.Settings(silent=True, console='off'),
  )

  def finish() -> None:
    made.finish()
    library.teardown()  # returns once its process has written everything

  return _Adapter(made.log, finish)


def trackio(run: Run) -> Tracker:
  """Returns an adapter of trackio, whose data are in the folder."""
  extras.require('track', 'trackio')
  # trackio reads its folder when it is imported.
  os.environ.setdefault('TRACKIO_DIR', str(run.folder / 'trackio'))
  if not run.online:
    for name in _REMOTE:
      os.environ.pop(name, None)
  import trackio as library

  library.init(
    project=run.project,
    name=run.name,
    config=dict(run.config),
    resume='allow',
    embed=False,
    auto_log_gpu=False,
    auto_log_cpu=False,
  )
  return _Adapter(library.log, library.finish)


class _Adapter:
  """A run of a library."""

  def __init__(
    self, log: Callable[[dict[str, float]], None], finish: Callable[[], None]
  ):
    self._log = log
    self.finish = finish

  def log(self, values: Mapping[str, float]) -> None:
    self._log(dict(values))


def open_trackers(config: config_lib.Telemetry, run: Run) -> list[Tracker]:
  """Returns the trackers that a config names; one that fails is left out.

  Raises:
    PluginError: there is no such tracker.
    MissingExtraError: its library is not installed.
  """
  known = {'wandb': wandb, 'trackio': trackio}
  found = []
  for name in config.trackers:
    make = plugins.choose('telemetry.trackers', known, name)
    try:
      found.append(make(run))
    except errors.CovenantError:
      raise
    except Exception as e:  # whatever a library raises: the run goes on
      print(f'no tracker {name}: {type(e).__name__}: {e}', file=sys.stderr)
  return found
