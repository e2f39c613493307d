"""Export to and import from Hugging Face's Llama: safetensors, config.json.

A folder as `transformers.LlamaForCausalLM.from_pretrained` loads it:

  config.json                         the architecture
  generation_config.json              the end of text
  model-00001-of-00002.safetensors    tensors, float32 or bfloat16
  model.safetensors.index.json        tensor -> file

Its matrices are [out, in] where ours are [in, out], and its layers are never
stacked. Both pair dimension i of a head with i + K / 2 in rotary positions
(attention.rotate), so no row is permuted. Tensors are written and read one at a
time.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant import files as files_lib
from covenant import typing as ct
from covenant.models import hf_config
from covenant.models import llama

_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'  # written by transformers if one file is enough
_EMBEDDING = 'model.embed_tokens.weight'
_UNEMBEDDING = 'lm_head.weight'
_FREQUENCIES = '.rotary_emb.inv_freq'  # follow from rope_theta
_DTYPES = ('F32', 'BF16', 'F16', 'F64')
# Name of a type -> its name in the files, and NumPy's.
DTYPES = {
  'float32': ('F32', np.dtype('<f4')),
  'bfloat16': ('BF16', np.dtype(jax.numpy.bfloat16)),
}
_SLAB = 2**24  # bytes transposed at a time
# Name in their layer -> leaf of ours.
_LAYER = {
  'input_layernorm': ('attention_norm', 'gain'),
  'self_attn.q_proj': ('attention', 'query'),
  'self_attn.k_proj': ('attention', 'key'),
  'self_attn.v_proj': ('attention', 'value'),
  'self_attn.o_proj': ('attention', 'output'),
  'post_attention_layernorm': ('ffn_norm', 'gain'),
  'mlp.gate_proj': ('ffn', 'gate'),
  'mlp.up_proj': ('ffn', 'up'),
  'mlp.down_proj': ('ffn', 'down'),
}


class Tensor(NamedTuple):
  """A tensor of the folder and its place in the parameters."""

  shape: tuple[int, ...]  # shape in the folder
  leaf: tuple[str, ...]  # keys in the parameters
  layer: int | None  # index in a stacked leaf; None: not stacked
  turned: bool  # True if ours is its transpose


def names_and_shapes(model: config_lib.Model) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor, in the order of the files.

  >>> shapes = names_and_shapes(config_lib.Model(width=8, ffn_width=24))
  >>> shapes['model.layers.1.mlp.down_proj.weight']
  (8, 24)
  """
  return {name: tensor.shape for name, tensor in layout(model).items()}


def layout(model: config_lib.Model) -> dict[str, Tensor]:
  """Returns every tensor by its name, in the order of the files."""
  m = model
  kv_width = m.width // m.heads * m.kv_heads
  outputs = {'key': kv_width, 'value': kv_width}
  outputs |= {'gate': m.ffn_width, 'up': m.ffn_width}
  table = (m.vocab_size, m.width)
  found = {'model.embed_tokens': Tensor(table, ('embedding',), None, False)}
  for i in range(m.layers):
    top, layer = ('layers', i) if m.scan_layers else (f'layers_{i}', None)
    for name, (part, weight) in _LAYER.items():
      shape = (m.width,)
      if weight != 'gain':
        inputs = m.ffn_width if weight == 'down' else m.width
        shape = (outputs.get(weight, m.width), inputs)
      found[f'model.layers.{i}.{name}'] = Tensor(
        shape, (top, part, weight), layer, len(shape) == 2
      )
  found['model.norm'] = Tensor((m.width,), ('final_norm', 'gain'), None, False)
  if not m.tie_embeddings:
    found['lm_head'] = Tensor(table, ('unembedding',), None, True)
  return {f'{name}.weight': tensor for name, tensor in found.items()}


