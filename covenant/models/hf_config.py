"""The config.json of Hugging Face's Llama."""

import json
import pathlib

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


def make(model: config_lib.Model, context: int, end_of_text: int) -> ct.Json:
  """Returns the content of config.json; the arguments are as in `hf.export`."""
  fields = {name: value for name, (value, _) in _fields(model).items()}
  del fields['rope_type']  # the default, which has no field of its own
  return fields | {
    'architectures': ['LlamaForCausalLM'],
    'max_position_embeddings': context,
    # The defaults are ids of Llama 2's vocabulary.
    'bos_token_id': None,
    'eos_token_id': end_of_text,
    'pad_token_id': None,
    'torch_dtype': 'float32',
  }


def check(path: pathlib.Path, model: config_lib.Model) -> None:
  """Raises ConfigError if the file differs from `model`; names the fields."""
  there = read_json(path)
  # transformers 5 writes the first, 4 the second; defaults may be omitted.
  rope = there.get('rope_parameters') or there.get('rope_scaling') or {}
  if not isinstance(rope, dict):
    raise config_lib.ConfigError(f'{path}: rope_parameters: got {rope!r}')
  there = _DEFAULTS | there | {k: v for k, v in rope.items() if k != 'type'}
  there['rope_type'] = rope.get('rope_type', rope.get('type', 'default'))
  if there.get('num_key_value_heads') is None:
    there['num_key_value_heads'] = there.get('num_attention_heads')
  if there.get('head_dim') is None:  # it follows from other fields
    there['head_dim'] = model.width // model.heads
  differ = []
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


def read_json(path: pathlib.Path) -> dict[str, ct.Json]:
  """Reads a JSON object; raises ConfigError if there is none."""
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise config_lib.ConfigError(f'{path}: no such file') from None
  except (OSError, ValueError) as e:
    raise config_lib.ConfigError(f'{path}: not JSON: {e}') from e
  if not isinstance(content, dict):
    raise config_lib.ConfigError(f'{path}: expected a JSON object')
  return content


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
    'rope_type': ('default', 'the architecture'),
    'tie_word_embeddings': (m.tie_embeddings, 'model.tie_embeddings'),
    'hidden_act': ('silu', 'the architecture'),
    'attention_bias': (False, 'the architecture'),
    'mlp_bias': (False, 'the architecture'),
  }
