"""The files of a run: replaced whole, or appended by lines.

A process may die at any point. `write` leaves the old content or the new,
`append_jsonl` leaves at most one line without its end, which readers ignore
and the next writer removes.
"""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from covenant import errors
from covenant import typing as ct

Path = str | os.PathLike[str]


class JsonLinesError(errors.CovenantError):
  """A line that is not JSON. The message has the file and the line."""


def write(path: Path, content: str | bytes, *, durable: bool = False) -> None:
  """Replaces the content of a file, at once or not at all.

  Args:
    path: the file; its folder is made when missing.
    content: bytes, or text that is written as UTF-8.
    durable: return only after the content is on the disk.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  data = content.encode() if isinstance(content, str) else content
  with open(temporary, 'wb') as file:
    file.write(data)
    if durable:
      file.flush()
      os.fsync(file.fileno())
  os.replace(temporary, path)


def write_lines(
  path: Path, lines: Iterable[str | bytes], *, durable: bool = False
) -> None:
  """Replaces a file by lines, given without their newlines; see `write`."""
  encoded = (x.encode() if isinstance(x, str) else x for x in lines)
  write(path, b''.join(x + b'\n' for x in encoded), durable=durable)


def read_lines(path: Path) -> list[bytes]:
  """Returns the complete lines of a file without their newlines.

  Bytes after the last newline belong to a line that is still being written, or
  whose writer was killed; they are left out. A missing file has no lines.
  """
  try:
    *lines, _ = pathlib.Path(path).read_bytes().split(b'\n')
  except FileNotFoundError:
    return []
  return lines


def read_jsonl(path: Path) -> list[ct.Json]:
  """Returns the objects of a file of JSON lines; see `read_lines`.

  Raises:
    JsonLinesError: a complete line is not JSON.
  """
  objects = []
  for number, line in enumerate(read_lines(path), start=1):
    try:
      objects.append(json.loads(line))
    except ValueError as error:  # JSON and UTF-8 errors are both of this class
      raise JsonLinesError(f'{path}:{number}: not JSON: {error}') from None
  return objects


class Records(NamedTuple):
  """The objects of a file of JSON lines."""

  objects: list[ct.Json]  # JSON objects with all required fields
  lost: int  # lines that are none


def read_records(path: Path, *required: str) -> Records:
  """Returns the objects of a file of JSON lines that can be read.

  A machine that loses its power leaves zeros and parts of lines, and a process
  that is killed and started again by another release a line that joins two.
  They cost what they held, not the file.

  Args:
    path: the file; a missing one has no lines.
    *required: names that an object must have.
  """
  objects, lost = [], 0
  for line in read_lines(path):
    line = line.strip(b'\0')
    if not line:
      continue
    try:
      found = json.loads(line)
    except (ValueError, RecursionError):
      found = None
    if isinstance(found, dict) and all(name in found for name in required):
      objects.append(found)
    else:
      lost += 1
  return Records(objects, lost)


def append_jsonl(path: Path, *records: ct.Json) -> None:
  """Appends a JSON line per record, and hands them to the operating system.

  They survive the death of the process; call `sync` for them to survive that
  of the machine. A last line without its end is removed before.
  """
  if _is_torn(path):
    write_lines(path, read_lines(path))
  with open(path, 'ab') as file:
    file.write(b''.join(json.dumps(x).encode() + b'\n' for x in records))


def _is_torn(path: Path) -> bool:
  with contextlib.suppress(FileNotFoundError), open(path, 'rb') as file:
    if file.seek(0, os.SEEK_END):
      file.seek(-1, os.SEEK_END)
      return file.read() != b'\n'
  return False


def sync(path: Path) -> None:
  """Returns once what was written to a file is on the disk."""
  with open(path, 'rb') as file:
    os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[pathlib.Path]:
  """Yields an empty folder that is renamed to `path` when the block succeeds.

  It is removed when the block raises.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.partial')
  try:
    partial.mkdir(parents=True)
    yield partial
    partial.rename(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