def export(
  folder: str | os.PathLike[str],
  model: config_lib.Model,
  params: ct.Params,
  *,
  context: int,
  end_of_text: int,
  files: Mapping[str, bytes],
  shard_bytes: int = 4 * 10**9,
  dtype: str = 'float32',
) -> None:
  """Writes parameters to a new folder, atomically.

  Beside the parameters, which may be sharded over the devices of this process,
  one tensor is in memory at a time.

  Args:
    folder: a folder that does not exist.
    model: the architecture.
    params: parameters of `llama.init`, NumPy or JAX arrays.
    context: tokens per sequence in training, `data.context`.
    end_of_text: the id that ends a document.
    files: the content of further files by name, such as the tokenizer's.
    shard_bytes: the most bytes of a file, unless one tensor has more.
    dtype: a key of `DTYPES`, to which parameters are rounded.

  Raises:
    ConfigError: the parameters do not fit `model`, the folder exists, or the
      disk has too little space.
  """
  _check_params(model, params)
  tensors = layout(model)
  width = DTYPES[dtype][1].itemsize
  total = width * sum(math.prod(t.shape) for t in tensors.values())
  with _new_folder(pathlib.Path(folder), total) as partial:
    shards = _cut(tensors, shard_bytes // width)
    names = [
      f'model-{i:05d}-of-{len(shards):05d}.safetensors'
      for i in range(1, len(shards) + 1)
    ]
    where = {}
    for file, shard in zip(names, shards, strict=True):
      _write_shard(
        partial / file, {n: tensors[n] for n in shard}, params, dtype
      )
      where |= dict.fromkeys(shard, file)
    index = {'metadata': {'total_size': total}, 'weight_map': where}
    _write_json(partial / _INDEX, index)
    _write_json(
      partial / 'config.json',
      hf_config.make(model, context, end_of_text, dtype),
    )
    _write_json(
      partial / 'generation_config.json', {'eos_token_id': end_of_text}
    )
    for file, content in files.items():
      (partial / file).write_bytes(content)


def load(folder: str | os.PathLike[str], model: config_lib.Model) -> ct.Params:
  """Loads the parameters of a folder in the layout of `llama.init`.

  Names, shapes and dtypes are checked before the first tensor is read. One
  tensor at a time is in memory beside the result. A table of frequencies
  (`inv_freq`) is left out, as is the padding of a vocabulary, and the copy that
  some files have of a tied embedding.

  Args:
    folder: a folder of `export` or `save_pretrained`, or of a published model,
      in float32, bfloat16, float16 or float64.
    model: the expected architecture.

  Returns:
    A tree of NumPy arrays, float32.

  Raises:
    ConfigError: safetensors is not installed, or the folder does not hold
      exactly `model`; names the file and the tensor or field.
  """
  folder = pathlib.Path(folder)
  rows = hf_config.check(folder / 'config.json', model)
  tensors = layout(dataclasses.replace(model, vocab_size=rows))
  if model.tie_embeddings:
    tensors[_UNEMBEDDING] = tensors[_EMBEDDING]
  shards = _read_index(folder, tensors)
  for file, names in shards.items():
    _check_shard(file, {name: tensors[name] for name in names})
  params: dict[str, ct.PyTree] = {}
  like = llama.abstract(model)
  for path, x in jax.tree.leaves_with_path(like):
    *parents, last = (key.key for key in path)
    node = params
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = np.empty(x.shape, np.float32)
  for file, names in shards.items():
    with _open(file) as reader:
      for name in names:
        tensor, x = tensors[name], reader.get_tensor(name)
        target = leaf(params, tensor)
        if name in (_EMBEDDING, _UNEMBEDDING):
          x = x[: model.vocab_size]
        if name == _UNEMBEDDING and model.tie_embeddings:
          if not np.array_equal(target, np.asarray(x, np.float32)):
            raise config_lib.ConfigError(
              f'{file}: {name} is not {_EMBEDDING}, though config.json says '
              'tie_word_embeddings; correct it, and use '
              'model.tie_embeddings=False'
            )
          continue
        target[...] = x.T if tensor.turned else x
  return params


def leaf(params: ct.Params, tensor: Tensor) -> ct.Array:
  """Returns the parameter, or the layer of one, that a tensor is."""
  for key in tensor.leaf:
    params = params[key]
  return params if tensor.layer is None else params[tensor.layer]


def _check_params(model: config_lib.Model, params: ct.Params) -> None:
  like = llama.abstract(model)
  expected, got = (
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): (
        f'{x.dtype} {list(x.shape)}'
      )
      for path, x in jax.tree.leaves_with_path(tree)
    }
    for tree in (like, params)
  )
  for name in expected | got:
    here, there = expected.get(name, 'none'), got.get(name, 'none')
    if here != there:
      raise config_lib.ConfigError(
        f'model: the parameters have another architecture: {name}: expected '
        f'{here}, got {there}'
      )


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path, room: int) -> Iterator[pathlib.Path]:
  """Yields a folder to fill, which gets its name on success."""
  folder = folder.resolve()
  if folder.exists():
    raise config_lib.ConfigError(
      f'{folder} exists, and is not overwritten: remove it, or choose another'
    )
  try:
    with files_lib.new_folder(folder) as partial:
      free = shutil.disk_usage(partial).free
      if free < room:
        raise config_lib.ConfigError(
          f'{folder} takes {room / 1e9:,.1f} GB; the disk has '
          f'{free / 1e9:,.1f} GB'
        )
      yield partial
  except OSError as e:
    raise config_lib.ConfigError(f'{folder} cannot be written: {e}') from e


