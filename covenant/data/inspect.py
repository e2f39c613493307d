"""A description of the data of a run for people, and its verification."""

import numpy as np

from covenant import config as config_lib
from covenant.data import assignment
from covenant.data import dataset
from covenant.data import manifest as manifest_lib
from covenant.data import shards
from covenant.data import tokens as tokens_lib

_SAMPLES = 3  # sequences that are decoded
_SAMPLE_TOKENS = 48
_SOURCES = 20  # files that are listed


def text(config: config_lib.Config) -> str:
  """Returns the contents of the manifests of a config, all verified.

  Text that is no shards is tokenized in memory, and its shares are told.

  Raises:
    ConfigError: a shard differs from its manifest, or text cannot be read.
  """
  found = dataset.load(config)
  lines = []
  if config.data.source == 'shards':
    for path in config.data.paths:
      lines += [_folder(path), '']
  else:
    for split in manifest_lib.SPLITS:
      tokens = getattr(found, split)
      lines.append(
        f'{split:8} {tokens.num_tokens:>18,} tokens {tokens.num_bytes:>18,} '
        'bytes'
      )
  return '\n'.join([*lines, *_rounds(config, found.train)])


def shares(manifest: manifest_lib.ShardManifest) -> str:
  """Returns the sizes and shares of both splits, a line each."""
  total = sum(manifest.num_bytes(split) for split in manifest_lib.SPLITS)
  return '\n'.join(
    f'{split:8} {manifest.num_tokens(split):>18,} tokens '
    f'{manifest.num_bytes(split):>18,} bytes '
    f'{manifest.num_bytes(split) / max(total, 1):7.2%}'
    for split in manifest_lib.SPLITS
  )


def summary(manifest: manifest_lib.ShardManifest, folder: str) -> str:
  """Returns the shares, and how to train on the shards in a folder."""
  return (
    f'{shares(manifest)}\nwrote token shards to {folder}; train on them with '
    f'--config.data.source=shards --config.data.path={folder}'
  )


def _folder(path: str) -> str:
  """Describes and verifies one folder or URL."""
  manifest = shards.read_manifest(path)
  tokenizer = shards.read_tokenizer(path)
  data = shards.open_shards(path, verify=True)
  kind = manifest.tokenizer.kind
  lines = [
    path,
    f'digest   {manifest.digest}',
    f'tokens   {kind}, {manifest.vocab_size:,} ids, end of text '
    f'{manifest.end_of_text}, tokenizer {manifest.tokenizer.digest[:16]}',
    shares(manifest),
    f'shards   {len(manifest.train) + len(manifest.heldout)}, all verified',
  ]
  whole = sum(s.bytes + s.heldout_bytes for s in manifest.sources)
  for source in manifest.sources[:_SOURCES]:
    share = (source.bytes + source.heldout_bytes) / max(whole, 1)
    name = source.name.encode(errors='backslashreplace').decode()
    lines.append(
      f'source   {name}: {source.documents:,} documents, '
      f'{source.tokens + source.heldout_tokens:,} tokens, {share:.2%}'
    )
  if len(manifest.sources) > _SOURCES:
    lines.append(f'source   ... {len(manifest.sources) - _SOURCES} more')
  width = min(_SAMPLE_TOKENS, data.train.num_tokens - 1)
  ids = assignment.evaluation(data.train.num_sequences(width), _SAMPLES)
  for row in data.train.read(ids, width):
    lines.append(f'sample   {tokenizer.decode(row)!r}')
  return '\n'.join(lines)


def _rounds(config: config_lib.Config, split: tokens_lib.Split) -> list[str]:
  """Describes what rounds draw from each manifest, by phase."""
  context, each = config.data.context, assignment.per_miner(config)
  most = min(config.miners, config.gauntlet.contributors)
  starts = [phase.start for phase in split.phases] or [0]
  lines = []
  for start, end in zip(starts, [*starts[1:], config.rounds], strict=True):
    found = split.population(context, start)
    if not isinstance(found, tokens_lib.Population):
      found = tokens_lib.Population((0,), (found,), (1,))
    names = config.data.paths
    if config.data.phases:
      phase = [p for p in config.data.phases if p.start == start][0]
      names = tuple(share.path for share in phase.mixture)
    lines.append(
      f'rounds   {start} to {end - 1}: {each:,} sequences of {context} per '
      f'miner and round, {most} miners'
    )
    weights = np.asarray(found.weights) / sum(found.weights)
    for name, size, weight in zip(names, found.sizes, weights, strict=True):
      drawn = (end - start) * most * each * weight
      lines.append(
        f'  {weight:7.2%} {name or config.data.source}: {size:,} sequences, '
        f'drawn {drawn / max(size, 1):.3g} times on average'
      )
  return lines
