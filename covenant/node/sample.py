"""Text of a run's model, or of one in Hugging Face's format."""

import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from covenant import config as config_lib
from covenant import extras
from covenant import typing as ct
from covenant.data import pretrained
from covenant.models import generate
from covenant.models import hf
from covenant.models import hf_config
from covenant.node import export as export_lib
from covenant.node import workdir as workdir_lib

_INCOMPLETE = '�'  # of a character whose last bytes are not there yet

_PROMPT = flags.DEFINE_string('prompt', '\n', 'sample: the text to continue.')
_CHAT = flags.DEFINE_bool(
  'chat', False, 'sample: --prompt is a question to a model of --role=finetune.'
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 200, 'sample: the most tokens to draw.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8, 'sample: 0 always draws the likeliest token.'
)
_TOP_K = flags.DEFINE_integer(
  'top_k', 0, 'sample: only so many of the likeliest tokens; 0: all.'
)
_TOP_P = flags.DEFINE_float(
  'top_p', 1.0, 'sample: only the likeliest tokens of this probability.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'sample: the seed of the draws.')
MODEL = flags.DEFINE_string(
  'model',
  None,
  "sample, finetune: a folder in Hugging Face's format, such as one of "
  '--role=export. Default: the newest checkpoint of --workdir.',
)


Encode = Callable[[str], Sequence[int] | np.ndarray]
Decode = Callable[[Sequence[int]], str]
Tokenizer = tuple[Encode, Decode, int | None]  # and the end of text


class Source(NamedTuple):
  """A model that can continue a text."""

  model: config_lib.Model
  params: ct.Params
  encode: Encode
  decode: Decode
  end_of_text: int | None


def sample(config: config_lib.Config, workdir: str) -> None:
  """Continues --prompt by the newest checkpoint of a workdir, or --model."""
  sampling = generate.Sampling(
    _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value
  )
  sampling.check()
  if MODEL.value:
    source = of_folder(pathlib.Path(MODEL.value).expanduser())
  else:
    source = of_workdir(config, workdir)
  prompt = _PROMPT.value
  if _CHAT.value:
    prompt = f'<|user|>\n{prompt}\n<|assistant|>\n'
  sys.stdout.write(prompt)
  for text in continued(source, prompt, _TOKENS.value, sampling):
    sys.stdout.write(_shown(text))
    sys.stdout.flush()
  sys.stdout.write('\n')


def _shown(text: str) -> str:
  """Escapes what would command a terminal: the model may be a stranger's."""
  return ''.join(
    c if c.isprintable() or c in '\n\t' else ascii(c)[1:-1] for c in text
  )


def continued(
  source: Source, prompt: str, count: int, sampling: generate.Sampling
) -> Iterator[str]:
  """Yields the text that follows a prompt, as it is drawn."""
  ids: list[int] = []
  done = ''
  for token in generate.generate(
    source.model,
    source.params,
    source.encode(prompt),
    count,
    sampling,
    source.end_of_text,
  ):
    ids.append(token)
    text = source.decode(ids)
    if not text.endswith(_INCOMPLETE):
      yield text.removeprefix(done)
      done = text
  if (text := source.decode(ids)) != done:
    yield text.removeprefix(done)


def of_workdir(config: config_lib.Config, workdir: str) -> Source:
  """Loads the newest checkpoint of a run.

  Raises:
    ConfigError: there is none, or it is of another run.
  """
  workdir_lib.Workdir(workdir).check_owner(config)
  _, params = export_lib.newest(workdir)
  return Source(config.model, params, *tokenizer_of(config, workdir))


def tokenizer_of(
  config: config_lib.Config, workdir: str | os.PathLike[str]
) -> Tokenizer:
  """Returns the tokenizer of the run in a workdir, and the end of text."""
  found, end_of_text = pretrained.kept(workdir, config)
  if pretrained.JSON in found:
    text = found[pretrained.JSON].decode()
    return *_tokenizer(text, 'the tokenizer'), end_of_text
  tokenizer = pretrained.of(config)
  return tokenizer.encode, tokenizer.decode, end_of_text


def _tokenizer(text: str, where: str) -> tuple[Encode, Decode]:
  """Returns the functions of a tokenizer.json."""
  with extras.needed('run'):
    import tokenizers  # noqa: PLC0415  only for this
  try:
    made = tokenizers.Tokenizer.from_str(text)
  except Exception as e:  # the library raises bare Exceptions
    raise config_lib.ConfigError(f'{where}: not a tokenizer: {e}') from e
  made.encode_special_tokens = True  # the name of one in a text stays text
  return (
    lambda text: made.encode(text, add_special_tokens=False).ids,
    lambda ids: made.decode(ids, skip_special_tokens=False),
  )


def of_folder(folder: pathlib.Path) -> Source:
  """Loads a folder in Hugging Face's format.

  Raises:
    ConfigError: it is not a Llama, or has no tokenizer.json.
  """
  path = folder / 'tokenizer.json'
  if not path.is_file():
    raise config_lib.ConfigError(f'--model: {path}: no such file')
  model = hf_config.read(folder / 'config.json')
  params = hf.load(folder, model)
  functions = _tokenizer(path.read_text(encoding='utf-8'), str(path))
  return Source(model, params, *functions, hf_config.end_of_text(folder))
