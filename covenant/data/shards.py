"""Pre-tokenized shards: a folder that is written once and never changed.

  manifest.json    the names, sizes and digests of shards (shard_manifest.py)
  tokenizer.json   the tokenizer (.model for SentencePiece, none for bytes)
  train-00000/     a zarr3 array of tokens, uint16 or uint32, in one file of
  heldout-00000/   chunks, each readable alone and with its CRC-32C

The order of the tokens is that of tokens.py.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from covenant import config
from covenant import files
from covenant import typing as ct
from covenant.data import corpus as corpus_lib
from covenant.data import shard_manifest as manifest_lib
from covenant.data import tokenizer as tokenizer_lib
from covenant.data import tokens as tokens_lib

_TOKENIZER_FILES = {'bpe': 'tokenizer.json', 'sentencepiece': 'tokenizer.model'}
_CHUNK = 2**14  # tokens per chunk and read: 32 KiB of uint16
_VERIFY = 2**22  # tokens per read of a verification
_CACHE = 2**26  # bytes of cache per folder, for the indices of chunks


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
    for split in manifest_lib.SPLITS:
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
    manifest = manifest_lib.ShardManifest(
      tokenizer=manifest_lib.TokenizerDigest(
        tokenizer.kind, _digest(definition)
      ),
      vocab_size=tokenizer.vocab_size,
      end_of_text=tokenizer.end_of_text,
      **splits,
    )
    manifest_lib.write(partial, manifest)


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
) -> manifest_lib.Shard:
  chunk_codecs = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'crc32c'},
  ]
  file_codec = {
    'name': 'sharding_indexed',
    'configuration': {'chunk_shape': [_CHUNK], 'codecs': chunk_codecs},
  }
  file_shape = [-(-len(tokens) // _CHUNK) * _CHUNK]  # a multiple of _CHUNK
  spec = _spec(directory / name) | {
    'create': True,
    # A missing chunk must be an error, not a run of zeros.
    'store_data_equal_to_fill_value': True,
    'metadata': {
      'shape': [len(tokens)],
      'data_type': tokens.dtype.name,
      'chunk_grid': {
        'name': 'regular',
        'configuration': {'chunk_shape': file_shape},
      },
      'codecs': [file_codec],
    },
  }
  ts.open(spec).result().write(tokens).result()
  digest = _digest(tokens.tobytes())
  return manifest_lib.Shard(name, len(tokens), num_bytes, digest)


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
  manifest = manifest_lib.read(directory)
  context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE}})
  splits = {}
  for split in manifest_lib.SPLITS:
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
  directory: pathlib.Path, shard: manifest_lib.Shard, context: ts.Context
) -> ts.TensorStore:
  path = directory / shard.name
  spec = _spec(path) | {
    'fill_missing_data_reads': False,
    'recheck_cached_data': False,  # shards do not change
  }
  try:
    store = ts.open(spec, context=context, open=True, read=True).result()
  except ValueError as error:  # TensorStore raises nothing else
    raise manifest_lib.broken(path, f'cannot be opened: {error}') from error
  if store.dtype not in (ts.uint16, ts.uint32) or store.rank != 1:
    raise manifest_lib.broken(
      path,
      'expected one dimension of uint16 or uint32, got '
      f'{store.rank} of {store.dtype.name}',
    )
  if store.shape[0] != shard.tokens:
    raise manifest_lib.broken(
      path,
      f'expected {shard.tokens} tokens, as in the manifest, got '
      f'{store.shape[0]}',
    )
  return store


def _verify_shard(
  directory: pathlib.Path,
  store: ts.TensorStore,
  shard: manifest_lib.Shard,
  vocab_size: int,
) -> None:
  path = directory / shard.name
  dtype = store.dtype.numpy_dtype.newbyteorder('<')
  digest = hashlib.blake2b(digest_size=32)
  for start in range(0, shard.tokens, _VERIFY):
    stop = min(start + _VERIFY, shard.tokens)
    try:
      tokens = store[start:stop].read().result()
    except ValueError as error:
      raise manifest_lib.broken(path, f'cannot be read: {error}') from error
    if tokens.max() >= vocab_size:
      raise manifest_lib.broken(
        path, f'expected ids below vocab_size {vocab_size}, got {tokens.max()}'
      )
    digest.update(tokens.astype(dtype).tobytes())
  if digest.hexdigest() != shard.digest:
    raise manifest_lib.broken(
      path,
      f'expected tokens of the digest {shard.digest}, as in the manifest, got '
      f'{digest.hexdigest()}; fetch or write the shards again',
    )


def _verify_tokenizer(
  directory: pathlib.Path, tokenizer: manifest_lib.TokenizerDigest
) -> None:
  if tokenizer.kind == tokenizer_lib.Bytes.kind:
    path = directory / manifest_lib.FILE
    definition = tokenizer_lib.Bytes().definition()
  else:
    path = directory / _TOKENIZER_FILES[tokenizer.kind]
    if not path.is_file():
      raise manifest_lib.broken(path, 'no such file; the manifest expects it')
    definition = path.read_bytes()
  if _digest(definition) != tokenizer.digest:
    raise manifest_lib.broken(
      path,
      f'expected a tokenizer of the digest {tokenizer.digest}, got '
      f'{_digest(definition)}',
    )


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=32).hexdigest()
