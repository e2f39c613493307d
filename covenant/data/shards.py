"""Shards of tokens: written once, read by verified chunks.

`manifest.py` describes the files. A reader opens only the manifest; the tokens
stay where they are, in a folder or an object store, and the chunks of the
sequences that it needs are fetched, checked against their digests and decoded
when they are read.
"""

import logging
import pathlib
import threading
from collections.abc import Iterable, Sequence
from concurrent import futures

import numpy as np

from covenant import config
from covenant import files
from covenant.data import corpus as corpus_lib
from covenant.data import manifest as manifest_lib
from covenant.data import remote
from covenant.data import tokenizer as tokenizer_lib
from covenant.data import tokens as tokens_lib

_TRIES = 3  # fetches of a chunk before it counts as damaged
_LOCAL_READS = 4  # threads that read files of this machine
_REMOTE_READS = 32  # requests to a store at once
_REMOTE_AHEAD = 8  # batches that are fetched ahead of training
_CHUNK, _SUM = manifest_lib.CHUNK, manifest_lib.SUM_BYTES


def encode(
  document: corpus_lib.Document, tokenizer: tokenizer_lib.Tokenizer
) -> np.ndarray:
  """Returns the tokens of a document with its end of text: [n]."""
  dtype = manifest_lib.token_dtype(tokenizer.vocab_size)
  ids = tokenizer.encode(document.text).astype(dtype)
  return np.append(ids, dtype.type(tokenizer.end_of_text))


def write(
  directory: str | pathlib.Path,
  corpus: corpus_lib.Corpus,
  tokenizer: tokenizer_lib.Tokenizer,
  shard_tokens: int = manifest_lib.SHARD_TOKENS,
) -> manifest_lib.ShardManifest:
  """Tokenizes a corpus in memory into a new folder, atomically.

  `tokenize.run` does this for text of any size.

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
  dtype = manifest_lib.token_dtype(tokenizer.vocab_size)
  with files.new_folder(directory) as partial:
    splits = {}
    for split in manifest_lib.SPLITS:
      writer = manifest_lib.ShardWriter(partial, '', split, dtype, shard_tokens)
      for document in getattr(corpus, split):
        ids = encode(document, tokenizer)
        writer.add(ids, document.num_bytes)
      splits[split] = writer.close()
      if not splits[split]:
        raise ValueError(f'corpus.{split}: expected documents, got none')
    definition = write_tokenizer(partial, tokenizer)
    manifest = manifest_lib.ShardManifest(
      definition,
      tokenizer.vocab_size,
      tokenizer.end_of_text,
      splits['train'],
      splits['heldout'],
    )
    (partial / manifest_lib.FILE).write_text(manifest_lib.to_json(manifest))
  return manifest


def write_tokenizer(
  directory: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer
) -> manifest_lib.TokenizerDigest:
  """Writes the file of a tokenizer, if it has one; returns its digest."""
  definition = tokenizer.definition()
  if file := manifest_lib.TOKENIZER_FILES.get(tokenizer.kind):
    files.write(directory / file, definition)
  return manifest_lib.TokenizerDigest(
    tokenizer.kind, manifest_lib.digest_of(definition)
  )


class NoManifestError(config.ConfigError):
  """There is no manifest at the path or URL."""


def other_tokens(path: str, expected: str, got: str) -> config.ConfigError:
  """Returns the error of a manifest that is not the one of the run."""
  return config.ConfigError(
    f'data.digest: expected {expected}, but the manifest of {path!r} has '
    f'{got}: these are other tokens; fetch those of the run'
  )


def read_manifest(path: str | pathlib.Path) -> manifest_lib.ShardManifest:
  """Reads the manifest of a folder or URL.

  Raises:
    NoManifestError: there is none.
    ConfigError: it is invalid.
  """
  directory = remote.folder(str(path))
  name = f'{directory.name}/{manifest_lib.FILE}'
  try:
    content = directory.read(manifest_lib.FILE)
  except FileNotFoundError:
    raise NoManifestError(
      f'data.path: {name!r}: no such file; make it with --role=tokenize'
    ) from None
  return manifest_lib.from_json(name, content)


def read_tokenizer(path: str | pathlib.Path) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer of a folder or URL of shards.

  Raises:
    ConfigError: it is missing, or another than the manifest says.
  """
  manifest = read_manifest(path)
  kind = manifest.tokenizer.kind
  if kind == tokenizer_lib.Bytes.kind:
    where, content = manifest_lib.FILE, tokenizer_lib.Bytes().definition()
  else:
    where = manifest_lib.TOKENIZER_FILES[kind]
    try:
      content = remote.folder(str(path)).read(where)
    except FileNotFoundError:
      raise manifest_lib.broken(
        f'{path}/{where}', 'no such file; the manifest expects it'
      ) from None
  if manifest_lib.digest_of(content) != manifest.tokenizer.digest:
    raise manifest_lib.broken(
      f'{path}/{where}',
      f'expected a tokenizer of the digest {manifest.tokenizer.digest}, got '
      f'{manifest_lib.digest_of(content)}',
    )
  try:
    if kind == tokenizer_lib.Bytes.kind:
      return tokenizer_lib.Bytes()
    if kind == tokenizer_lib.BPE.kind:
      return tokenizer_lib.BPE(content.decode(), manifest.end_of_text)
    return tokenizer_lib.SentencePiece(content, manifest.end_of_text)
  except ValueError as error:
    raise manifest_lib.broken(f'{path}/{where}', str(error)) from error