def _cut(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
  """Divides the tensors into files of so many elements; returns the names."""
  shards, room = [], 0
  for name, tensor in tensors.items():
    size = math.prod(tensor.shape)
    if size > room:
      shards.append([])
      room = most
    shards[-1].append(name)
    room -= size
  return shards


def _write_shard(
  path: pathlib.Path,
  tensors: Mapping[str, Tensor],
  params: ct.Params,
  dtype: str,
) -> None:
  """Writes one file: the length of the header, the header, the tensors.

  The safetensors package would need all tensors of a file at once.
  """
  header: dict[str, ct.Json] = {'__metadata__': {'format': 'pt'}}
  name_there, here = DTYPES[dtype]
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + here.itemsize * math.prod(tensor.shape)
    header[name] = {
      'dtype': name_there,
      'shape': tensor.shape,
      'data_offsets': (start, end),
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # tensors start at a multiple of 8
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for tensor in tensors.values():
      _write_tensor(file, tensor, params, here)


def _write_tensor(
  file: BinaryIO, tensor: Tensor, params: ct.Params, dtype: np.dtype
) -> None:
  # A copy: JAX keeps what it fetched for as long as the array lives.
  x = np.asarray(leaf(params, tensor).copy())
  x = x.T if tensor.turned else x
  rows = max(1, _SLAB // x[0].nbytes)
  for start in range(0, len(x), rows):
    slab = np.ascontiguousarray(x[start : start + rows], dtype)
    file.write(slab.view(np.uint8).data)


def _write_json(path: pathlib.Path, content: ct.Json) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')


def _read_index(
  folder: pathlib.Path, tensors: Mapping[str, Tensor]
) -> dict[pathlib.Path, list[str]]:
  """Returns the names of the tensors in each file, and checks them."""
  path = folder / _INDEX
  if not path.exists() and (folder / _SINGLE).exists():
    with _open(folder / _SINGLE) as reader:
      there = set(reader.keys())
    _check_names(folder / _SINGLE, there, tensors)
    return {folder / _SINGLE: [name for name in tensors if name in there]}
  where = hf_config.read_json(path).get('weight_map')
  if not isinstance(where, dict):
    raise config_lib.ConfigError(f'{path}: expected a weight_map')
  _check_names(path, where, tensors)
  shards: dict[pathlib.Path, list[str]] = {}
  for name in tensors:
    if name not in where:
      continue  # optional
    file = where[name]
    # Untrusted: a name must not lead out of the folder.
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise config_lib.ConfigError(f'{path}: {name}: expected a file name')
    shards.setdefault(folder / file, []).append(name)
  return shards


def _check_names(
  path: pathlib.Path, there: Iterable[str], expected: Mapping[str, Tensor]
) -> None:
  found = {name for name in there if not name.endswith(_FREQUENCIES)}
  wanted = set(expected)
  lacking = wanted - found
  if expected.get(_UNEMBEDDING) == expected.get(_EMBEDDING):
    lacking.discard(_UNEMBEDDING)  # tied: some files have it, too
  for what, names in (
    ('lacks', lacking),
    ('has an unexpected tensor,', found - wanted),
  ):
    if names:
      more = f' and {len(names) - 1} more' if len(names) > 1 else ''
      raise config_lib.ConfigError(f'{path} {what} {min(names)}{more}')


def _check_shard(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
  with _open(path) as reader:
    _check_names(path, reader.keys(), tensors)
    for name, tensor in tensors.items():
      view = reader.get_slice(name)
      dtype, shape = view.get_dtype(), tuple(view.get_shape())
      if shape != tensor.shape or dtype not in _DTYPES:
        raise config_lib.ConfigError(
          f'{path}: {name}: expected {", ".join(_DTYPES)} of shape '
          f'{list(tensor.shape)}, got {dtype} of {list(shape)}'
        )


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
  """Yields a reader of a file."""
  try:
    import safetensors  # noqa: PLC0415  an optional dependency
  except ImportError:
    raise config_lib.ConfigError(
      'reading Hugging Face folders needs the package safetensors; run '
      "`pip install 'covenant[hf]'`"
    ) from None
  try:
    reader: Any = safetensors.safe_open(path, framework='numpy')
  except FileNotFoundError:
    raise config_lib.ConfigError(f'{path}: no such file') from None
  except (safetensors.SafetensorError, OSError) as e:
    raise config_lib.ConfigError(
      f'{path}: damaged or truncated: {e}; fetch it again'
    ) from e
  with reader:
    yield reader
