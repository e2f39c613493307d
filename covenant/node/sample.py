"""Text of a run's model, or of one in Hugging Face's format."""

import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from covenant import config as config_lib
from covenant import extras
from covenant import typing as ct
from covenant.data import dataset
from covenant.data import pretrained
from covenant.models import generate
from covenant.models import hf
from covenant.models import hf_config
from covenant.node import evaluator as evaluator_lib
from covenant.node import workdir as workdir_lib

_INCOMPLETE = '�'  # of a character whose last bytes are not there yet

_PROMPT = flags.DEFINE_string('prompt', '\n', 'sample: the text to continue.')
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
_MODEL = flags.DEFINE_string(
  'model',
  None,
  "sample: a folder in Hugging Face's format, such as one of --role=export. "
  'Default: the newest checkpoint of --workdir.',
)


class Source(NamedTuple):
  """A model that can continue a text."""

  model: config_lib.Model
  params: ct.Params
  encode: Callable[[str], Sequence[int] | np.ndarray]
  decode: Callable[[Sequence[int]], str]
  end_of_text: int | None


def sample(config: config_lib.Config, workdir: str) -> None:
  """Continues --prompt by the newest checkpoint of a workdir, or --model."""
  sampling = generate.Sampling(
    _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value
  )
  sampling.check()
  if _MODEL.value:
    source = of_folder(pathlib.Path(_MODEL.value).expanduser())
  else:
    source = of_workdir(config, workdir)
  sys.stdout.write(_PROMPT.value)
  for text in continued(source, _PROMPT.value, _TOKENS.value, sampling):
    sys.stdout.write(text)
    sys.stdout.flush()
  sys.stdout.write('\n')


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
  config = dataset.identified(config)
  workdir_lib.Workdir(workdir).check_owner(config)
  _, params = evaluator_lib.newest(workdir)
  tokenizer = pretrained.of(config)
  return Source(
    config.model,
    params,
    tokenizer.encode,
    tokenizer.decode,
    tokenizer.end_of_text,
  )


def of_folder(folder: pathlib.Path) -> Source:
  """Loads a folder in Hugging Face's format.

  Raises:
    ConfigError: it is not a Llama, or has no tokenizer.json.
  """
  with extras.needed('run'):
    import tokenizers  # noqa: PLC0415  only for this
  path = folder / 'tokenizer.json'
  if not path.is_file():
    raise config_lib.ConfigError(f'--model: {path}: no such file')
  model = hf_config.read(folder / 'config.json')
  params = hf.load(folder, model)
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  return Source(
    model,
    params,
    lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
    hf_config.end_of_text(folder),
  )
