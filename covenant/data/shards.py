"""Pre-tokenized shards: a folder that is written once and never changed.

  manifest.json    the names, sizes and digests of shards; read strictly
  tokenizer.json   the tokenizer (.model for SentencePiece, none for bytes)
  train-00000/     a zarr3 array of tokens, uint16 or uint32, in one file of
  heldout-00000/   chunks, each readable alone and with its CRC-32C

The order of the tokens is that of tokens.py.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from covenant import config
from covenant import files
from covenant import typing as ct
from covenant.data import corpus as corpus_lib
from covenant.data import tokenizer as tokenizer_lib
from covenant.data import tokens as tokens_lib

_VERSION = 1
_FILE = 'manifest.json'
_SPLITS = ('train', 'heldout')
_KINDS = ('bytes', 'bpe', 'sentencepiece')
_FIELDS = {
  'version': int,
  'tokenizer': dict,
  'vocab_size': int,
  'end_of_text': int,
  'splits': dict,
}
_TOKENIZER_FILES = {'bpe': 'tokenizer.json', 'sentencepiece': 'tokenizer.model'}
_CHUNK = 2**14  # tokens per chunk and read: 32 KiB of uint16
_VERIFY = 2**22  # tokens per read of a verification
_CACHE = 2**26  # bytes of cache per folder, for the indices of chunks


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


def write(
  directory: str | pathlib.Path,
  corpus: corpus_lib.Corpus,
  tokenizer: tokenizer_lib.Tokenizer,
  shard_tokens: int = 2**26,
) -> None:
  """Tokenizes a corpus into a new folder, atomically.

  One document and one shard are in memory at a time.

  Args:
    directory: a folder that does not exist.
    corpus: documents in both splits.
    tokenizer: the tokenizer; its definition is stored as well.
    shard_tokens: tokens per shard except the last; documents may be cut.

  Raises:
    ValueError: the folder exists, a split is empty, `shard_tokens` is below 1.
  """
  directory = pathlib.Path(directory).resolve()
  if directory.exists():
    raise ValueError(
      f'{str(directory)!r} exists; shards are never overwritten: remove it or '
      'choose another folder'
    )
  if shard_tokens < 1:
    raise ValueError(f'shard_tokens: expected 1 or more, got {shard_tokens}')
  with files.new_folder(directory) as partial:
    splits = {}
    for split in _SPLITS:
      pieces = _cut(getattr(corpus, split), tokenizer, shard_tokens)
      splits[split] = tuple(
        _write_shard(partial, f'{split}-{i:05d}', tokens, num_bytes)
        for i, (tokens, num_bytes) in enumerate(pieces)
      )
      if not splits[split]:
        raise ValueError(f'corpus.{split}: expected documents, got none')
    definition = tokenizer.definition()
    if file := _TOKENIZER_FILES.get(tokenizer.kind):
      (partial / file).write_bytes(definition)
    manifest = ShardManifest(
      tokenizer=TokenizerDigest(tokenizer.kind, _digest(definition)),
      vocab_size=tokenizer.vocab_size,
      end_of_text=tokenizer.end_of_text,
      **splits,
    )
    write_manifest(partial, manifest)


def _cut(
  documents: Iterable[corpus_lib.Document],
  tokenizer: tokenizer_lib.Tokenizer,
  shard_tokens: int,
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields the tokens of each shard and their bytes of text."""
  parts, room, shard_bytes = [], shard_tokens, 0
  for document in documents:
    tokens = tokenizer_lib.encode(document, tokenizer)
    total, start = document.num_bytes, 0
    while start < len(tokens):
      stop = min(start + room, len(tokens))
      parts.append(tokens[start:stop])
      # In proportion, rounded so that the parts of a document add up.
      shard_bytes += total * stop // len(tokens) - total * start // len(tokens)
      room -= stop - start
      start = stop
      if not room:
        yield np.concatenate(parts), shard_bytes
        parts, room, shard_bytes = [], shard_tokens, 0
  if parts:
    yield np.concatenate(parts), shard_bytes


def _write_shard(
  directory: pathlib.Path, name: str, tokens: np.ndarray, num_bytes: int
) -> Shard:
  chunk_codecs = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'crc32c'},
  ]
  file_codec = {
    'name': 'sharding_indexed',
    'configuration': {'chunk_shape': [_CHUNK], 'codecs': chunk_codecs},
  }
  whole_chunks = {'chunk_shape': [-(-len(tokens) // _CHUNK) * _CHUNK]}
  spec = _spec(directory / name) | {
    'create': True,
    # A missing chunk must be an error, not a run of zeros.
    'store_data_equal_to_fill_value': True,
    'metadata': {
      'shape': [len(tokens)],
      'data_type': tokens.dtype.name,
      'chunk_grid': {'name': 'regular', 'configuration': whole_chunks},
      'codecs': [file_codec],
    },
  }
  ts.open(spec).result().write(tokens).result()
  return Shard(name, len(tokens), num_bytes, _digest(tokens.tobytes()))


def open_shards(
  directory: str | pathlib.Path, verify: bool = True
) -> tokens_lib.TokenData:
  """Opens a folder of shards.

  Args:
    directory: `data.path`.
    verify: True reads everything once and checks digests and ids. Otherwise a
      damaged chunk is an error when it is read.

  Raises:
    ConfigError: the folder does not exist, its manifest is invalid, or a shard
      or tokenizer is missing or differs from the manifest.
  """
  if not str(directory):
    raise config.ConfigError(
      "data.path is empty; data.source 'shards' needs a folder made by "
      'covenant.data.shards.write'
    )
  directory = pathlib.Path(directory).resolve()
  manifest = read_manifest(directory)
  context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE}})
  splits = {}
  for split in _SPLITS:
    shards = getattr(manifest, split)
    stores = [_open_shard(directory, shard, context) for shard in shards]
    if verify:
      for store, shard in zip(stores, shards, strict=True):
        _verify_shard(directory, store, shard, manifest.vocab_size)
    store = stores[0] if len(stores) == 1 else ts.concat(stores, axis=0)
    splits[split] = tokens_lib.Split(
      ts.cast(store, ts.int32), sum(shard.bytes for shard in shards)
    )
  if verify:
    _verify_tokenizer(directory, manifest.tokenizer)
  return tokens_lib.TokenData(
    vocab_size=manifest.vocab_size, end_of_text=manifest.end_of_text, **splits
  )


