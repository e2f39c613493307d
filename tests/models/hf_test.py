"""Tests of folders for Hugging Face: the numbers, the layout, and damage.

Those that need transformers and torch compare logits with the real library.
"""

import dataclasses
import functools
import importlib.util
import io
import json
import math
import pathlib
import tracemalloc
import unittest
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.models import attention
from covenant.models import hf
from covenant.models import llama
from tests import helpers


def _needs(*packages):
  lacking = [p for p in packages if importlib.util.find_spec(p) is None]
  return unittest.skipIf(
    lacking, f"not installed: {lacking}; pip install 'covenant[hf]'"
  )


_TINY = config.Model(
  vocab_size=61,
  width=32,
  layers=3,
  heads=4,
  kv_heads=2,
  ffn_width=48,
  rope_theta=500_000.0,
)
_72B = config.load(f'{helpers.CONFIGS}/72b.py').model
_SWITCHES = {'scan_layers': (False, True), 'tie_embeddings': (False, True)}


def _with(**changes):
  return dataclasses.replace(_TINY, **changes)


def _abstract(model):
  return jax.eval_shape(functools.partial(llama.init, model), jax.random.key(0))


def _lively_params(model):
  """Parameters large enough that every part of the model shows in a logit."""
  rng = np.random.default_rng(0)

  def draw(x):
    scale = 1 / math.sqrt(x.shape[-1])
    centre = 1 if x.shape[-1:] == x.shape else 0  # gains
    return np.float32(rng.normal(centre, scale, x.shape))

  return jax.tree.map(draw, _abstract(model))


@functools.cache
def _apply(model):
  return jax.jit(functools.partial(llama.apply, model))


def _tokens():
  return np.random.default_rng(1).integers(0, 61, (2, 40), np.int32)


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.parent = pathlib.Path(self.create_tempdir().full_path)
    self.folder = self.parent / 'export'

  def export(self, model, params, **options):
    options = {'context': 40, 'end_of_text': 7, 'files': {}} | options
    hf.export(self.folder, model, params, **options)


class LayoutTest(parameterized.TestCase):
  @parameterized.parameters((False, 72_747_327_488), (True, 70_599_843_840))
  def test_72b(self, tie_embeddings, expected):
    model = dataclasses.replace(_72B, tie_embeddings=tie_embeddings)
    shapes = hf.names_and_shapes(model)
    self.assertEqual(sum(map(math.prod, shapes.values())), expected)
    self.assertLen(shapes, 80 * 9 + 2 + (not tie_embeddings))
    self.assertEqual(
      shapes['model.layers.79.self_attn.k_proj.weight'], (1024, 8192)
    )
    self.assertEqual('lm_head.weight' in shapes, not tie_embeddings)

  @_needs('torch', 'transformers')
  @parameterized.parameters(False, True)
  @pytest.mark.filterwarnings('ignore')  # theirs
  @pytest.mark.slow
  def test_72b_has_the_names_and_shapes_of_transformers(self, tie_embeddings):
    import torch
    import transformers

    # Their own way from numbers to names, on a device that has no memory.
    settings = transformers.LlamaConfig(
      vocab_size=262_144,
      hidden_size=8192,
      num_hidden_layers=80,
      num_attention_heads=64,
      num_key_value_heads=8,
      intermediate_size=28_672,
      tie_word_embeddings=tie_embeddings,
    )
    with torch.device('meta'):
      theirs = transformers.LlamaForCausalLM(settings)
    model = dataclasses.replace(_72B, tie_embeddings=tie_embeddings)
    self.assertEqual(
      hf.names_and_shapes(model),
      {name: tuple(x.shape) for name, x in theirs.named_parameters()},
    )


