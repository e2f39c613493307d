"""What an emulated run writes into its workdir, beside its checkpoints."""

import json
import pathlib
from collections.abc import Callable

from covenant import config as config_lib
from covenant import files
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
    files.write(workdir / _CONFIG, config_lib.to_json(config))
    path = workdir / 'metrics.jsonl'
    self._writer = metrics.MetricsWriter(
      path, workdir / 'tensorboard', resume=resume
    )
    self._observe = observe
    for record in metrics.read(path):
      observe(record)
    self._verdicts = workdir / _VERDICTS
    verdicts = files.read_jsonl(self._verdicts)
    kept = [json.dumps(x) for x in verdicts if x['round'] < (resume or 0)]
    files.write_lines(self._verdicts, kept)

  def log(self, record: metrics.Record) -> None:
    self._writer.write(record)
    self._observe(record)

  def announce(self, uid: int, verdict: validator_lib.Verdict) -> None:
    line = {'validator': uid, **verdict._asdict()}
    files.append_jsonl(self._verdicts, line)

  def sync(self) -> None:
    """Returns once all records are on the disk."""
    self._writer.sync()

  def __enter__(self) -> 'Books':
    return self

  def __exit__(self, *_: object) -> None:
    self._writer.close()


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
