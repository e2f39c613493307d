"""The config.json of Hugging Face's Llama, and of models that equal it."""

import json
import pathlib
import sys

from covenant import config as config_lib
from covenant import typing as ct

# The defaults of LlamaConfig.
_DEFAULTS = {
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 10_000.0,
  'rope_type': 'default',
  'tie_word_embeddings': False,
  'attention_bias': False,
  'mlp_bias': False,
}
# Defaults of other kinds whose model is a Llama, unless a field says otherwise.
_KINDS = {
  'llama': {},
  'mistral': {'sliding_window': 4096, 'num_key_value_heads': 8},
}
# What others have, by the name of a tensor.
_OTHERS = {
  'qwen2': 'biases, such as model.layers.0.self_attn.q_proj.bias',
  'qwen3': 'norms of queries and keys, model.layers.0.self_attn.q_norm.weight',
}
# Fields that change the model unless they have this value.
_NEUTRAL = {'partial_rotary_factor': 1.0, 'quantization_config': None}
_SIZES = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'width',
  'num_hidden_layers': 'layers',
  'num_attention_heads': 'heads',
  'num_key_value_heads': 'kv_heads',
  'intermediate_size': 'ffn_width',
}
# Fields of scaled rotary positions, and ours.
_SCALING = {
  'factor': 'rope_factor',
  'low_freq_factor': 'rope_low',
  'high_freq_factor': 'rope_high',
  'original_max_position_embeddings': 'rope_context',
}
_PADDING = 1024  # most rows that padding adds to a vocabulary
# Weights in other formats, and what to do with them.
_INSTEAD = (
  (
    'adapter_model.*',
    'an adapter: merge it into its model (peft: merge_and_unload)',
  ),
  (
    'pytorch_model*.bin',
    'a pickle, which is not read: save it as safetensors by transformers, '
    'AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)',
  ),
  ('consolidated*', "its maker's own format: take the one of transformers"),
  ('*.gguf', 'of llama.cpp: take the safetensors it was made from'),
  ('*.safetensors', 'expected model.safetensors or the index of its parts'),
)


def make(
  model: config_lib.Model,
  context: int,
  end_of_text: int,
  dtype: str = 'float32',
) -> dict[str, ct.Json]:
  """Returns the content of config.json; the arguments are as in `hf.export`."""
  fields = {name: value for name, (value, _) in _fields(model).items()}
  scaling = {name: fields.pop(name) for name in _rope(model)}
  if model.rope_factor != 1:
    fields['rope_scaling'] = scaling
  return fields | {
    'architectures': ['LlamaForCausalLM'],
    'max_position_embeddings': context,
    # The defaults are ids of Llama 2's vocabulary.
    'bos_token_id': None,
    'eos_token_id': end_of_text,
    'pad_token_id': None,
    'torch_dtype': dtype,
  }


def check(path: pathlib.Path, model: config_lib.Model) -> int:
  """Compares the file with a model.

  Returns:
    The rows of the vocabulary, of which some may be padding: then it says so.

  Raises:
    ConfigError: it is of another model; names the fields.
  """
  there = read_json(path)
  _refuse(path, there)
  kind = there.get('model_type')
  try:
    there = _filled(there)
  except ValueError as e:
    raise config_lib.ConfigError(f'{path}: {e}') from None
  if there.get('head_dim') is None:  # it follows from other fields
    there['head_dim'] = model.width // model.heads
  vocab_size, padding = model.vocab_size, _padding(there, model)
  if padding:
    print(
      f'{path}: vocab_size is {vocab_size + padding}: {padding} rows after '
      f'model.vocab_size={vocab_size} are taken for padding and cut',
      file=sys.stderr,
    )
    there['vocab_size'] = vocab_size
  differ = []
  if (window := _window(there)) is not None:
    differ.append(f'sliding_window is {window!r}, the architecture has none')
  for name, neutral in _NEUTRAL.items():
    if there.get(name, neutral) != neutral:
      differ.append(f'{name} is {there[name]!r}, the architecture has none')
  if isinstance(kind, str) and kind in _KINDS:
    there['model_type'] = 'llama'
  for name, (value, field) in _fields(model).items():
    if there.get(name) != value:
      text = f'{name} is {there.get(name)!r}, {field} {value!r}'
      if name == 'vocab_size':
        text += ' (the vocabulary of another tokenizer)'
      differ.append(text)
  if differ:
    raise config_lib.ConfigError(
      f'{path} describes another model: ' + '; '.join(differ)
    )
  return vocab_size + padding


def _refuse(path: pathlib.Path, there: dict[str, ct.Json]) -> None:
  """Raises ConfigError for a known kind that is not a Llama."""
  kind = there.get('model_type')
  if isinstance(kind, str) and kind in _OTHERS:
    raise config_lib.ConfigError(
      f'{path}: model_type {kind!r}: its layers have {_OTHERS[kind]}; expected '
      f'one of {", ".join(_KINDS)}'
    )


def _filled(there: dict[str, ct.Json]) -> dict[str, ct.Json]:
  """Returns the fields with their defaults; raises ValueError."""
  # transformers 5 writes the first, 4 the second; defaults may be omitted.
  rope = there.get('rope_parameters') or there.get('rope_scaling') or {}
  if not isinstance(rope, dict) or dict in map(type, rope.values()):
    raise ValueError(f'rope_parameters: got {rope!r}')
  kind = _KINDS.get(str(there.get('model_type')), {})
  said = {k: v for k, v in there.items() if v is not None or k in kind}
  turns = {k: v for k, v in rope.items() if v is not None and k != 'type'}
  there = _DEFAULTS | kind | said | turns
  there['rope_type'] = turns.get('rope_type') or rope.get('type') or 'default'
  if there.get('num_key_value_heads') is None:
    there['num_key_value_heads'] = there.get('num_attention_heads')
  return there


