"""The manifest of a folder of shards, and its digest.

  manifest.json       the list of shards, read strictly
  tokenizer.json      the tokenizer (.model for SentencePiece, none for bytes)
  000000/train-00000.tokens    tokens, little-endian uint16 or uint32
  000000/train-00000.sums      a 16-byte blake2b digest of each chunk of tokens

A shard's digest is that of its .sums file. The digests of all shards are the
leaves of a Merkle tree, whose root with the tokenizer is the digest of the
manifest. So a node that knows the digest can check the list of shards in a
moment, and each chunk of tokens when it reads it. Names of sources have no
part in the digest: it depends on the tokens alone.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covenant import config
from covenant import typing as ct

VERSION = 2
FILE = 'manifest.json'
SPLITS = ('train', 'heldout')
KINDS = ('bytes', 'bpe', 'sentencepiece')
TOKENIZER_FILES = {'bpe': 'tokenizer.json', 'sentencepiece': 'tokenizer.model'}
CHUNK = 2**14  # tokens per chunk: 32 KiB of uint16, 64 KiB of uint32
SHARD_TOKENS = 2**26  # tokens of a full shard
SUM_BYTES = 16  # bytes of the digest of a chunk
_PERSON = b'covenant.data'
_FIELDS = {
  'version': int,
  'digest': str,
  'tokenizer': dict,
  'vocab_size': int,
  'end_of_text': int,
  'splits': dict,
  'sources': list,
}
_NAME = r'(?:\d{6,}/)?%s-\d{5,}'


class TokenizerDigest(NamedTuple):
  """The tokenizer of the shards, with the digest of its definition."""

  kind: str
  digest: str


class Shard(NamedTuple):
  """One file of tokens.

  Attributes:
    name: its path without suffix, like '000000/train-00000'.
    tokens: number of tokens, ends of text included.
    bytes: UTF-8 bytes of its text. Each of the shards that share a document
      has a part in proportion to its tokens; the sum over a split is exact.
    digest: blake2b-256 of its .sums file, in hexadecimal.
  """

  name: str
  tokens: int
  bytes: int
  digest: str


class Source(NamedTuple):
  """A file of text and what became of it.

  Attributes:
    name: its path below the folder that was tokenized.
    documents: number of documents in both splits.
    tokens: tokens in the training split.
    bytes: UTF-8 bytes of text in the training split.
    heldout_tokens: tokens in the held-out split.
    heldout_bytes: UTF-8 bytes of text in the held-out split.
  """

  name: str
  documents: int
  tokens: int
  bytes: int
  heldout_tokens: int
  heldout_bytes: int


class ShardManifest(NamedTuple):
  """The content of a folder of shards."""

  tokenizer: TokenizerDigest
  vocab_size: int
  end_of_text: int
  train: tuple[Shard, ...]
  heldout: tuple[Shard, ...]
  sources: tuple[Source, ...] = ()

  @property
  def digest(self) -> str:
    """The digest of tokenizer and shards, in hexadecimal."""
    roots = [
      merkle_root([leaf(shard) for shard in getattr(self, split)]).hex()
      for split in SPLITS
    ]
    head = [VERSION, CHUNK, *self.tokenizer, self.vocab_size, self.end_of_text]
    return _hash(b'\2' + json.dumps([*head, *roots]).encode()).hex()

  def num_tokens(self, split: str) -> int:
    """The number of tokens of a split."""
    return sum(shard.tokens for shard in getattr(self, split))

  def num_bytes(self, split: str) -> int:
    """The bytes of text of a split."""
    return sum(shard.bytes for shard in getattr(self, split))


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the dtype of stored ids: little-endian uint16 or uint32.

  >>> token_dtype(65536), token_dtype(65537)
  (dtype('uint16'), dtype('uint32'))
  """
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def leaf(shard: Shard) -> bytes:
  """Returns the leaf of a shard in the Merkle tree; its name has no part."""
  return _hash(b'\0' + json.dumps(shard[1:]).encode())


def merkle_root(leaves: Sequence[bytes]) -> bytes:
  """Returns the root of a binary tree of digests.

  The last of an odd number of nodes moves up as it is.

  >>> merkle_root([b'leaf'])
  b'leaf'
  """
  level = list(leaves) or [_hash(b'')]
  while len(level) > 1:
    pairs = zip(level[::2], level[1::2], strict=False)
    rest = level[-1:] if len(level) % 2 else []
    level = [_hash(b'\1' + a + b) for a, b in pairs] + rest
  return level[0]


def _hash(content: bytes) -> bytes:
  return hashlib.blake2b(content, digest_size=32, person=_PERSON).digest()


def digest_of(content: bytes) -> str:
  """Returns the blake2b-256 digest of a file's content, in hexadecimal."""
  return hashlib.blake2b(content, digest_size=32).hexdigest()


def sum_of(chunk: bytes) -> bytes:
  """Returns the digest of a chunk of tokens."""
  return hashlib.blake2b(chunk, digest_size=SUM_BYTES).digest()


