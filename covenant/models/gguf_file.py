"""Export to GGUF, the one file that llama.cpp loads: model and tokenizer.

Tensors have llama.cpp's names. It pairs neighboring dimensions of a head in
rotary positions, so the rows of queries and keys are permuted.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import extras
from covenant import files as files_lib
from covenant import typing as ct
from covenant.models import attention
from covenant.models import hf

_FREQUENCIES = 'rope_freqs.weight'
_PERMUTED = {'query': 'heads', 'key': 'kv_heads'}
# llama.cpp's names of the ways to split a text into words, by the expression
# in tokenizer.json; a ByteLevel without one is GPT-2's.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_SPLITS = {_WORDS % r'\p{N}{1,3}': 'llama-bpe', _WORDS % r'\p{N}': 'qwen2'}
_NEVER = 'ÿ ÿ'  # a merge that no text needs: these bytes are not in UTF-8


class Vocabulary(NamedTuple):
  """The tokens of a model as llama.cpp knows them."""

  kind: str  # 'gpt2': byte-level BPE; 'llama': SentencePiece BPE
  tokens: list[str]
  types: list[int]  # 1: normal, 2: unknown, 3: control, 4: added, 6: byte
  split: str = 'default'
  merges: tuple[str, ...] = ()
  scores: tuple[float, ...] = ()
  space_prefix: bool = False


def export(
  path: str | os.PathLike[str],
  model: config_lib.Model,
  params: ct.Params,
  *,
  name: str,
  context: int,
  end_of_text: int,
  files: Mapping[str, bytes],
  dtype: str = 'float32',
  licence: str = '',
) -> None:
  """Writes parameters and their tokenizer to a new file, atomically.

  Args:
    path: a file that does not exist.
    model: the architecture.
    params: parameters of `llama.init`, NumPy or JAX arrays.
    name: the name of the model.
    context: tokens per sequence in training.
    end_of_text: the id that ends a document.
    files: the tokenizer's files by name, as for `hf.export`.
    dtype: 'float32', or 'bfloat16' for matrices.
    licence: the license's identifier; empty: none is named.

  Raises:
    ConfigError: the package gguf is not installed, the file exists, or
      llama.cpp has no such tokenizer.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise config_lib.ConfigError(f'{path} exists: remove it first')
  vocabulary = read_vocabulary(files, model.vocab_size)
  with extras.needed('hf'):
    import gguf  # noqa: PLC0415  only for this
  tensors = _tensors(gguf, model)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.partial')
  writer = gguf.GGUFWriter(partial, 'llama')
  writer.add_name(name)
  if licence:
    writer.add_license(licence)
  kinds = gguf.LlamaFileType
  is_half = dtype == 'bfloat16'
  writer.add_file_type(kinds.MOSTLY_BF16 if is_half else kinds.ALL_F32)
  _describe(writer, model, context)
  _add_vocabulary(writer, vocabulary, end_of_text)
  quantization = gguf.GGMLQuantizationType
  for there, tensor in tensors.items():
    half = is_half and len(tensor.shape) == 2
    writer.add_tensor_info(
      there,
      tensor.shape,
      np.dtype(np.uint16 if half else np.float32),
      (2 if half else 4) * math.prod(tensor.shape),
      quantization.BF16 if half else quantization.F32,
    )
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for there, tensor in tensors.items():
      x = _values(model, params, there, tensor)
      if is_half and x.ndim == 2:
        x = x.astype(jnp.bfloat16).view(np.uint16)
      writer.write_tensor_data(x)
    writer.close()
    files_lib.sync(partial)
    os.replace(partial, path)
  except OSError as e:
    raise config_lib.ConfigError(f'{path} cannot be written: {e}') from e
  finally:
    writer.close()
    partial.unlink(missing_ok=True)


def permuted(x_OxD: np.ndarray, heads: int) -> np.ndarray:
  """Returns rows in llama.cpp's order: a pair of dimensions side by side.

  >>> permuted(np.arange(4)[:, None], 1)[:, 0].tolist()
  [0, 2, 1, 3]
  """
  rows, D = x_OxD.shape
  x_Hx2xIxD = x_OxD.reshape(heads, 2, rows // heads // 2, D)
  return x_Hx2xIxD.swapaxes(1, 2).reshape(rows, D)


def _tensors(gguf: Any, model: config_lib.Model) -> dict[str, hf.Tensor]:
  """Returns the tensors of the folder of Hugging Face by llama.cpp's names."""
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.layers)
  found = {
    names.get_name(name, try_suffixes=('.weight',)): tensor
    for name, tensor in hf.layout(model).items()
  }
  if model.rope_factor != 1:
    half = model.width // model.heads // 2
    found[_FREQUENCIES] = hf.Tensor((half,), (), None, False)
  return found


