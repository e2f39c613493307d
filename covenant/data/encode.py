"""The processes of a tokenization job: documents of one file to shards."""

import collections
import contextlib
import functools
import json
import multiprocessing
import multiprocessing.context
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant import files
from covenant import typing as ct
from covenant.data import corpus
from covenant.data import manifest as manifest_lib
from covenant.data import readers
from covenant.data import sources
from covenant.data import tokenizer as tokenizer_lib

SET = 'set.json'  # the list of a set's shards, in its folder
_BATCH_CHARACTERS = 2**19  # of text that is encoded at once
_BATCH_TEXTS = 1024
_AHEAD = 3  # batches per process that encodes
_SIDES = manifest_lib.SPLITS


class Rule(NamedTuple):
  """The choice of held-out documents.

  Attributes:
    threshold: the hash of content below which a document is held out; None: the
      names of files decide, and files without a split are training text.
    tail: the character from which the one document is held out; 0: none.
    smallest: bytes of the smallest document; 0: not known.
  """

  threshold: int | None = None
  tail: int = 0
  smallest: int = 0


class Job(NamedTuple):
  """The data that the processes of a job share."""

  files: tuple[sources.File, ...]
  field: str
  kind: str  # of the tokenizer
  definition: bytes
  end_of_text: int
  folder: str
  rule: Rule = Rule()
  encoders: int = 1  # processes that encode one file
  shard_tokens: int = manifest_lib.SHARD_TOKENS


def set_name(index: int) -> str:
  return f'{index:06d}'


def texts_of(file: sources.File, field: str) -> Iterator[str]:
  if file.kind in sources.TEXTS:
    return readers.blocks(file)
  return readers.rows(file, field)


_job: Job
_counted: ct.PyTree = None  # bytes of files read, and tokens, of all processes


def start(job: Job, counted: ct.PyTree) -> None:
  """Prepares a process; it ends with the one that started it."""
  global _job, _counted
  _job, _counted = job, counted
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # processes are parallel
  if parent := multiprocessing.parent_process():
    thread = threading.Thread(target=_end_with, args=(parent,), daemon=True)
    thread.start()


def _end_with(parent: ct.PyTree) -> None:
  parent.join()
  os._exit(1)


@functools.cache
def load(kind: str, content: bytes, end: int) -> tokenizer_lib.Tokenizer:
  if kind == tokenizer_lib.Bytes.kind:
    return tokenizer_lib.Bytes()
  if kind == tokenizer_lib.BPE.kind:
    return tokenizer_lib.BPE(content.decode(), end)
  return tokenizer_lib.SentencePiece(content, end)


def _mine() -> tokenizer_lib.Tokenizer:
  return load(_job.kind, _job.definition, _job.end_of_text)