def open_shards(
  path: str | pathlib.Path,
  verify: bool = False,
  digest: str = '',
  cache_bytes: int = 2**32,
) -> tokens_lib.TokenData:
  """Opens a folder or URL of shards.

  Args:
    path: `data.path`.
    verify: True reads everything once. Otherwise a chunk is checked whenever it
      is read.
    digest: the digest that the manifest must have; empty accepts any.
    cache_bytes: bytes of disk for chunks of a store.

  Raises:
    ConfigError: the manifest is missing, invalid or another one, or what
      `verify` reads differs from it.
  """
  if not str(path):
    raise config.ConfigError(
      "data.path is empty; data.source 'shards' needs a folder made by "
      '--role=tokenize'
    )
  manifest = read_manifest(path)
  if digest and manifest.digest != digest:
    raise other_tokens(str(path), digest, manifest.digest)
  directory = remote.folder(str(path))
  dtype = manifest_lib.token_dtype(manifest.vocab_size)
  cache = None
  if directory.is_remote:
    slot = _CHUNK * dtype.itemsize
    cache = remote.ChunkCache(cache_bytes, slot, remote.cache_folder())
  splits = {}
  for split in manifest_lib.SPLITS:
    array = ShardedTokens(
      directory, getattr(manifest, split), manifest.vocab_size, cache
    )
    if verify:
      array.verify()
    splits[split] = tokens_lib.Split(array, manifest.num_bytes(split))
  if verify:
    read_tokenizer(path)
  return tokens_lib.TokenData(
    *(splits[split] for split in manifest_lib.SPLITS),
    vocab_size=manifest.vocab_size,
    end_of_text=manifest.end_of_text,
  )


