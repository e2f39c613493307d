"""Tokenizes text of any size into shards, by many processes and machines.

Each input file becomes a set of shards, `000017/`, written by one process and
renamed when it is complete. So a job that was killed goes on with the files
that are missing, and machines of a job share the files by `--part=3/64`. The
manifest is the concatenation of the sets, and the same for any number of
workers and parts.

  job.json       what all parts have in common; another job is refused
  000017/        the shards of one file, and set.json, which lists them
  manifest.json  written when all sets are there (manifest.py)
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import numpy as np

from covenant import config as config_lib
from covenant import extras
from covenant import files
from covenant import folder_lock
from covenant import typing as ct
from covenant.data import corpus
from covenant.data import encode
from covenant.data import manifest as manifest_lib
from covenant.data import shards
from covenant.data import sources
from covenant.data import tokenizer as tokenizer_lib

with extras.needed('run'):
  import tqdm

_EXACT_BYTES = 2**30  # files of less in all are read twice, to split exactly
_JOB = 'job.json'
_SIDES = manifest_lib.SPLITS


def parse_part(text: str) -> tuple[int, int]:
  """Parses K/N, the number of a machine and that of all machines.

  Raises:
    ConfigError: the text is none.
  """
  number, slash, parts = text.partition('/')
  valid = slash and number.isdecimal() and parts.isdecimal()
  if not valid or not 1 <= int(number) <= int(parts):
    raise config_lib.ConfigError(
      f'--part: expected K/N, with K from 1 to N, got {text!r}'
    )
  return int(number), int(parts)


def run(
  config: config_lib.Config,
  folder: str,
  workers: int = 1,
  part: tuple[int, int] = (1, 1),
  shard_tokens: int = manifest_lib.SHARD_TOKENS,
) -> manifest_lib.ShardManifest | None:
  """Tokenizes the files of `data.path`, or those of a part that are missing.

  Text of another source, which a config makes, is done at once and whole.

  Args:
    config: the config of the run; `data` says what to read and how.
    folder: the folder for the shards; it may have sets of this job already.
    workers: the number of processes.
    part: the number of this machine, from 1 on, and that of all machines.
    shard_tokens: tokens per shard except the last of a file.

  Returns:
    The manifest, or None while other parts are not complete.

  Raises:
    ConfigError: text is missing or damaged, or the folder has another job.
  """
  data, (number, parts) = config.data, part
  if data.source != 'text':  # small, and no files
    documents = corpus.load(data, config.seed)
    made = tokenizer_lib.make(data, config.model.vocab_size, documents)
    return shards.write(folder, documents, made)
  found = sources.find(data.path)
  place = pathlib.Path(folder)
  with folder_lock.hold(place / f'.part-{number}-of-{parts}'):
    tokenizer = _tokenizer(config, found, place)
    job = encode.Job(
      found,
      data.field,
      tokenizer.kind,
      tokenizer.definition(),
      tokenizer.end_of_text,
      str(place),
      shard_tokens=shard_tokens,
    )
    job = job._replace(rule=_rule(job, data, workers))
    _claim(place, job, data)
    for stale in place.glob('.*.partial'):
      if int(stale.name.split('.')[1]) % parts == number - 1:
        shutil.rmtree(stale, ignore_errors=True)
    mine = range(number - 1, len(found), parts)
    todo = [i for i in mine if not _is_done(place, i)]
    if len(todo) < len(mine):
      print(
        f'{len(mine) - len(todo)} of {len(mine)} files are done already',
        file=sys.stderr,
      )
    _write_sets(job, todo, workers)
  if any(not _is_done(place, i) for i in range(len(found))):
    return None
  return merge(folder)


def merge(folder: str) -> manifest_lib.ShardManifest:
  """Writes the manifest of a folder that has all sets of a job.

  Raises:
    ConfigError: a set is missing, a split is empty, or the share of held-out
      text is far from what was asked for.
  """
  place = pathlib.Path(folder)
  try:
    job = json.loads((place / _JOB).read_bytes())
  except (OSError, ValueError) as error:
    raise config_lib.ConfigError(
      f'--workdir: expected a folder of --role=tokenize, with {_JOB}: {error}'
    ) from error
  missing = [i for i in range(job['files']) if not _is_done(place, i)]
  if missing:
    raise config_lib.ConfigError(
      f'--workdir: {len(missing)} of {job["files"]} sets are missing in '
      f'{folder!r}, the first is {encode.set_name(missing[0])}; run their '
      'parts of --role=tokenize, or copy them here'
    )
  splits: dict[str, list[manifest_lib.Shard]] = {side: [] for side in _SIDES}
  told = []
  for i in range(job['files']):
    record = json.loads((place / encode.set_name(i) / encode.SET).read_bytes())
    for side in _SIDES:
      splits[side] += [manifest_lib.Shard(**shard) for shard in record[side]]
    told.append(manifest_lib.Source(**record['source']))
  for side in _SIDES:
    if not splits[side]:
      raise config_lib.ConfigError(
        f'data.heldout_fraction: the {side} split has no text; set the '
        'fraction otherwise, or name files so that they say train and val'
      )
  found = manifest_lib.ShardManifest(
    manifest_lib.TokenizerDigest(**job['tokenizer']),
    job['vocab_size'],
    job['end_of_text'],
    tuple(splits['train']),
    tuple(splits['heldout']),
    tuple(told),
  )
  if job['heldout_fraction']:
    held, train = found.num_bytes('heldout'), found.num_bytes('train')
    rule = encode.Rule(*job['rule'])
    corpus.check_share(
      held, held + train, job['heldout_fraction'], rule.smallest
    )
  files.write(place / manifest_lib.FILE, manifest_lib.to_json(found))
  return found


def _is_done(place: pathlib.Path, index: int) -> bool:
  return (place / encode.set_name(index) / encode.SET).exists()


def _tokenizer(
  config: config_lib.Config,
  found: tuple[sources.File, ...],
  place: pathlib.Path,
) -> tokenizer_lib.Tokenizer:
  """Makes the tokenizer; one that must be trained first is kept."""
  data = config.data
  kept = place / manifest_lib.TOKENIZER_FILES['bpe']
  if data.tokenizer == 'bpe' and not data.tokenizer_path and kept.exists():
    return tokenizer_lib.BPE(kept.read_text(encoding='utf-8'))
  texts = (
    text
    for file in found
    if file.split != 'heldout' and file.kind not in sources.TOKENS
    for text in encode.texts_of(file, data.field)
  )
  made = tokenizer_lib.make(data, config.model.vocab_size, texts)
  if file := manifest_lib.TOKENIZER_FILES.get(made.kind):
    files.write(place / file, made.definition())
  return made


def _claim(place: pathlib.Path, job: encode.Job, data: config_lib.Data) -> None:
  """Writes `job.json`, or compares it with this job.

  Raises:
    ConfigError: the folder has another job.
  """
  names = [[os.fsencode(f.name).hex(), f.size] for f in job.files]
  tokenizer = encode.load(job.kind, job.definition, job.end_of_text)
  by_names = job.rule.threshold is None
  record = {
    'files': len(job.files),
    'listing': manifest_lib.digest_of(json.dumps(names).encode()),
    'field': job.field,
    'tokenizer': {
      'kind': job.kind,
      'digest': manifest_lib.digest_of(job.definition),
    },
    'vocab_size': tokenizer.vocab_size,
    'end_of_text': job.end_of_text,
    'heldout_fraction': 0 if by_names else data.heldout_fraction,
    'rule': list(job.rule),
    'shard_tokens': job.shard_tokens,
  }
  path = place / _JOB
  if not path.exists():
    files.write(path, json.dumps(record, indent=1) + '\n')
    return
  there = json.loads(path.read_bytes())
  if other := [key for key in record if there.get(key) != record[key]]:
    raise config_lib.ConfigError(
      f'--workdir: {str(place)!r} has shards of another job ({other[0]}: '
      f'{there.get(other[0])} there, {record[other[0]]} here); choose another '
      'folder, or the same text and settings'
    )


def _rule(job: encode.Job, data: config_lib.Data, workers: int) -> encode.Rule:
  """Chooses how documents are held out; see `corpus`."""
  said = {file.split for file in job.files}
  if 'heldout' in said:
    if said == {'heldout'}:
      raise corpus.no_training_text(data.path)
    return encode.Rule()
  if len(job.files) > 1 or job.files[0].kind not in sources.TEXTS:
    if sum(file.size for file in job.files) > _EXACT_BYTES:
      return encode.Rule(int(data.heldout_fraction * 2**64))
    scanned = encode.parallel(job, encode.scan, range(len(job.files)), workers)
    hashes, sizes = map(np.concatenate, zip(*scanned, strict=True))
    try:
      limit = corpus.threshold(hashes, sizes, data.heldout_fraction)
      return encode.Rule(limit, smallest=int(sizes.min()))
    except ValueError as error:
      if len(hashes) != 1:
        raise config_lib.ConfigError(f'data.path: {error}') from error
  length = sum(map(len, _one_document(job)))
  if length < 2:
    raise config_lib.ConfigError(
      f'data.path: expected two characters or more, to hold out a part; got '
      f'{length}'
    )
  size = corpus.tail_size(length, data.heldout_fraction)
  low, cut, at = length - size - size // 4, length - size, 0
  for text in _one_document(job):
    newline = text.rfind('\n', max(low - at, 0), max(length - size - at, 0))
    if newline >= 0:
      cut = at + newline + 1
    at += len(text)
  return encode.Rule(tail=cut)


def _one_document(job: encode.Job) -> Iterator[str]:
  """Yields the text of a corpus that is one document."""
  for file in job.files:
    yield from encode.texts_of(file, job.field)


def _write_sets(job: encode.Job, todo: list[int], workers: int) -> None:
  """Tokenizes files by processes, and shows the progress."""
  if not todo:
    return
  leaders = min(workers, len(todo))
  job = job._replace(encoders=workers // leaders)
  context = encode.process_context()
  counted = context.Array('q', 2)
  total = sum(job.files[i].size for i in todo)
  # The largest first, so that no process ends long after the others.
  todo = sorted(todo, key=lambda i: (-job.files[i].size, i))
  with _progress(total) as show:
    if workers == 1:
      encode.start(job, counted)
      for i in todo:
        encode.write_set(i)
        show(*counted)
      return
    with encode.pool(job, leaders, counted) as pool:
      pending = {pool.submit(encode.write_set, i) for i in todo}
      while pending:
        done, pending = futures.wait(
          pending, 0.5, return_when=futures.FIRST_EXCEPTION
        )
        for future in done:
          future.result()
        show(*counted)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[ct.PyTree]:
  """Yields a function that shows bytes read, tokens, their rate and the ETA."""
  began = time.monotonic()
  slow = 0.5 if sys.stderr.isatty() else 30.0  # seconds between lines of a log
  with tqdm.tqdm(
    total=total,
    unit='B',
    unit_scale=True,
    mininterval=slow,
    desc='tokenize',
  ) as bar:

    def show(read: int, tokens: int) -> None:
      rate = tokens / max(time.monotonic() - began, 1e-9)
      text = f'{tokens / 1e6:,.1f} M tokens, {rate / 1e3:,.0f} k tokens/s'
      bar.set_postfix_str(text, refresh=False)
      bar.update(min(read, total) - bar.n)

    yield show