class ExportTest(FolderTest):
  @parameterized.product(**_SWITCHES)
  @pytest.mark.rows(1)
  def test_files(self, **switches):
    model = _with(**switches)
    params = _lively_params(model)
    files = {'tokenizer.json': b'{}'}
    self.export(model, params, files=files, shard_bytes=20_000)
    shapes = hf.names_and_shapes(model)
    index = json.loads(
      (self.folder / 'model.safetensors.index.json').read_text()
    )
    self.assertEqual(list(index['weight_map']), list(shapes))
    shards = sorted(set(index['weight_map'].values()))
    self.assertGreater(len(shards), 2)
    sizes = []
    for shard in shards:
      content = (self.folder / shard).read_bytes()
      length = int.from_bytes(content[:8], 'little')
      header = json.loads(content[8 : 8 + length])
      self.assertEqual(length % 8, 0)
      del header['__metadata__']
      for name, entry in header.items():
        self.assertEqual(index['weight_map'][name], shard)
        self.assertEqual(tuple(entry['shape']), shapes[name])
      sizes.append(len(content) - 8 - length)
    self.assertLessEqual(max(sizes), 20_000)
    self.assertEqual(sum(sizes), index['metadata']['total_size'])
    self.assertEqual(sum(sizes), 4 * llama.num_params(model))
    there = {path.name for path in self.folder.iterdir()}
    rest = {'config.json', 'generation_config.json', 'tokenizer.json'}
    rest.add('model.safetensors.index.json')
    self.assertEqual(there, rest | set(shards))

  @_needs('safetensors')
  def test_bfloat16_is_half_the_size(self):
    params = _lively_params(_TINY)
    self.export(_TINY, params, shard_bytes=20_000, dtype='bfloat16')
    index = json.loads(
      (self.folder / 'model.safetensors.index.json').read_text()
    )
    self.assertEqual(
      index['metadata']['total_size'], 2 * llama.num_params(_TINY)
    )
    self.assertGreater(len(set(index['weight_map'].values())), 1)
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(
        x, y.astype(ml_dtypes.bfloat16).astype(np.float32)
      ),
      hf.load(self.folder, _TINY),
      params,
    )
    content = json.loads((self.folder / 'config.json').read_text())
    self.assertEqual(content['torch_dtype'], 'bfloat16')

  def test_memory_is_that_of_one_tensor(self):
    model = _with(width=512, layers=8, ffn_width=1024, scan_layers=True)
    params = jax.tree.map(  # stacks that take no memory
      lambda x: np.broadcast_to(np.float32(1), x.shape), _abstract(model)
    )
    largest = 4 * 512 * 1024
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    self.export(model, params)
    _, peak = tracemalloc.get_traced_memory()
    self.assertGreater(4 * llama.num_params(model), 20 * largest)
    self.assertLess(peak, 3 * largest)

  def test_sharded_arrays_leave_no_copy_on_the_host(self):
    model = _with(scan_layers=True)
    expected = _lively_params(model)
    mesh = jax.make_mesh((2,), ('fsdp',), devices=jax.devices()[:2])

    def put(x):
      spec = [None] * (x.ndim - 1) + ['fsdp']
      spec = jax.sharding.PartitionSpec(*(spec if x.shape[-1] % 2 == 0 else ()))
      return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    params = jax.tree.map(put, expected)
    self.export(model, params)
    content = (self.folder / 'model-00001-of-00001.safetensors').read_bytes()
    self.folder.rename(self.parent / 'sharded')
    self.export(model, expected)
    plain = (self.folder / 'model-00001-of-00001.safetensors').read_bytes()
    self.assertEqual(content, plain)
    for x in jax.tree.leaves(params):
      self.assertIsNone(x._npy_value)

  def test_an_existing_folder_is_not_touched(self):
    self.folder.mkdir()
    with self.assertRaisesRegex(config.ConfigError, 'exists, and is not over'):
      self.export(_TINY, _lively_params(_TINY))
    self.assertEmpty(list(self.folder.iterdir()))

  @pytest.mark.slow
  def test_whole_or_not_at_all(self):
    params = _lively_params(_TINY)
    files = {'sub/tokenizer.json': b''}  # cannot be written: no such folder
    with self.assertRaisesRegex(config.ConfigError, 'cannot be written'):
      self.export(_TINY, params, files=files)
    self.assertEmpty(list(self.parent.iterdir()))
    with mock.patch.object(hf.shutil, 'disk_usage') as usage:
      usage.return_value.free = 1000
      with self.assertRaisesRegex(config.ConfigError, 'the disk has 0.0 GB'):
        self.export(_TINY, params)
    self.assertEmpty(list(self.parent.iterdir()))

  @parameterized.parameters(
    (dict(layers=2), 'layers_2/attention/key: expected none, got float32'),
    (dict(layers=4), 'layers_3/attention/key: .*got none'),
    (dict(width=64), r'embedding: expected float32 \[61, 64\], got .*, 32'),
    (dict(tie_embeddings=False), 'unembedding: expected .*, got none'),
    (dict(scan_layers=True), 'layers/.*, got none'),
  )
  def test_parameters_of_another_model(self, changes, message):
    with self.assertRaisesRegex(config.ConfigError, message):
      self.export(_with(**changes), _lively_params(_TINY))
    self.assertEmpty(list(self.parent.iterdir()))