def scan(index: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the hashes and the bytes of the documents of a file."""
  file, hashes, sizes = _job.files[index], [], []
  if file.kind in sources.TOKENS:
    lengths = _mine().byte_lengths()
    for ids_n in readers.token_rows(file):
      hashes.append(corpus.content_hash([ids_n.tobytes()]))
      sizes.append(int(_lengths(lengths, ids_n, file).sum()))
  elif file.kind in sources.TEXTS:
    size = sum(len(text.encode()) for text in readers.blocks(file))
    if size:
      hashes, sizes = [corpus.content_hash(readers.blocks(file))], [size]
  else:
    for text in readers.rows(file, _job.field):
      content = text.encode()
      hashes.append(corpus.content_hash([content]))
      sizes.append(len(content))
  return np.array(hashes, np.uint64), np.array(sizes, np.int64)


def _lengths(
  lengths: np.ndarray, ids_n: np.ndarray, file: sources.File
) -> np.ndarray:
  if ids_n.size and not 0 <= ids_n.min() <= ids_n.max() < len(lengths):
    raise config_lib.ConfigError(
      f'data.path: {file.label!r} has the id {ids_n.max()}, and the tokenizer '
      f'has {len(lengths)}; name the tokenizer that made it in '
      'data.tokenizer_path'
    )
  return lengths[ids_n]


def process_context() -> multiprocessing.context.BaseContext:
  """Returns how processes start: forked from a server, anew on Windows."""
  known = multiprocessing.get_all_start_methods()
  start = 'forkserver' if 'forkserver' in known else 'spawn'
  return multiprocessing.get_context(start)


@contextlib.contextmanager
def pool(
  job: Job, workers: int, counted: ct.PyTree = None
) -> Iterator[futures.ProcessPoolExecutor]:
  """Yields a pool whose processes have the job."""
  context = process_context()
  if context.get_start_method() == 'forkserver':
    context.set_forkserver_preload([__name__])
  pool = futures.ProcessPoolExecutor(
    workers, context, initializer=start, initargs=(job, counted)
  )
  try:
    yield pool
  except BaseException:
    pool.shutdown(wait=False, cancel_futures=True)
    raise
  pool.shutdown()


def parallel(
  job: Job, work: ct.PyTree, indices: Iterable[int], workers: int
) -> list[ct.PyTree]:
  """Maps the indices of files to results, by processes if there are many."""
  if workers == 1:
    start(job, None)
    return list(map(work, indices))
  with pool(job, workers) as processes:
    return list(processes.map(work, indices))


def _count(read: int = 0, tokens: int = 0) -> None:
  if _counted is not None:
    with _counted.get_lock():
      _counted[0] += read
      _counted[1] += tokens


class _Unit(NamedTuple):
  """A document, or a piece of one."""

  side: str
  text: str
  ends: bool  # a document


def write_set(index: int) -> None:
  """Writes the shards of a file, atomically."""
  file, tokenizer = _job.files[index], _mine()
  dtype = manifest_lib.token_dtype(tokenizer.vocab_size)
  end = np.array([tokenizer.end_of_text], dtype)
  documents, sizes = 0, dict.fromkeys(_SIDES, 0)
  place = pathlib.Path(_job.folder)
  with files.new_folder(place / set_name(index)) as partial:
    writers = {
      side: manifest_lib.ShardWriter(
        partial, f'{set_name(index)}/', side, dtype, _job.shard_tokens
      )
      for side in _SIDES
    }
    for side, ids_n, num_bytes, ends in _encoded(file):
      writers[side].add(ids_n, num_bytes)
      if ends and not (len(ids_n) and ids_n[-1] == end[0]):
        writers[side].add(end, 0)
      sizes[side] += num_bytes
      documents += ends
      _count(tokens=len(ids_n) + ends)
    shards = {side: writer.close() for side, writer in writers.items()}
    tokens = {side: sum(s.tokens for s in shards[side]) for side in _SIDES}
    source = manifest_lib.Source(
      file.name,
      documents,
      *(tokens['train'], sizes['train'], tokens['heldout'], sizes['heldout']),
    )
    record: ct.Json = {
      side: [s._asdict() for s in shards[side]] for side in _SIDES
    }
    record['source'] = source._asdict()
    files.write(partial / SET, json.dumps(record, indent=1) + '\n')


_Encoded = tuple[
  str, np.ndarray, int, bool
]  # side, ids, bytes, ends a document


def _encoded(file: sources.File) -> Iterator[_Encoded]:
  """Yields the ids of the documents of a file, in order."""
  if file.kind in sources.TOKENS:
    lengths = _mine().byte_lengths()
    for ids_n in readers.token_rows(file, _count):
      num_bytes = int(_lengths(lengths, ids_n, file).sum())
      yield _side(file, [ids_n.tobytes()]), ids_n, num_bytes, True
    return
  batches = _batches(_units(file))
  if _job.encoders == 1:
    for batch in batches:
      yield from _encode_named(file, batch)
    return
  with pool(_job, _job.encoders) as processes:
    flight: collections.deque = collections.deque()
    for batch in batches:
      flight.append(processes.submit(_encode_named, file, batch))
      if len(flight) > _AHEAD * _job.encoders:
        yield from flight.popleft().result()
    while flight:
      yield from flight.popleft().result()


def _encode_named(file: sources.File, units: list[_Unit]) -> list[_Encoded]:
  tokenizer = _mine()
  if tokenizer.kind == tokenizer_lib.Bytes.kind:
    corpus.check_nul(corpus.Document(file.label, u.text) for u in units)
  ids = tokenizer.encode_batch([unit.text for unit in units])
  dtype = manifest_lib.token_dtype(tokenizer.vocab_size)
  return [
    (unit.side, ids_n.astype(dtype), len(unit.text.encode()), unit.ends)
    for unit, ids_n in zip(units, ids, strict=True)
  ]


def _batches(units: Iterator[_Unit]) -> Iterator[list[_Unit]]:
  batch, characters = [], 0
  for unit in units:
    batch.append(unit)
    characters += len(unit.text)
    if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_TEXTS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch


def _side(file: sources.File, content: Iterable[str | bytes]) -> str:
  limit = _job.rule.threshold
  if limit is None:
    return file.split or 'train'
  return _SIDES[corpus.content_hash(content) < limit]


def _units(file: sources.File) -> Iterator[_Unit]:
  """Yields the documents of a file with their sides, long ones in pieces."""
  if _job.rule.tail:
    yield from _split_tail(texts_of(file, _job.field))
  elif file.kind in sources.TEXTS:
    yield from _pieces(
      _side(file, readers.blocks(file)), readers.blocks(file, _count)
    )
  else:
    for text in readers.rows(file, _job.field, _count):
      side = _side(file, [text])
      if len(text) <= corpus.PIECE:
        yield _Unit(side, text, True)
      else:
        yield from _pieces(side, [text])


def _split_tail(blocks: Iterable[str]) -> Iterator[_Unit]:
  """Yields the one document, of which the end is held out."""

  def until(limit: int) -> Iterator[str]:
    nonlocal at
    while at < limit:
      text = next(rest, '')
      if not text:
        return
      if at + len(text) > limit:
        kept.append(text[limit - at :])
        text = text[: limit - at]
      at += len(text)
      yield text

  at, kept = 0, []
  rest = iter(blocks)
  yield from _pieces('train', until(_job.rule.tail))
  at, blocks = 0, kept[:]
  yield from _pieces('heldout', (t for part in (blocks, rest) for t in part))


def _pieces(side: str, blocks: Iterable[str]) -> Iterator[_Unit]:
  """Yields the pieces of a document, of which the last ends it."""
  parts = corpus.pieces(blocks)
  if not _mine().has_pieces:
    parts = filter(None, [''.join(blocks)])
  last = next(parts, None)
  if last is None:
    return
  for text in parts:
    yield _Unit(side, last, False)
    last = text
  yield _Unit(side, last, True)
