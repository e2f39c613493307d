"""The tokens of a run, from its config."""

from covenant import config as config_lib
from covenant.data import corpus
from covenant.data import pretrained
from covenant.data import shards
from covenant.data import tokenizer
from covenant.data import tokens


def load(config: config_lib.Config) -> tokens.TokenData:
  """Opens the shards of `data.path`, or tokenizes the text of `data.source`.

  Raises:
    ConfigError: The source is missing or broken, `model.vocab_size` is too
      small for its ids, `data.context` too large for its splits, or the model
      of `pretrained` has another vocabulary.
  """
  data = config.data
  if data.source == 'shards':
    result = shards.open_shards(data.path)
  else:
    documents = corpus.load(data, config.seed)
    encoder = tokenizer.make(data, config.model.vocab_size, documents)
    result = tokens.tokenize(documents, encoder)
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