@_needs('safetensors')
class LoadTest(FolderTest):
  @parameterized.product(**_SWITCHES)
  def test_round_trip(self, **switches):
    model = _with(**switches)
    params = _lively_params(model)
    self.export(model, params, shard_bytes=20_000)
    loaded = hf.load(self.folder, model)
    self.assertEqual(
      jax.tree.structure(loaded), jax.tree.structure(_abstract(model))
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

  def test_stacked_and_not_are_one_layout(self):
    params = _lively_params(_TINY)
    self.export(_TINY, params)
    stacked = hf.load(self.folder, _with(scan_layers=True))
    for i in range(_TINY.layers):
      jax.tree.map(
        lambda x, y, i=i: np.testing.assert_array_equal(x[i], y),
        stacked['layers'],
        params[f'layers_{i}'],
      )

  def broken(self, message, model=_TINY):
    with self.assertRaisesRegex(config.ConfigError, message) as caught:
      hf.load(self.folder, model)
    self.assertNotIn('\n', str(caught.exception))

  def rewrite(self, name, **changes):
    """Changes a tensor's array, or removes it; in a shard of its own."""
    import safetensors.numpy as sn

    path = (
      self.folder
      / json.loads((self.folder / 'model.safetensors.index.json').read_text())[
        'weight_map'
      ][name]
    )
    tensors = sn.load_file(path)
    if 'becomes' in changes:
      tensors[name] = changes['becomes'](tensors[name])
    else:
      tensors[changes['renamed']] = tensors.pop(name)
    sn.save_file(tensors, path)

  def shards(self):
    return sorted(self.folder.glob('model-*'))

  @parameterized.parameters(ml_dtypes.bfloat16, np.float16)
  def test_narrow_floats_are_widened(self, dtype):
    params = _lively_params(_TINY)
    self.export(_TINY, params)
    for name in hf.names_and_shapes(_TINY):
      self.rewrite(name, becomes=lambda x: x.astype(dtype))
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(
        x, y.astype(dtype).astype(np.float32)
      ),
      hf.load(self.folder, _TINY),
      params,
    )

  @parameterized.parameters(
    (dict(vocab_size=60), '61, model.vocab_size 60 .the vocabulary of another'),
    (dict(heads=2), 'num_attention_heads is 4, model.heads 2; head_dim is 8'),
    (dict(kv_heads=4), 'num_key_value_heads is 2, model.kv_heads 4'),
    (dict(layers=2), 'num_hidden_layers is 3, model.layers 2'),
    (dict(rope_theta=1e4), 'rope_theta is 500000.0, model.rope_theta 10000'),
    (dict(norm_eps=1e-6), 'rms_norm_eps is 1e-05, model.norm_eps 1e-06'),
    (dict(tie_embeddings=False), 'tie_word_embeddings is True'),
  )
  @pytest.mark.rows(1)
  def test_another_model(self, changes, message):
    self.export(_TINY, _lively_params(_TINY))
    self.broken(message, _with(**changes))

  @parameterized.parameters(
    ({'model_type': 'gemma'}, "model_type is 'gemma'"),
    ({'attention_bias': True}, 'attention_bias is True'),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'rope_scaling': {'type': 'linear'}}, "rope_type is 'linear'"),
    ({'rope_parameters': {'rope_theta': 3.0}}, 'rope_theta is 3.0'),
    ({'rope_parameters': 3}, 'rope_parameters: got 3'),
    (
      {'model_type': 'qwen2'},
      'qwen2.*biases, such as model.layers.0.self_attn',
    ),
    ({'model_type': 'qwen3'}, 'qwen3.*self_attn.q_norm.weight'),
    (
      {'model_type': 'mistral', 'max_position_embeddings': 9000},
      'sliding_window is 4096',
    ),
    ({'sliding_window': 8}, 'sliding_window is 8, the architecture has none'),
    (
      {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
      "rope_type is 'llama3', model.rope_factor is 1",
    ),
    ({'vocab_size': 64 + 1024}, 'vocab_size is 1088'),
  )
  @pytest.mark.rows(1)
  def test_another_architecture(self, changes, message):
    self.export(_TINY, _lively_params(_TINY))
    path = self.folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    self.broken(f'config.json.*{message}')

  @parameterized.parameters(
    ({'sliding_window': None},),
    ({'sliding_window': 40},),
    ({'sliding_window': 8, 'use_sliding_window': False},),
  )
  def test_mistral_without_a_window_is_a_llama(self, changes):
    params = _lively_params(_TINY)
    self.export(_TINY, params)
    path = self.folder / 'config.json'
    there = json.loads(path.read_text()) | {'model_type': 'mistral'}
    path.write_text(json.dumps(there | changes))
    loaded = hf.load(self.folder, _TINY)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

  @parameterized.parameters(False, True)
  def test_tables_of_frequencies_are_left_out(self, one_file):
    params = _lively_params(_TINY)
    self.export(_TINY, params, shard_bytes=20_000)
    self.publish(
      one_file, {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4)}
    )
    loaded = hf.load(self.folder, _TINY)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

  @parameterized.parameters(False, True)
  def test_a_tied_model_may_have_its_embedding_twice(self, one_file):
    params = _lively_params(_TINY)
    self.export(_TINY, params, shard_bytes=20_000)
    self.publish(one_file, {'lm_head.weight': params['embedding'].copy()})
    loaded = hf.load(self.folder, _TINY)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    self.publish(one_file, {'lm_head.weight': params['embedding'] + 1})
    self.broken('lm_head.weight is not model.embed_tokens.weight')

  @parameterized.product(tie_embeddings=(False, True))
  @pytest.mark.rows(1)
  def test_padding_of_a_vocabulary_is_cut(self, tie_embeddings):
    model = _with(tie_embeddings=tie_embeddings)
    params = _lively_params(model)
    wide = jax.tree.map(np.copy, params)
    wide['embedding'] = np.pad(params['embedding'], ((0, 3), (0, 0)))
    if not tie_embeddings:
      wide['unembedding'] = np.pad(params['unembedding'], ((0, 0), (0, 3)))
    self.export(_with(tie_embeddings=tie_embeddings, vocab_size=64), wide)
    with mock.patch.object(hf.hf_config.sys, 'stderr', io.StringIO()) as said:
      loaded = hf.load(self.folder, model)
    self.assertIn('vocab_size is 64: 3 rows', said.getvalue())
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

  def publish(self, one_file, more):
    """Adds tensors, as other programs write them; in one file or several."""
    import safetensors.numpy as sn

    path = self.folder / 'model.safetensors.index.json'
    if one_file and path.exists():
      tensors = {}
      for shard in self.shards():
        tensors |= sn.load_file(shard)
        shard.unlink()
      path.unlink()
      sn.save_file(tensors, self.folder / 'model.safetensors')
    if one_file:
      file = self.folder / 'model.safetensors'
      sn.save_file(sn.load_file(file) | more, file)
      return
    sn.save_file(more, self.folder / 'more.safetensors')
    index = json.loads(path.read_text())
    index['weight_map'] |= dict.fromkeys(more, 'more.safetensors')
    path.write_text(json.dumps(index))

  def test_fields_that_are_left_out_are_as_in_transformers(self):
    self.export(_TINY, _lively_params(_TINY))
    path = self.folder / 'config.json'
    content = json.loads(path.read_text())
    del content['rope_theta'], content['head_dim'], content['hidden_act']
    path.write_text(json.dumps(content))
    self.broken('rope_theta is 10000.0, model.rope_theta 500000.0$')

  def test_files_that_are_missing_or_damaged(self):
    self.export(_TINY, _lively_params(_TINY), shard_bytes=20_000)
    shard = self.shards()[1]
    content = shard.read_bytes()
    for damaged in (content[:-1], content[:100], content + b'\0', b''):
      shard.write_bytes(damaged)
      self.broken(f'{shard.name}: damaged or truncated: .*; fetch it again')
    shard.unlink()
    self.broken(f'{shard.name}: no such file')
    index = self.folder / 'model.safetensors.index.json'
    text = index.read_text()
    index.write_text(text.replace(shard.name, '../secret'))
    self.broken('weight: expected a file name')
    index.write_text(text.replace('lm_head', 'x').replace('model.norm', 'n'))
    self.broken('index.json lacks model.norm.weight')
    index.write_text('{"weight_map": 3}')
    self.broken('expected a weight_map')
    index.write_text(text[:-9])
    self.broken('index.json: not JSON')
    index.unlink()
    self.broken('index.json: no such file')
    (self.folder / 'config.json').unlink()
    self.broken('config.json: no such file')

  @parameterized.parameters(
    (dict(becomes=lambda x: x.T.copy()), r'shape \[48, 32\], got F32 of \[32'),
    (dict(becomes=np.int32), 'expected F32, BF16, F16, F64 of .*, got I32'),
    (dict(renamed='x'), 'lacks model.layers.1.mlp.up_proj.weight'),
  )
  @pytest.mark.rows(1)
  def test_tensors_that_are_wrong(self, change, message):
    self.export(_TINY, _lively_params(_TINY))
    self.rewrite('model.layers.1.mlp.up_proj.weight', **change)
    self.broken(f'model-00001-of-00001.safetensors.* {message}')

  @parameterized.parameters(False, True)
  def test_a_tensor_too_many(self, one_file):
    self.export(_TINY, _lively_params(_TINY))
    self.publish(one_file, {'model.layers.0.self_attn.q_proj.bias': np.ones(3)})
    self.broken('has an unexpected tensor, model.layers.0.self_attn.q_proj.bia')

  def test_without_the_package(self):
    self.export(_TINY, _lively_params(_TINY))
    with mock.patch.dict('sys.modules', safetensors=None):
      self.broken(r"pip install 'covenant\[hf\]'")


