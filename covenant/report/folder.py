"""What a workdir tells of a run, be it over, stopped, or under way.

The config is read as plain JSON, not by today's schema: a report of a run
that another version has made should not fail for a field.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from covenant import config as config_lib
from covenant import files as files_lib
from covenant import metrics
from covenant.adversaries import registry
from covenant.models import llama


class Run(NamedTuple):
  """What is known of one run, or of one process of a network."""

  folder: pathlib.Path
  config: Mapping[str, Any]  # nested as in config.json; {}: there is none
  rounds: list[metrics.Round]
  evaluations: list[metrics.Evaluation]
  # By round, of one validator; `uid` is its, None in its own workdir.
  verdicts: dict[int, Mapping[str, Any]]
  uid: int | None
  events: list[Mapping[str, Any]]  # of a process
  published: list[Mapping[str, Any]]  # of an evaluator: what it found of each
  unreadable: int  # lines of these three

  @property
  def name(self) -> str:
    return str(self.config.get('name', self.folder.name))

  def get(self, path: str) -> Any:
    """A field of the config, such as 'phases.put_blocks'; None: not there."""
    node: Any = self.config
    for key in path.split('.'):
      node = node.get(key) if isinstance(node, Mapping) else None
    return node

  @property
  def cast(self) -> dict[int, str]:
    """Uid -> name, of the miners that the config names as adversaries."""
    wanted = {
      name: self.get(name) for name in ('miners', 'validators', 'adversaries')
    }
    try:
      config = config_lib.parse({k: v for k, v in wanted.items() if v})
      return registry.dishonest(config)
    except config_lib.ConfigError:  # of another version's zoo
      return {}

  @property
  def linked(self) -> config_lib.Config | None:
    """The config, if it is of this version and says what links there are."""
    try:
      config = config_lib.parse(self.config)
    except config_lib.ConfigError:
      return None
    return config if config.plan.inventory else None

  def seconds(self, blocks: float) -> float:
    """How long so many blocks take, by the config; nan: it does not say."""
    return blocks * (self.get('network.block_seconds') or float('nan'))

  @property
  def payload_bytes(self) -> float | None:
    """Mean length of the last round's payloads; None: it cannot be told."""
    last = self.rounds[-1] if self.rounds else None
    if last is None or not last.compression_ratio or not self.num_params:
      return None
    return 4 * self.num_params / last.compression_ratio

  @property
  def num_params(self) -> int | None:
    model = self.get('model')
    try:
      return llama.num_params(config_lib.Model(**model)) if model else None
    except TypeError:  # of another version's schema
      return None


def read(workdir: str | os.PathLike[str]) -> Run:
  """Reads the folder of an emulated run, or of a process of a network.

  Last lines without their end are left out: a process is still writing them,
  or was killed.

  Raises:
    ConfigError: there is nothing of a run in it.
    MetricsError: metrics.jsonl is malformed.
  """
  folder = pathlib.Path(workdir)
  files = ('metrics.jsonl', 'verdicts.jsonl', 'events.jsonl')
  if not folder.is_dir():
    raise config_lib.ConfigError(
      f'expected the folder of a run; there is no folder {folder}'
    )
  if not any((folder / name).exists() for name in files):
    members = sorted(path.parent.name for path in folder.glob('*/events.jsonl'))
    hint = f'. Its processes have some: {", ".join(members)}' if members else ''
    raise config_lib.ConfigError(
      f'expected the folder of a run; {folder} has none of '
      f'{", ".join(files)}{hint}'
    )
  path = folder / 'metrics.jsonl'
  records = metrics.read(path) if path.exists() else []
  verdicts, torn = _lines(folder / 'verdicts.jsonl', ('round', 'decisions'))
  events, more = _lines(folder / 'events.jsonl', ('time', 'what', 'error'))
  published, some = _lines(
    folder / 'evaluations.jsonl', ('round', 'nats_per_byte')
  )
  uid = verdicts[0].get('validator') if verdicts else None
  return Run(
    folder=folder,
    config=_config(folder),
    rounds=[r for r in records if isinstance(r, metrics.Round)],
    evaluations=[r for r in records if isinstance(r, metrics.Evaluation)],
    verdicts={v['round']: v for v in verdicts if v.get('validator') == uid},
    uid=uid,
    events=events,
    published=published,
    unreadable=torn + more + some,
  )


def _config(folder: pathlib.Path) -> Mapping[str, Any]:
  """Of the folder, or of the network whose process it belongs to."""
  for path in (folder / 'config.json', folder.parent / 'config.json'):
    if path.exists():
      try:
        config = json.loads(path.read_text(encoding='utf-8'))
      except ValueError as e:
        raise config_lib.ConfigError(f'{path}: not JSON: {e}') from None
      return config if isinstance(config, Mapping) else {}
  return {}


def _lines(
  path: pathlib.Path, required: tuple[str, ...]
) -> tuple[list[Any], int]:
  """The objects of a file of JSON lines, and how many lines are none.

  A process that was killed while it wrote, and started again, has left a line
  in which two are one.
  """
  lines = files_lib.read_lines(path)
  objects = []
  for line in lines:
    try:
      found = json.loads(line)
    except ValueError:
      continue
    if isinstance(found, dict) and all(key in found for key in required):
      objects.append(found)
  return objects, len(lines) - len(objects)