def _padding(there: dict[str, ct.Json], model: config_lib.Model) -> int:
  """Returns the rows by which a vocabulary was padded to a multiple of 8."""
  rows = there.get('vocab_size')
  if not isinstance(rows, int) or rows % 8:
    return 0
  more = rows - model.vocab_size
  return more if 0 < more < _PADDING else 0


def _window(there: dict[str, ct.Json]) -> ct.Json:
  """Returns the sliding window if some position is outside of it."""
  window, most = (
    there.get(name) for name in ('sliding_window', 'max_position_embeddings')
  )
  if there.get('use_sliding_window') is False:
    return None
  enough = isinstance(window, int) and isinstance(most, int) and window >= most
  return None if enough else window


def read(path: pathlib.Path) -> config_lib.Model:
  """Returns the architecture that a file describes.

  Raises:
    ConfigError: the file is not of a Llama; names the field.
  """
  there = read_json(path)
  _refuse(path, there)
  try:
    there = _filled(there)
    scaling = _SCALING if there['rope_type'] == 'llama3' else {}
    for name in (*_SIZES, 'rope_theta', 'rms_norm_eps', *scaling):
      value, kinds = there.get(name), int if name in _SIZES else int | float
      if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
        raise ValueError(f'{name}: expected a positive number, got {value!r}')
    if not isinstance(tied := there['tie_word_embeddings'], bool):
      raise ValueError(f'tie_word_embeddings: expected a bool, got {tied!r}')
    model = config_lib.Model(
      **{field: there[name] for name, field in _SIZES.items()},
      rope_theta=float(there['rope_theta']),
      norm_eps=float(there['rms_norm_eps']),
      tie_embeddings=tied,
      **{field: there[name] for name, field in scaling.items()},
    )
  except KeyError as e:
    raise config_lib.ConfigError(f'{path}: expected the field {e}') from None
  except (TypeError, ValueError) as e:
    raise config_lib.ConfigError(f'{path}: {e}') from None
  model.check()
  check(path, model)
  return model


def end_of_text(folder: pathlib.Path) -> int | None:
  """Returns the id that ends a text; None if the folder names none."""
  for name in 'generation_config.json', 'config.json':
    if (folder / name).exists():
      found = read_json(folder / name).get('eos_token_id')
      if isinstance(found, list) and found:
        found = found[0]
      if isinstance(found, int):
        return found
  return None


def read_json(path: pathlib.Path) -> dict[str, ct.Json]:
  """Reads a JSON object; raises ConfigError if there is none."""
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise config_lib.ConfigError(
      f'{path}: no such file{_instead(path)}'
    ) from None
  except (OSError, ValueError, RecursionError) as e:
    raise config_lib.ConfigError(f'{path}: not JSON: {e}') from e
  if not isinstance(content, dict):
    raise config_lib.ConfigError(f'{path}: expected a JSON object')
  return content


def _instead(path: pathlib.Path) -> str:
  """Returns the rest of a message: what a folder has instead of a file."""
  if not path.parent.is_dir():
    return '; fetch the folder: hf download OWNER/MODEL --local-dir FOLDER'
  # Without its config.json a folder may have its weights.
  kinds = _INSTEAD[:-1] if path.name == 'config.json' else _INSTEAD
  for pattern, what in kinds:
    if names := sorted(found.name for found in path.parent.glob(pattern)):
      return f'; there is {names[0]}, {what}'
  return ''


def _rope(model: config_lib.Model) -> dict[str, tuple[ct.Json, str]]:
  """Returns the fields of scaled rotary positions, as `_fields`."""
  if model.rope_factor == 1:
    return {'rope_type': ('default', 'model.rope_factor is 1:')}
  return {'rope_type': ('llama3', 'model.rope_factor is not 1:')} | {
    name: (getattr(model, field), f'model.{field}')
    for name, field in _SCALING.items()
  }


def _fields(model: config_lib.Model) -> dict[str, tuple[ct.Json, str]]:
  """Returns the required value and our field for each field of config.json."""
  m = model
  return {
    'model_type': ('llama', 'the architecture'),
    'vocab_size': (m.vocab_size, 'model.vocab_size'),
    'hidden_size': (m.width, 'model.width'),
    'intermediate_size': (m.ffn_width, 'model.ffn_width'),
    'num_hidden_layers': (m.layers, 'model.layers'),
    'num_attention_heads': (m.heads, 'model.heads'),
    'num_key_value_heads': (m.kv_heads, 'model.kv_heads'),
    'head_dim': (m.width // m.heads, 'model.width / model.heads'),
    'rms_norm_eps': (m.norm_eps, 'model.norm_eps'),
    'rope_theta': (m.rope_theta, 'model.rope_theta'),
    **_rope(m),
    'tie_word_embeddings': (m.tie_embeddings, 'model.tie_embeddings'),
    'hidden_act': ('silu', 'the architecture'),
    'attention_bias': (False, 'the architecture'),
    'mlp_bias': (False, 'the architecture'),
  }