@_needs('safetensors', 'torch', 'transformers')
@pytest.mark.filterwarnings('ignore')  # theirs
class TransformersTest(FolderTest):
  def difference(self, theirs, model, params):
    """The largest difference of a logit, after a look at what is compared."""
    import torch

    tokens_BxL = _tokens()
    with torch.no_grad():
      expected = theirs(torch.tensor(tokens_BxL).long()).logits.numpy()
    actual = np.asarray(_apply(model)(params, tokens_BxL))
    self.assertGreater(actual.std(), 0.3)
    return np.abs(actual - expected).max()

  @parameterized.product(**_SWITCHES)
  def test_logits_of_an_export(self, **switches):
    import torch
    import transformers

    model = _with(**switches)
    params = _lively_params(model)
    self.export(model, params, shard_bytes=20_000)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(
      self.folder, output_loading_info=True
    )
    self.assertEmpty(info['missing_keys'])
    self.assertEmpty(info['unexpected_keys'])
    self.assertEqual(theirs.dtype, torch.float32)
    self.assertEqual(theirs.config.max_position_embeddings, 40)
    self.assertEqual(theirs.config.eos_token_id, 7)
    self.assertIsNone(theirs.config.bos_token_id)
    self.assertEqual(theirs.config.tie_word_embeddings, model.tie_embeddings)
    self.assertLess(self.difference(theirs, model, params), 1e-4)

  def test_scaled_rotary_positions(self):
    """Llama 3.1: some pairs are kept, some slowed, some in between."""
    import torch
    import transformers

    model = _with(
      width=64, rope_factor=8.0, rope_low=1.0, rope_high=4.0, rope_context=64
    )
    params = _lively_params(model)
    self.export(model, params)
    theirs = transformers.LlamaForCausalLM.from_pretrained(self.folder)
    inv_freq = theirs.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(
      inv_freq, attention.frequencies(model), rtol=1e-5
    )
    plain = attention.frequencies(dataclasses.replace(model, rope_factor=1.0))
    ratio = attention.frequencies(model) / plain
    self.assertEqual((ratio[0], ratio[-1]), (1.0, 1 / 8))
    self.assertTrue(((ratio > 0.13) & (ratio < 0.99)).any())
    self.assertLess(self.difference(theirs, model, params), 1e-4)
    folder = self.parent / 'again'
    theirs.save_pretrained(folder)
    loaded = hf.load(folder, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    del torch

  @parameterized.product(many_files=(False, True), **_SWITCHES)
  def test_logits_of_an_import(self, many_files, **switches):
    import torch
    import transformers

    model = _with(**switches)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=0.2,
      )
    )
    size = '20KB' if many_files else '1GB'
    theirs.save_pretrained(self.folder, max_shard_size=size)
    self.assertEqual(
      many_files,
      (self.folder / 'model.safetensors.index.json').exists(),
    )
    params = hf.load(self.folder, model)
    self.assertLess(self.difference(theirs.eval(), model, params), 1e-4)


if __name__ == '__main__':
  absltest.main()
