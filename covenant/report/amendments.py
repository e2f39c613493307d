"""The amendments that a run adopted, for its report and `--role=explain`."""

import os
import pathlib
from collections.abc import Sequence

from covenant import files
from covenant import typing as ct
from covenant.node import workdir as workdir_lib
from covenant.protocol import amendments as amendments_lib
from covenant.report import folder
from covenant.report import markup


def read(workdir: str | os.PathLike[str]) -> list[dict[str, ct.Json]]:
  """Returns the records of a folder, in the order of their adoption."""
  path = pathlib.Path(workdir, workdir_lib.AMENDMENTS)
  wanted = 'round', 'decided', 'changes', 'needed', 'digest'
  return list(files.read_records(path, *wanted).objects)


def lines(workdir: str | os.PathLike[str]) -> list[str]:
  """Returns a line per amendment."""
  return [amendments_lib.describe(record) for record in read(workdir)]


def planned_rounds(run: folder.Run) -> int:
  """Returns the number of rounds of a run, as amended; 0 if unknown."""
  planned = run.get('rounds') or 0
  for record in sorted(read(run.folder), key=lambda record: record['round']):
    _, after = record['changes'].get('rounds', ['', ''])
    planned = int(after) if str(after).isdecimal() else planned
  return planned


def section(run: folder.Run) -> Sequence[markup.Html]:
  """Returns the amendments of a run as a table; nothing without any."""
  rows = [
    (str(record['round'] + 1), path, str(before), str(after))
    for record in read(run.folder)
    for path, (before, after) in record['changes'].items()
  ]
  if not rows:
    return []
  title = 'Amendments'
  head = ('first round', 'field', 'before', 'after')
  return [
    markup.tag(
      'div',
      markup.tag('h3', 'Fields that changed in the run'),
      markup.table(head, rows, title),
      class_='wide',
      id='amended',
    )
  ]
