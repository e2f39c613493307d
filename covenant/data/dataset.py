"""The tokens of a run, from its config."""

import dataclasses
import fractions
import hashlib
import math

import numpy as np

from covenant import config as config_lib
from covenant import extras
from covenant.data import corpus as corpus_lib
from covenant.data import joined
from covenant.data import pretrained
from covenant.data import shards
from covenant.data import tokenizer as tokenizer_lib
from covenant.data import tokens

with extras.needed('run'):
  import tensorstore as ts


def load(config: config_lib.Config) -> tokens.TokenData:
  """Opens the shards of `data.path`, or tokenizes the text of `data.source`.

  Raises:
    ConfigError: the source is missing or damaged, `model.vocab_size` is too
      small for its ids, `data.context` too large for its splits, or the model
      of `pretrained` has another vocabulary.
  """
  data = config.data
  if data.source == 'shards':
    result = _open(data)
  else:
    corpus = corpus_lib.load(data, config.seed)
    tokenizer = tokenizer_lib.make(data, config.model.vocab_size, corpus)
    result = tokenize(corpus, tokenizer)
  if data.packing == 'documents':
    end = result.end_of_text
    result = result._replace(
      train=dataclasses.replace(result.train, end_of_text=end),
      heldout=dataclasses.replace(result.heldout, end_of_text=end),
    )
  if result.vocab_size > config.model.vocab_size:
    raise config_lib.ConfigError(
      f'model.vocab_size is {config.model.vocab_size}, but the shards in '
      f'data.path {", ".join(data.paths)!r} need {result.vocab_size}; raise '
      'model.vocab_size'
    )
  for name in ('train', 'heldout'):
    split = getattr(result, name)
    if not split.num_sequences(data.context):
      raise config_lib.ConfigError(
        f'data.context is {data.context}, but the {name} split has '
        f'{split.num_tokens} tokens; expected at most {split.num_tokens - 1}'
      )
  if config.pretrained:
    pretrained.check(config.pretrained, pretrained.of(config))
  return result


def identified(config: config_lib.Config) -> config_lib.Config:
  """Returns a config with the digests of the manifests or files that it names.

  So nodes have the same run when they have the same tokens, wherever these lie.
  A manifest that is not there keeps its path.

  Raises:
    ConfigError: a manifest or file is invalid, or another one than the config
      says; or there is no text.
  """
  data = config.data
  if data.source != 'shards':
    return _with_text_digest(config)
  digests = {}
  for path in data.paths:
    try:
      digests[path] = shards.read_manifest(path).digest
    except shards.NoManifestError:
      continue

  def known(path: str, digest: str) -> str:
    if digest and digests.get(path, digest) != digest:
      raise shards.other_tokens(path, digest, digests[path])
    return digests.get(path, digest)

  phases = tuple(
    dataclasses.replace(
      phase,
      mixture=tuple(
        dataclasses.replace(share, digest=known(share.path, share.digest))
        for share in phase.mixture
      ),
    )
    for phase in data.phases
  )
  digest = '' if phases else known(data.path, data.digest)
  data = dataclasses.replace(data, digest=digest, phases=phases)
  return dataclasses.replace(config, data=data)


def _with_text_digest(config: config_lib.Config) -> config_lib.Config:
  """Returns a config with the digest of its text and its tokenizer's file."""
  data = config.data
  if not data.path and not data.tokenizer_path:
    return config  # other sources are functions of the config
  digest = hashlib.sha256()
  corpus = corpus_lib.Corpus((), ())
  if data.source == 'text':
    corpus = corpus_lib.load(data, config.seed)
  for split in corpus:
    digest.update(len(split).to_bytes(8, 'little'))
    for document in split:
      text = document.text.encode()
      digest.update(len(text).to_bytes(8, 'little') + text)
  if data.tokenizer_path:
    made = tokenizer_lib.make(data, config.model.vocab_size, corpus)
    end = made.end_of_text.to_bytes(8, 'little', signed=True)
    digest.update(end + made.definition())
  found = digest.hexdigest()
  if data.digest not in ('', found):
    raise config_lib.ConfigError(
      f'data.digest: expected {data.digest}, but the text of {data.path!r} and '
      f'the tokenizer have {found}: these are other ones; fetch those of the '
      'run'
    )
  data = dataclasses.replace(data, digest=found)
  return dataclasses.replace(config, data=data)


def _open(data: config_lib.Data) -> tokens.TokenData:
  """Opens the shards of a path, or of all phases."""
  found = data.paths
  cache_bytes = int(data.cache_gb * 1e9) // len(found)
  digests = {s.path: s.digest for p in data.phases for s in p.mixture}
  opened = [
    shards.open_shards(
      path,
      digest=digests.get(path, data.digest),
      cache_bytes=cache_bytes,
    )
    for path in found
  ]
  if not data.phases:
    return opened[0]
  first, *others = [shards.read_manifest(path) for path in found]
  for path, other in zip(found[1:], others, strict=True):
    if other[:3] != first[:3]:
      raise config_lib.ConfigError(
        f'data.phases: expected shards of one tokenizer; that of {path!r} '
        f'differs from that of {found[0]!r}'
      )
  phases = tuple(
    tokens.MixturePhase(
      phase.start,
      tuple(found.index(share.path) for share in phase.mixture),
      _units([share.weight for share in phase.mixture]),
    )
    for phase in data.phases
  )
  train = _join([data.train for data in opened], phases)
  # The text to evaluate on stays the same when the mixture changes.
  heldout = _join([opened[i].heldout for i in phases[0].manifests], ())
  return opened[0]._replace(train=train, heldout=heldout)


def _units(weights: list[float]) -> tuple[int, ...]:
  """Rounds weights to whole numbers of a fixed sum, by largest remainders.

  >>> _units([1.0, 1.0, 1.0]), _units([3.0, 1.0])
  ((3334, 3333, 3333), (3, 1))
  """
  total = config_lib.WEIGHT_UNITS
  exact = [
    fractions.Fraction(w) * total / sum(map(fractions.Fraction, weights))
    for w in weights
  ]
  units = [max(int(x), 1) for x in exact]
  by_remainder = sorted(
    range(len(exact)), key=lambda k: (units[k] - exact[k], k)
  )
  for k in by_remainder[: max(total - sum(units), 0)]:
    units[k] += 1
  return tuple(n // math.gcd(*units) for n in units)


def _join(
  splits: list[tokens.Split], phases: tuple[tokens.MixturePhase, ...]
) -> tokens.Split:
  return tokens.Split(
    joined.Joined([split.store for split in splits]),
    sum(split.num_bytes for split in splits),
    parts=tuple(split.num_tokens for split in splits),
    phases=phases,
  )


def tokenize(
  corpus: corpus_lib.Corpus, tokenizer: tokenizer_lib.Tokenizer
) -> tokens.TokenData:
  """Tokenizes a corpus into memory; large ones belong in shards (shards.py)."""

  def split(documents: tuple[corpus_lib.Document, ...]) -> tokens.Split:
    tokens_n = np.concatenate(
      [shards.encode(document, tokenizer) for document in documents]
    )
    num_bytes = sum(document.num_bytes for document in documents)
    return tokens.Split(ts.cast(ts.array(tokens_n), ts.int32), num_bytes)

  return tokens.TokenData(
    train=split(corpus.train),
    heldout=split(corpus.heldout),
    vocab_size=tokenizer.vocab_size,
    end_of_text=tokenizer.end_of_text,
    tokenizer=tokenizer,
  )
