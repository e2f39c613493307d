"""Files of text and of tokens, by path, folder, glob or URL.

A file is a document (.txt, .md), or has many: JSON lines, Parquet, the Arrow
files of a Hugging Face dataset on disk, and the tokens of datatrove (.ds) and
Megatron (.bin beside .idx). .txt, .md and .jsonl may be compressed (.gz, .zst).
"""

import fnmatch
import json
import os
import pathlib
import re
import sys
from typing import NamedTuple

from covenant import config
from covenant.data import remote

TEXTS = ('.txt', '.md')
_ROWS = ('.jsonl', '.ndjson', '.parquet', '.arrow')
TOKENS = ('.ds', '.bin')
_COMPRESSED = ('.gz', '.zst')
SUFFIXES = (*TEXTS, *_ROWS, *TOKENS)
# Files beside tokens or datasets that are read with them, or say nothing.
_BESIDE = ('.idx', '.ds.index', '.ds.metadata', '.ds.loss', '.json')
_DATASET = ('state.json', 'dataset_dict.json')  # of a dataset on disk
_TRAIN = ('train', 'training')
HELDOUT = ('val', 'valid', 'validation', 'test', 'dev', 'heldout')
_NUMBERS = re.compile(r'\d+|of|part|shard|[0-9a-f]{16,}')


class File(NamedTuple):
  """A file of text or tokens.

  Attributes:
    name: its path below the folder that was named; not always UTF-8.
    path: where it is: a path, or the folder's URL.
    size: bytes, compressed if it is.
    split: 'train' or 'heldout' if its name says so, else ''.
  """

  name: str
  path: str
  size: int
  split: str

  @property
  def kind(self) -> str:
    """The suffix that says how to read it, such as '.jsonl'."""
    return kind(self.name)

  @property
  def label(self) -> str:
    """Its name for people."""
    return _printable(self.path if '://' not in self.path else self.name)


def kind(name: str) -> str:
  """Returns the suffix of a name without compression; '' if unknown."""
  stem, suffix = os.path.splitext(name.lower())
  if suffix not in _COMPRESSED:
    return suffix if suffix in SUFFIXES else ''
  inner = os.path.splitext(stem)[1]
  return inner if inner in ('.txt', '.md', '.jsonl', '.ndjson') else ''


def find(path: str) -> tuple[File, ...]:
  """Lists the files of a path, folder, glob or URL, in order of their names.

  Hidden files and copies of editors are left out, and so are files of unknown
  suffixes in a folder, which are named on stderr. Links are followed; a file
  counts once.

  Raises:
    ConfigError: there is none, or a file that was named has an unknown suffix.
    DataError: a store does not answer.
  """
  if not path:
    raise config.ConfigError(
      "data.path is empty; data.source 'text' needs a file, folder, glob or "
      'URL of text'
    )
  named = False
  if remote.is_url(path):
    found, named = _remote(path)
  elif os.path.isdir(path):
    found = _walk(path)
  elif os.path.isfile(path):
    found, named = [(os.path.basename(path), path)], True
  else:
    found, named = _matches(path), True
  found = [f for f in found if not _is_copy(f[0])]
  unknown = [
    name for name, *_ in found if not kind(name) and not _is_beside(name)
  ]
  if named and unknown:
    raise config.ConfigError(
      f'data.path: {_printable(unknown[0])!r} has an unknown suffix; expected '
      f'{", ".join(SUFFIXES)}, of which .txt, .md and .jsonl may be followed '
      'by .gz or .zst'
    )
  if unknown:
    kinds = sorted({os.path.splitext(name)[1] or name for name in unknown})
    print(
      f'data: left out {len(unknown)} files of other kinds: '
      f'{_printable(", ".join(kinds[:8]))}',
      file=sys.stderr,
    )
  files = [
    File(name, where, _size(where, *size), said_split(name))
    for name, where, *size in found
    if kind(name)
  ]
  if not files:
    raise config.ConfigError(
      f'data.path: no {", ".join(SUFFIXES)} file in {_printable(path)!r}'
    )
  return tuple(sorted(files, key=lambda f: os.fsencode(f.name)))


def _size(where: str, size: int | None = None) -> int:
  return os.path.getsize(where) if size is None else size