def _values(
  model: config_lib.Model, params: ct.Params, name: str, tensor: hf.Tensor
) -> np.ndarray:
  if name == _FREQUENCIES:
    half = model.width // model.heads // 2
    plain_I = model.rope_theta ** (-np.arange(half) / half)
    return (plain_I / attention.frequencies(model)).astype(np.float32)
  x = np.asarray(hf.leaf(params, tensor).copy())
  x = np.ascontiguousarray(x.T if tensor.turned else x, np.float32)
  heads = _PERMUTED.get(tensor.leaf[-1])
  return permuted(x, getattr(model, heads)) if heads else x


def _describe(writer: Any, model: config_lib.Model, context: int) -> None:
  m = model
  writer.add_vocab_size(m.vocab_size)
  writer.add_context_length(context)
  writer.add_embedding_length(m.width)
  writer.add_block_count(m.layers)
  writer.add_feed_forward_length(m.ffn_width)
  writer.add_head_count(m.heads)
  writer.add_head_count_kv(m.kv_heads)
  writer.add_layer_norm_rms_eps(m.norm_eps)
  writer.add_rope_dimension_count(m.width // m.heads)
  writer.add_rope_freq_base(m.rope_theta)


def _add_vocabulary(writer: Any, v: Vocabulary, end_of_text: int) -> None:
  writer.add_tokenizer_model(v.kind)
  writer.add_tokenizer_pre(v.split)
  writer.add_token_list(v.tokens)
  writer.add_token_types(v.types)
  if v.kind == 'gpt2':
    writer.add_token_merges(list(v.merges) or [_NEVER])
  else:
    writer.add_token_scores(list(v.scores))
    writer.add_remove_extra_whitespaces(False)
  writer.add_add_space_prefix(v.space_prefix)
  writer.add_eos_token_id(end_of_text)
  # Ours adds nothing before or after a text.
  writer.add_add_bos_token(False)
  writer.add_add_eos_token(False)


def read_vocabulary(files: Mapping[str, bytes], size: int) -> Vocabulary:
  """Returns the tokens of a tokenizer, and unused ones up to `size`.

  Args:
    files: tokenizer.json, and tokenizer.model of SentencePiece.
    size: the rows of the embedding.

  Raises:
    ConfigError: llama.cpp has no such tokenizer, as far as is known here.
  """
  if 'tokenizer.model' in files:
    return _pieces(files['tokenizer.model'], size)
  definition = json.loads(files['tokenizer.json'])
  model, split = definition['model'], _split(definition)
  if model['type'] != 'BPE' or split is None or definition.get('normalizer'):
    raise config_lib.ConfigError(
      '--format=gguf: expected a byte-level BPE that splits text as GPT-2, '
      'Llama 3 or Qwen 2 do, or a BPE of SentencePiece; for this tokenizer '
      'export without --format, and convert the folder by the '
      'convert_hf_to_gguf.py of llama.cpp'
    )
  tokens, types = _unused(size)
  for token, i in model['vocab'].items():
    tokens[i], types[i] = token, 1
  for added in definition['added_tokens']:
    if added['id'] < size:
      i = added['id']
      tokens[i], types[i] = added['content'], 3 if added['special'] else 4
  merges = tuple(
    pair if isinstance(pair, str) else ' '.join(pair)
    for pair in model['merges']
  )
  return Vocabulary('gpt2', tokens, types, split, merges)


def _unused(size: int) -> tuple[list[str], list[int]]:
  return [f'[PAD{i}]' for i in range(size)], [5] * size


def _split(definition: dict[str, ct.Json]) -> str | None:
  """Returns llama.cpp's name of how a tokenizer splits a text into words."""
  step = definition.get('pre_tokenizer') or {}
  steps = step.get('pretokenizers', [step])
  if [s.get('type') for s in steps] == ['ByteLevel']:
    is_plain = not steps[0].get('add_prefix_space')
    has_words = steps[0].get('use_regex', True)
    # Without merges, how words are split makes no difference.
    fits = is_plain and (has_words or not definition['model']['merges'])
    return 'gpt-2' if fits else None
  if [s.get('type') for s in steps] == ['Split', 'ByteLevel']:
    return _SPLITS.get(steps[0]['pattern'].get('Regex', ''))
  return None


def _pieces(content: bytes, size: int) -> Vocabulary:
  """Returns the tokens of a SentencePiece model, whose types are GGUF's."""
  with extras.needed('data'):
    from sentencepiece import sentencepiece_model_pb2 as pb2  # noqa: PLC0415
  proto: Any = pb2
  spm = proto.ModelProto.FromString(content)
  if spm.trainer_spec.model_type != spm.trainer_spec.BPE:
    raise config_lib.ConfigError(
      '--format=gguf: expected a BPE of SentencePiece, got another kind'
    )
  tokens, types = _unused(size)
  scores = [-10_000.0] * size
  for i, piece in enumerate(spm.pieces):
    tokens[i], types[i], scores[i] = piece.piece, piece.type, piece.score
  return Vocabulary(
    kind='llama',
    tokens=tokens,
    types=types,
    scores=tuple(scores),
    space_prefix=spm.normalizer_spec.add_dummy_prefix,
  )