def to_json(manifest: ShardManifest) -> str:
  """Returns the content of `manifest.json`."""
  record = {
    'version': VERSION,
    'digest': manifest.digest,
    'tokenizer': manifest.tokenizer._asdict(),
    'vocab_size': manifest.vocab_size,
    'end_of_text': manifest.end_of_text,
    'splits': {
      split: [shard._asdict() for shard in getattr(manifest, split)]
      for split in SPLITS
    },
    'sources': [source._asdict() for source in manifest.sources],
  }
  return json.dumps(record, indent=1) + '\n'


def from_json(path: str, content: bytes) -> ShardManifest:
  """Reads what `to_json` wrote, strictly.

  Args:
    path: the file, for errors.
    content: its bytes.

  Raises:
    ConfigError: a field is missing, unknown, of another type or out of bounds,
      or the digest is not that of the rest.
  """
  try:
    record = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise broken(path, f'not JSON: {error}') from error
  if isinstance(record, dict) and record.get('version') != VERSION:
    raise broken(
      path,
      f'version: expected {VERSION}, got {record.get("version")!r}; make the '
      'shards again with --role=tokenize',
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
    split: _read_shards(path, split, record['splits'][split])
    for split in SPLITS
  }
  sources = []
  for i, source in enumerate(record['sources']):
    _check(path, f'sources[{i}]', source, Source.__annotations__)
    sources.append(Source(**source))
  found = ShardManifest(
    tokenizer, vocab_size, end_of_text, sources=tuple(sources), **splits
  )
  if found.digest != record['digest']:
    raise broken(
      path,
      f'digest: expected {found.digest} of this list of shards, got '
      f'{record["digest"]!r}; the file was changed: fetch it again',
    )
  return found


def _read_shards(
  path: str, split: str, records: list[ct.Json]
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
    if not re.fullmatch(_NAME % split, shard.name, re.ASCII):
      raise broken(
        path,
        f'{where}.name: expected like 000000/{split}-00000, got {shard.name!r}',
      )
    for field, low in (('tokens', 1), ('bytes', 0)):
      value = getattr(shard, field)
      if not low <= value < 2**62:
        raise broken(
          path, f'{where}.{field}: expected {low} or more, got {value}'
        )
    if not re.fullmatch('[0-9a-f]{64}', shard.digest):
      raise broken(
        path, f'{where}.digest: expected 64 hex digits, got {shard.digest!r}'
      )
    shards.append(shard)
  return tuple(shards)


def _check(
  path: str, where: str, record: ct.Json, fields: dict[str, type]
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


def broken(path: object, message: str) -> config.ConfigError:
  """Returns the error of a file that differs from what was written."""
  return config.ConfigError(f'data.path: {str(path)!r}: {message}')


class ShardWriter:
  """Writes the tokens of a split as shards; a chunk is in memory at a time.

  Args:
    directory: an existing folder.
    prefix: the path of the shards in the folder of the manifest, like
      '000000/'; the files lie in `directory` itself.
    split: 'train' or 'heldout'.
    dtype: the dtype of the tokens.
    shard_tokens: tokens per shard except the last; documents may be cut.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    prefix: str,
    split: str,
    dtype: np.dtype,
    shard_tokens: int = SHARD_TOKENS,
  ):
    if shard_tokens < 1:
      raise ValueError(f'shard_tokens: expected 1 or more, got {shard_tokens}')
    self._directory, self._prefix, self._split = directory, prefix, split
    self._shard_tokens = shard_tokens
    self._chunk = np.empty(CHUNK, dtype)
    self._fill = 0  # tokens in the chunk
    self._tokens = self._bytes = 0  # of the shard
    self._file = None
    self._sums: list[bytes] = []
    self._shards: list[Shard] = []

  def add(self, ids_n: np.ndarray, num_bytes: int) -> None:
    """Appends tokens that stand for some bytes of text."""
    start, total = 0, len(ids_n)
    while start < total:
      room = min(CHUNK - self._fill, self._shard_tokens - self._tokens)
      stop = min(start + room, total)
      part_n = ids_n[start:stop]
      self._chunk[self._fill : self._fill + len(part_n)] = part_n
      self._fill += len(part_n)
      self._tokens += len(part_n)
      # In proportion, rounded so that the parts of a text add up.
      self._bytes += num_bytes * stop // total - num_bytes * start // total
      if self._fill == CHUNK:
        self._write_chunk()
      if self._tokens == self._shard_tokens:
        self._end_shard()
      start = stop

  def close(self) -> tuple[Shard, ...]:
    """Completes the last shard and returns all."""
    if self._tokens:
      self._end_shard()
    return tuple(self._shards)

  @property
  def _name(self) -> str:
    return f'{self._split}-{len(self._shards):05d}'

  def _write_chunk(self) -> None:
    if self._file is None:
      self._file = open(self._directory / f'{self._name}.tokens', 'wb')
    content = self._chunk[: self._fill].tobytes()
    self._file.write(content)
    self._sums.append(sum_of(content))
    self._fill = 0

  def _end_shard(self) -> None:
    if self._fill:
      self._write_chunk()
    assert self._file is not None
    self._file.close()
    name, sums = self._name, b''.join(self._sums)
    (self._directory / f'{name}.sums').write_bytes(sums)
    digest = digest_of(sums)
    self._shards.append(
      Shard(self._prefix + name, self._tokens, self._bytes, digest)
    )
    self._file, self._sums, self._tokens, self._bytes = None, [], 0, 0
