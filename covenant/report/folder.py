"""Reads the files of a run, which may be finished, stopped or in progress.

The config is read as plain JSON, not by the current schema, so that a run of
another version can be reported.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from covenant import config as config_lib
from covenant import files as files_lib
from covenant import metrics
from covenant import typing as ct
from covenant.adversaries import registry
from covenant.models import llama
from covenant.telemetry import provenance

JsonObject: TypeAlias = Mapping[str, ct.Json]


class Run(NamedTuple):
  """The files of one run, or of one process of a network, as read."""

  folder: pathlib.Path
  config: JsonObject  # nested as in config.json; {} without a file
  rounds: list[metrics.Round]
  evaluations: list[metrics.Evaluation]
  # Verdicts of one validator by round; `uid` is None in its own workdir.
  verdicts: dict[int, JsonObject]
  uid: int | None
  events: list[JsonObject]  # actions of a process
  published: list[JsonObject]  # evaluations of published checkpoints
  steps: list[metrics.Step]  # inner steps
  node_rounds: list[metrics.NodeRound]  # of a process
  starts: list[JsonObject]  # when, where and with what it ran
  status: JsonObject  # of a process; {} without a file
  unreadable: int  # malformed lines of these three

  @property
  def name(self) -> str:
    return str(self.config.get('name', self.folder.name))

  def get(self, path: str) -> ct.Json:
    """Returns a field such as 'phases.put_blocks'; None if it is missing."""
    node: ct.Json = self.config
    for key in path.split('.'):
      node = node.get(key) if isinstance(node, Mapping) else None
    return node

  @property
  def cast(self) -> dict[int, str]:
    """Names of the adversaries in the config, by uid."""
    wanted = {
      name: self.get(name) for name in ('miners', 'validators', 'adversaries')
    }
    try:
      config = config_lib.parse({k: v for k, v in wanted.items() if v})
      return registry.dishonest(config)
    except config_lib.ConfigError:  # adversaries of another version
      return {}

  @property
  def linked(self) -> config_lib.Config | None:
    """The config, if it is of this version and has an inventory of links."""
    try:
      config = config_lib.parse(self.config)
    except config_lib.ConfigError:
      return None
    return config if config.plan.inventory else None

  @property
  def block_seconds(self) -> float | None:
    """Seconds per block by the config; None if it does not tell."""
    return self.get('network.block_seconds')

  @property
  def payload_bytes(self) -> float | None:
    """Mean bytes of a payload in the last round; None if unknown."""
    last = self.rounds[-1] if self.rounds else None
    if last is None or not last.compression_ratio or not self.num_params:
      return None
    return 4 * self.num_params / last.compression_ratio

  @property
  def num_params(self) -> int | None:
    """Number of parameters of the model; None if unknown."""
    model = self.get('model')
    try:
      return llama.num_params(config_lib.Model(**model)) if model else None
    except TypeError:  # the schema of another version
      return None


def read(workdir: str | os.PathLike[str]) -> Run:
  """Reads the folder of an emulated run, or of a process of a network.

  An unfinished last line is left out: its process is still writing it, or was
  killed.

  Raises:
    ConfigError: the folder has no files of a run.
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
  kinds = metrics.Round, metrics.Evaluation, metrics.Step, metrics.NodeRound
  paths = [folder / name for name in ('metrics.jsonl', 'steps.jsonl')]
  records = [
    record for p in paths if p.exists() for record in metrics.read(p, kinds)
  ]
  verdicts, torn = _lines(folder / 'verdicts.jsonl', ('round', 'decisions'))
  events, more = _lines(folder / 'events.jsonl', ('time', 'what', 'error'))
  published, some = _lines(
    folder / 'evaluations.jsonl', ('round', 'nats_per_byte')
  )
  uid = verdicts[0].get('validator') if verdicts else None
  return Run(
    folder=folder,
    config=_config(folder),
    rounds=metrics.rounds(records),
    evaluations=metrics.evaluations(records),
    verdicts={v['round']: v for v in verdicts if v.get('validator') == uid},
    uid=uid,
    events=events,
    published=published,
    steps=[r for r in records if isinstance(r, metrics.Step)],
    node_rounds=[r for r in records if isinstance(r, metrics.NodeRound)],
    starts=list(provenance.read(folder)),
    status=_status(folder),
    unreadable=torn + more + some,
  )


def leaves(node: JsonObject, prefix: str = '') -> Iterator[tuple[str, ct.Json]]:
  """Yields every field of nested mappings as path and value."""
  for key, value in node.items():
    if isinstance(value, Mapping):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _config(folder: pathlib.Path) -> JsonObject:
  """Returns the config of the folder, or of the network above it.

  Secrets in it are hidden: reports are sent to others.
  """
  for path in (folder / 'config.json', folder.parent / 'config.json'):
    if path.exists():
      try:
        config = json.loads(path.read_text(encoding='utf-8'))
      except ValueError as e:
        raise config_lib.ConfigError(f'{path}: not JSON: {e}') from None
      config = config_lib.hide_secrets(config)
      return config if isinstance(config, Mapping) else {}
  return {}


def _status(folder: pathlib.Path) -> JsonObject:
  """Returns status.json; {} where it is missing or torn."""
  try:
    found = json.loads((folder / 'status.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, Mapping) else {}


def _lines(
  path: pathlib.Path, required: tuple[str, ...]
) -> tuple[list[JsonObject], int]:
  """Returns the objects of a file of JSON lines, and the malformed lines.

  A process that was killed while it wrote and then restarted leaves a line
  which joins two.
  """
  objects, lost = files_lib.read_records(path, *required)
  return objects, lost
