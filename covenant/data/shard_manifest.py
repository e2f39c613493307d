"""The manifest of a folder of shards, read strictly."""

import json
import pathlib
import re
from typing import NamedTuple

from covenant import config
from covenant import typing as ct

VERSION = 1
FILE = 'manifest.json'
SPLITS = ('train', 'heldout')
KINDS = ('bytes', 'bpe', 'sentencepiece')
_FIELDS = {
  'version': int,
  'tokenizer': dict,
  'vocab_size': int,
  'end_of_text': int,
  'splits': dict,
}


class TokenizerDigest(NamedTuple):
  """The tokenizer of the shards, with the digest of its definition."""

  kind: str
  digest: str


class Shard(NamedTuple):
  """One array of tokens.

  Attributes:
    name: its folder, like 'train-00000'.
    tokens: number of tokens, ends of text included.
    bytes: UTF-8 bytes of its text. Each of the shards that share a document
      has a part in proportion to its tokens; the sum over a split is exact.
    digest: blake2b-256 of the little-endian tokens, in hexadecimal.
  """

  name: str
  tokens: int
  bytes: int
  digest: str


class ShardManifest(NamedTuple):
  """The content of a folder of shards."""

  tokenizer: TokenizerDigest
  vocab_size: int
  end_of_text: int
  train: tuple[Shard, ...]
  heldout: tuple[Shard, ...]


def write(directory: pathlib.Path, manifest: ShardManifest) -> None:
  """Writes `manifest.json` into the folder."""
  record = {
    'version': VERSION,
    'tokenizer': manifest.tokenizer._asdict(),
    'vocab_size': manifest.vocab_size,
    'end_of_text': manifest.end_of_text,
    'splits': {
      split: [shard._asdict() for shard in getattr(manifest, split)]
      for split in SPLITS
    },
  }
  (directory / FILE).write_text(json.dumps(record, indent=2) + '\n')


def read(directory: pathlib.Path) -> ShardManifest:
  """Reads `manifest.json` of the folder.

  Raises:
    ConfigError: the file is missing, or a field of it is missing, unknown, of
      another type or out of bounds.
  """
  path = directory / FILE
  if not path.is_file():
    raise broken(path, 'no such file; make it with covenant.data.shards.write')
  try:
    record = json.loads(path.read_bytes())
  except ValueError as error:
    raise broken(path, f'not JSON: {error}') from error
  if isinstance(record, dict) and record.get('version') != VERSION:
    raise broken(
      path, f'version: expected {VERSION}, got {record.get("version")!r}'
    )
  _check(path, 'manifest', record, _FIELDS)
  _check(
    path, 'tokenizer', record['tokenizer'], TokenizerDigest.__annotations__
  )
  tokenizer = TokenizerDigest(**record['tokenizer'])
  if tokenizer.kind not in KINDS:
    raise broken(
      path,
      f'tokenizer.kind: expected one of {", ".join(KINDS)}, got '
      f'{tokenizer.kind!r}',
    )
  vocab_size, end_of_text = record['vocab_size'], record['end_of_text']
  if not 0 <= end_of_text < vocab_size <= 2**31:
    raise broken(
      path,
      'expected 0 <= end_of_text < vocab_size <= 2**31, got end_of_text '
      f'{end_of_text} and vocab_size {vocab_size}',
    )
  _check(path, 'splits', record['splits'], dict.fromkeys(SPLITS, list))
  splits = {
    split: _shards(path, split, record['splits'][split]) for split in SPLITS
  }
  return ShardManifest(tokenizer, vocab_size, end_of_text, **splits)


def _shards(
  path: pathlib.Path, split: str, records: list[ct.Json]
) -> tuple[Shard, ...]:
  if not records:
    raise broken(path, f'splits.{split}: expected shards, got none')
  shards = []
  for i, record in enumerate(records):
    where = f'splits.{split}[{i}]'
    _check(path, where, record, Shard.__annotations__)
    shard = Shard(**record)
    # A name is a path, so it must stay in the folder, and in its split: a
    # shard in both would leak held-out text into training.
    if not re.fullmatch(rf'{split}-[0-9]{{5,}}', shard.name, re.ASCII):
      raise broken(
        path, f'{where}.name: expected like {split}-00000, got {shard.name!r}'
      )
    for field, low in (('tokens', 1), ('bytes', 0)):
      value = getattr(shard, field)
      if value < low:
        raise broken(
          path, f'{where}.{field}: expected {low} or more, got {value}'
        )
    shards.append(shard)
  return tuple(shards)


def _check(
  path: pathlib.Path, where: str, record: ct.Json, fields: dict[str, type]
) -> None:
  """Raises ConfigError unless a record has exactly these fields and types."""
  if not isinstance(record, dict) or set(record) != set(fields):
    got = sorted(record) if isinstance(record, dict) else record
    raise broken(
      path, f'{where}: expected the fields {sorted(fields)}, got {got!r}'
    )
  for field, kind in fields.items():
    if type(record[field]) is not kind:  # a bool is an int to isinstance
      raise broken(
        path,
        f'{where}.{field}: expected {kind.__name__}, got {record[field]!r}',
      )


def broken(path: pathlib.Path, message: str) -> config.ConfigError:
  """Returns the error of a file that differs from what was written."""
  return config.ConfigError(f'data.path: {str(path)!r}: {message}')
