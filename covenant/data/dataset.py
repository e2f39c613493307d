"""The tokens of a run, from its config."""

import numpy as np
import tensorstore as ts

from covenant import config as config_lib
from covenant.data import corpus as corpus_lib
from covenant.data import pretrained
from covenant.data import shards
from covenant.data import tokenizer as tokenizer_lib
from covenant.data import tokens


def load(config: config_lib.Config) -> tokens.TokenData:
  """Opens the shards of `data.path`, or tokenizes the text of `data.source`.

  Raises:
    ConfigError: the source is missing or damaged, `model.vocab_size` is too
      small for its ids, `data.context` too large for its splits, or the model
      of `pretrained` has another vocabulary.
  """
  data = config.data
  if data.source == 'shards':
    result = shards.open_shards(data.path)
  else:
    corpus = corpus_lib.load(data, config.seed)
    tokenizer = tokenizer_lib.make(data, config.model.vocab_size, corpus)
    result = tokenize(corpus, tokenizer)
  if result.vocab_size > config.model.vocab_size:
    raise config_lib.ConfigError(
      f'model.vocab_size is {config.model.vocab_size}, but the shards in '
      f'data.path {data.path!r} need {result.vocab_size}; raise '
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


def tokenize(
  corpus: corpus_lib.Corpus, tokenizer: tokenizer_lib.Tokenizer
) -> tokens.TokenData:
  """Tokenizes a corpus into memory; large ones belong in shards (shards.py)."""

  def split(documents: tuple[corpus_lib.Document, ...]) -> tokens.Split:
    tokens_n = np.concatenate(
      [tokenizer_lib.encode(document, tokenizer) for document in documents]
    )
    num_bytes = sum(document.num_bytes for document in documents)
    return tokens.Split(ts.cast(ts.array(tokens_n), ts.int32), num_bytes)

  return tokens.TokenData(
    train=split(corpus.train),
    heldout=split(corpus.heldout),
    vocab_size=tokenizer.vocab_size,
    end_of_text=tokenizer.end_of_text,
  )