class ShardedTokens:
  """The tokens of a split as one array; see `tokens.TokenArray`.

  The digests of the chunks of a shard are fetched with its first chunk and stay
  in memory: 16 bytes per chunk of a shard that was touched.
  """

  def __init__(
    self,
    directory: remote.Folder,
    shards: Sequence[manifest_lib.Shard],
    vocab_size: int,
    cache: remote.ChunkCache | None = None,
  ):
    self._directory, self._shards, self._cache = directory, shards, cache
    self._vocab_size = vocab_size
    self._dtype = manifest_lib.token_dtype(vocab_size)
    self._ends = np.cumsum([shard.tokens for shard in shards])
    self.shape = (int(self._ends[-1]),)
    self.ahead = _REMOTE_AHEAD if directory.is_remote else 2
    reads = _REMOTE_READS if directory.is_remote else _LOCAL_READS
    self._pool = futures.ThreadPoolExecutor(reads, 'data')
    self._sums: dict[int, bytes] = {}
    self._locks = [threading.Lock() for _ in range(64)]  # of self._sums

  def __getitem__(self, positions_nxl: np.ndarray) -> '_Rows':
    """Selects rows of neighboring tokens, by their positions."""
    return _Rows(self, positions_nxl)

  def fetch(self, shard: int, chunk: int) -> np.ndarray:
    """Returns a chunk of a shard, fetched anew while its digest is wrong.

    Raises:
      ConfigError: the chunk stays damaged, or the manifest is of other tokens.
      DataError: the store does not answer.
    """
    key = self._shards[shard].name, chunk
    expected = self._sums_of(shard)[chunk * _SUM : (chunk + 1) * _SUM]
    if self._cache and (content := self._cache.get(key)) is not None:
      if manifest_lib.sum_of(content) == expected:
        return self._decode(content, shard)
    width = _CHUNK * self._dtype.itemsize
    size = self._shards[shard].tokens * self._dtype.itemsize
    start, end = chunk * width, min((chunk + 1) * width, size)
    file = f'{key[0]}.tokens'
    for attempt in range(_TRIES):
      try:
        content = self._directory.read_range(file, start, end)
      except FileNotFoundError as error:
        raise manifest_lib.broken(
          f'{self._directory.name}/{file}', 'no such file; fetch it again'
        ) from error
      if manifest_lib.sum_of(content) == expected:
        if self._cache:
          self._cache.put(key, content)
        return self._decode(content, shard)
      logging.warning(
        'data: chunk %d of %s/%s is damaged (try %d of %d)',
        *(chunk, self._directory.name, file, attempt + 1, _TRIES),
      )
    raise manifest_lib.broken(
      f'{self._directory.name}/{file}',
      f'chunk {chunk} (bytes {start} to {end - 1}) differs from its digest; '
      'fetch the file again',
    )

  def _decode(self, content: bytes, shard: int) -> np.ndarray:
    ids_n = np.frombuffer(content, self._dtype)
    if ids_n.size and ids_n.max() >= self._vocab_size:
      raise manifest_lib.broken(
        f'{self._directory.name}/{self._shards[shard].name}.tokens',
        f'expected ids below vocab_size {self._vocab_size}, got {ids_n.max()}',
      )
    return ids_n

  def _sums_of(self, shard: int) -> bytes:
    with self._locks[shard % len(self._locks)]:
      if shard not in self._sums:
        self._sums[shard] = self._fetch_sums(self._shards[shard])
      return self._sums[shard]

  def _fetch_sums(self, shard: manifest_lib.Shard) -> bytes:
    file = f'{shard.name}.sums'
    for attempt in range(_TRIES):
      try:
        sums = self._directory.read(file)
      except FileNotFoundError as error:
        raise manifest_lib.broken(
          f'{self._directory.name}/{file}', 'no such file; fetch it again'
        ) from error
      whole = len(sums) == -(-shard.tokens // _CHUNK) * _SUM
      if whole and manifest_lib.digest_of(sums) == shard.digest:
        return sums
      logging.warning(
        'data: %s/%s is damaged (try %d of %d)',
        *(self._directory.name, file, attempt + 1, _TRIES),
      )
    raise manifest_lib.broken(
      f'{self._directory.name}/{file}',
      'differs from its digest in the manifest; fetch the shard again',
    )

  def start(
    self, chunks: Iterable[tuple[int, int]]
  ) -> dict[tuple[int, int], futures.Future[np.ndarray]]:
    """Starts to fetch chunks, as (shard, chunk)."""
    return {key: self._pool.submit(self.fetch, *key) for key in chunks}

  def locate(self, position: int) -> tuple[int, int]:
    """Returns the shard of a token, and the token's position in it."""
    shard = int(np.searchsorted(self._ends, position, 'right'))
    return shard, position - int(self._ends[shard]) + self._shards[shard].tokens

  def runs(self, position: int, length: int) -> list[tuple[int, int, int, int]]:
    """Returns (shard, chunk, start, stop) of the parts of a row of tokens."""
    found = []
    while length:
      shard, at = self.locate(position)
      chunk, start = divmod(at, _CHUNK)
      left = self._shards[shard].tokens - at
      step = min(length, _CHUNK - start, left)
      found.append((shard, chunk, start, start + step))
      position, length = position + step, length - step
    return found

  def verify(self) -> None:
    """Reads all chunks once.

    Raises:
      ConfigError: names the first file that differs from the manifest.
    """
    for i, shard in enumerate(self._shards):
      for c in range(-(-shard.tokens // _CHUNK)):
        self.fetch(i, c)
      size = shard.tokens * self._dtype.itemsize
      file = f'{shard.name}.tokens'
      if not self._directory.is_remote and self._directory.read_range(
        file, size, size + 1
      ):
        raise manifest_lib.broken(
          f'{self._directory.name}/{file}',
          f'expected {shard.tokens} tokens, got more',
        )


class _Rows:
  """Rows of tokens to be read; see `tokens.TokenArray`."""

  def __init__(self, array: ShardedTokens, positions_nxl: np.ndarray):
    self._array, self._width = array, positions_nxl.shape[1]
    self._runs = [
      array.runs(int(position), self._width) for position in positions_nxl[:, 0]
    ]

  def read(self) -> 'PendingRows':
    wanted = dict.fromkeys(run[:2] for runs in self._runs for run in runs)
    return PendingRows(self._runs, self._width, self._array.start(wanted))


class PendingRows:
  """A read in progress; see `tokens.PendingRead`."""

  def __init__(
    self,
    runs: list[list[tuple[int, int, int, int]]],
    width: int,
    chunks: dict[tuple[int, int], futures.Future[np.ndarray]],
  ):
    self._runs, self._width, self._chunks = runs, width, chunks

  def result(self) -> np.ndarray:
    rows_nxl = np.empty((len(self._runs), self._width), np.int32)
    for row_l, runs in zip(rows_nxl, self._runs, strict=True):
      at = 0
      for shard, chunk, start, stop in runs:
        ids_n = self._chunks[shard, chunk].result()
        row_l[at : at + stop - start] = ids_n[start:stop]
        at += stop - start
    return rows_nxl