def _walk(root: str) -> list[tuple[str, str]]:
  """Lists the files below a folder; each once, though links lead to it."""
  if found := _dataset(root):
    return found
  by_place: dict[str, tuple[bool, str, str]] = {}
  visited = {os.path.realpath(root)}
  for folder, folders, names in os.walk(root, followlinks=True):
    keep = []
    for name in sorted(folders):
      place = os.path.realpath(os.path.join(folder, name))
      if not name.startswith('.') and place not in visited:
        keep.append(name)
        visited.add(place)
    # Folders themselves before links, so that a link to one adds nothing.
    folders[:] = sorted(
      keep, key=lambda n: os.path.islink(os.path.join(folder, n))
    )
    if names_of := _dataset(folder) if folder != root else []:
      folders.clear()
      base = os.path.relpath(folder, root)
      for name, where in names_of:
        by_place[where] = False, os.path.join(base, name), where
      continue
    for name in names:
      where = os.path.join(folder, name)
      if not os.path.isfile(where):
        continue
      place = os.path.realpath(where)
      entry = place != os.path.abspath(where), os.path.relpath(where, root)
      by_place[place] = min(
        by_place.get(place, (*entry, where)), (*entry, where)
      )
  return [(name, where) for _, name, where in by_place.values()]


def _dataset(folder: str) -> list[tuple[str, str]]:
  """Lists the Arrow files of a Hugging Face dataset that lies in a folder."""
  for name in _DATASET:
    path = pathlib.Path(folder, name)
    if not path.is_file():
      continue
    try:
      record = json.loads(path.read_bytes())
      if name == 'dataset_dict.json':
        return [
          (os.path.join(split, file), where)
          for split in record['splits']
          for file, where in _dataset(os.path.join(folder, split))
        ]
      files = [entry['filename'] for entry in record['_data_files']]
    except (ValueError, KeyError, TypeError):
      continue  # some other file of this name
    return [(file, os.path.join(folder, file)) for file in files]
  return []


def _matches(pattern: str) -> list[tuple[str, str]]:
  """Lists the files that a glob names, with names below its fixed part."""
  base = pathlib.Path(pattern)
  while any(c in str(base) for c in '*?['):
    base = base.parent
  if str(base) == pattern or not base.is_dir():
    raise config.ConfigError(
      f'data.path: no such file or folder: {_printable(pattern)!r}'
    )
  rest = os.path.relpath(pattern, base)
  found: dict[str, tuple[str, str]] = {}
  for match in sorted(base.glob(rest)):
    inner = _walk(str(match)) if match.is_dir() else [('', str(match))]
    for name, where in inner:
      full = os.path.join(os.path.relpath(match, base), name).rstrip('/')
      found.setdefault(os.path.realpath(where), (full, where))
  return list(found.values())


def _remote(url: str) -> tuple[list[tuple[str, str, int]], bool]:
  """Lists the files of a URL, with sizes; True if it names them."""
  base, mark, query = url.partition('?')
  query = mark + query
  fixed, named = base.rstrip('/'), False
  while '*' in fixed or '[' in fixed:
    fixed, named = fixed.rpartition('/')[0], True
  if kind(fixed.rpartition('/')[2]):
    fixed, _, name = fixed.rpartition('/')
    where = remote.RemoteFolder(fixed + query)
    return [(name, fixed + query, where.size(name))], True
  pattern = base.rstrip('/')[len(fixed) + 1 :]
  found = [
    (entry.key, fixed + query, entry.size)
    for entry in remote.RemoteFolder(fixed + query).list()
    if not pattern or fnmatch.fnmatchcase(entry.key, pattern)
  ]
  return found, named


def _is_copy(name: str) -> bool:
  """Returns True for hidden files and the copies that editors leave."""
  parts = name.split('/')
  hidden = any(
    part.startswith('.') for part in parts if part not in ('.', '..')
  )
  last = parts[-1]
  return (
    hidden
    or last.endswith(('~', '.swp', '.bak', '.tmp'))
    or (last.startswith('#') and last.endswith('#'))
  )


def _is_beside(name: str) -> bool:
  return name.lower().endswith(_BESIDE)


def _printable(name: str) -> str:
  return os.fsencode(name).decode(errors='backslashreplace')


def said_split(name: str) -> str:
  """Returns the split that a path names, or ''.

  A part of the path says it whose first or last word, apart from numbers, is
  one of train, val, valid, validation, test, dev and heldout. The last part
  that says one counts.

  >>> said_split('en/validation-00001-of-00002.parquet')
  'heldout'
  >>> said_split('the-test-of-time.txt')
  ''
  """
  for part in reversed(name.lower().split('/')):
    stem = part
    while os.path.splitext(stem)[1] in (*SUFFIXES, *_COMPRESSED):
      stem = os.path.splitext(stem)[0]
    words = re.split('[^a-z0-9]+', stem)
    words = [w for w in words if w and not _NUMBERS.fullmatch(w)]
    ends = {words[0], words[-1]} if words else set()
    if ends & set(HELDOUT):
      return 'heldout'
    if ends & set(_TRAIN):
      return 'train'
  return ''
