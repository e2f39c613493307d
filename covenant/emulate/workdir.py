"""What an emulated run writes into its workdir, beside its checkpoints."""

import json
import os
import pathlib
from collections.abc import Callable

from covenant import config as config_lib
from covenant import metrics
from covenant.node import validator as validator_lib

_CONFIG = 'config.json'
_VERDICTS = 'verdicts.jsonl'
# What may differ when a run goes on. A miner on other devices than before
# rounds otherwise; on how many the miners are spread changes nothing.
_FREE = ('devices.', 'network.coordinator', 'network.process', 'plan.')


class Books:
  """config.json, metrics.jsonl, tensorboard/ and verdicts.jsonl of a run.

  Use as a context manager.

  Args:
    workdir: the folder; made when missing.
    config: of the run.
    resume: rounds completed by the checkpoint that the run goes on from; what
      is of later ones is dropped. None: there is none.
    observe: called with every record, those of earlier starts included.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: config_lib.Config,
    resume: int | None,
    observe: Callable[[metrics.Record], None],
  ):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _CONFIG).write_text(config_lib.to_json(config))
    path = workdir / 'metrics.jsonl'
    self._writer = metrics.MetricsWriter(
      path, workdir / 'tensorboard', resume=resume
    )
    self._observe = observe
    for record in metrics.read(path):
      observe(record)
    _keep(workdir / _VERDICTS, resume or 0)
    self._verdicts = open(workdir / _VERDICTS, 'a', encoding='utf-8')

  def log(self, record: metrics.Record) -> None:
    self._writer.write(record)
    self._observe(record)

  def announce(self, uid: int, verdict: validator_lib.Verdict) -> None:
    line = {'validator': uid, **verdict._asdict()}
    self._verdicts.write(json.dumps(line) + '\n')
    self._verdicts.flush()

  def sync(self) -> None:
    """Returns once all records are on the disk."""
    self._writer.sync()

  def __enter__(self) -> 'Books':
    return self

  def __exit__(self, *_: object) -> None:
    self._verdicts.close()
    self._writer.close()


def _keep(path: pathlib.Path, completed: int) -> None:
  """Drops, at once or not at all, the verdicts on all but some rounds."""
  kept = []
  if path.exists():
    *lines, _ = path.read_text().split('\n')  # the last may be torn
    kept = [line for line in lines if json.loads(line)['round'] < completed]
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(''.join(line + '\n' for line in kept))
  os.replace(temporary, path)


def check_owner(workdir: pathlib.Path, config: config_lib.Config) -> None:
  """Refuses a workdir that holds a run with another config.

  Raises:
    ConfigError: naming the fields that differ, but for where it runs.
  """
  path = workdir / _CONFIG
  if not path.exists():
    return
  there = config_lib.from_json(path.read_text())
  differ = [
    line
    for line in config_lib.differences(there, config)
    if not line.startswith(_FREE)
  ]
  if differ:
    raise config_lib.ConfigError(
      f'{workdir} holds a run with another config. Choose another --workdir, '
      'or set back: ' + '; '.join(differ)
    )