def _spec(path: pathlib.Path) -> ct.Json:
  kvstore = {'driver': 'file', 'path': f'{path}/'}
  return {'driver': 'zarr3', 'kvstore': kvstore}


def _open_shard(
  directory: pathlib.Path, shard: Shard, context: ts.Context
) -> ts.TensorStore:
  path = directory / shard.name
  spec = _spec(path) | {
    'fill_missing_data_reads': False,
    'recheck_cached_data': False,  # shards do not change
  }
  try:
    store = ts.open(spec, context=context, open=True, read=True).result()
  except ValueError as error:  # TensorStore raises nothing else
    raise broken(path, f'cannot be opened: {error}') from error
  if store.dtype not in (ts.uint16, ts.uint32) or store.rank != 1:
    got = f'{store.rank} of {store.dtype.name}'
    raise broken(path, f'expected one dimension of uint16 or uint32, got {got}')
  if store.shape[0] != shard.tokens:
    raise broken(path, f'expected {shard.tokens} tokens, got {store.shape[0]}')
  return store


def _verify_shard(
  directory: pathlib.Path, store: ts.TensorStore, shard: Shard, vocab_size: int
) -> None:
  path = directory / shard.name
  dtype = store.dtype.numpy_dtype.newbyteorder('<')
  digest = hashlib.blake2b(digest_size=32)
  for start in range(0, shard.tokens, _VERIFY):
    stop = min(start + _VERIFY, shard.tokens)
    try:
      tokens = store[start:stop].read().result()
    except ValueError as error:
      raise broken(path, f'cannot be read: {error}') from error
    if tokens.max() >= vocab_size:
      raise broken(
        path, f'expected ids below vocab_size {vocab_size}, got {tokens.max()}'
      )
    digest.update(tokens.astype(dtype).tobytes())
  if digest.hexdigest() != shard.digest:
    raise broken(
      path,
      f'expected tokens of the digest {shard.digest}, as in the manifest, got '
      f'{digest.hexdigest()}; fetch or write the shards again',
    )


def _verify_tokenizer(
  directory: pathlib.Path, tokenizer: TokenizerDigest
) -> None:
  if tokenizer.kind == tokenizer_lib.Bytes.kind:
    path = directory / _FILE
    definition = tokenizer_lib.Bytes().definition()
  else:
    path = directory / _TOKENIZER_FILES[tokenizer.kind]
    if not path.is_file():
      raise broken(path, 'no such file; the manifest expects it')
    definition = path.read_bytes()
  if _digest(definition) != tokenizer.digest:
    raise broken(
      path,
      f'expected a tokenizer of the digest {tokenizer.digest}, got '
      f'{_digest(definition)}',
    )


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=32).hexdigest()


def write_manifest(directory: pathlib.Path, manifest: ShardManifest) -> None:
  """Writes `manifest.json` into the folder."""
  record = {
    'version': _VERSION,
    'tokenizer': manifest.tokenizer._asdict(),
    'vocab_size': manifest.vocab_size,
    'end_of_text': manifest.end_of_text,
    'splits': {
      split: [shard._asdict() for shard in getattr(manifest, split)]
      for split in _SPLITS
    },
  }
  (directory / _FILE).write_text(json.dumps(record, indent=2) + '\n')


def read_manifest(directory: pathlib.Path) -> ShardManifest:
  """Reads `manifest.json` of the folder.

  Raises:
    ConfigError: the file is missing, or a field of it is missing, unknown, of
      another type or out of bounds.
  """
  path = directory / _FILE
  if not path.is_file():
    raise broken(path, 'no such file; make it with covenant.data.shards.write')
  try:
    record = json.loads(path.read_bytes())
  except ValueError as error:
    raise broken(path, f'not JSON: {error}') from error
  if isinstance(record, dict) and record.get('version') != _VERSION:
    raise broken(
      path, f'version: expected {_VERSION}, got {record.get("version")!r}'
    )
  _check(path, 'manifest', record, _FIELDS)
  _check(
    path, 'tokenizer', record['tokenizer'], TokenizerDigest.__annotations__
  )
  tokenizer = TokenizerDigest(**record['tokenizer'])
  if tokenizer.kind not in _KINDS:
    raise broken(
      path,
      f'tokenizer.kind: expected one of {", ".join(_KINDS)}, got '
      f'{tokenizer.kind!r}',
    )
  vocab_size, end_of_text = record['vocab_size'], record['end_of_text']
  if not 0 <= end_of_text < vocab_size <= 2**31:
    raise broken(
      path,
      'expected 0 <= end_of_text < vocab_size <= 2**31, got end_of_text '
      f'{end_of_text} and vocab_size {vocab_size}',
    )
  _check(path, 'splits', record['splits'], dict.fromkeys(_SPLITS, list))
  splits = {
    split: _read_shards(path, split, record['splits'][split])
    for split in _SPLITS
  }
  return ShardManifest(tokenizer, vocab_size, end_of_text, **splits)


def _read_shards(
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
