"""GGUF files, read back by the package gguf and by transformers."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import unittest
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.data import pretrained
from covenant.data import tokenizer as tokenizer_lib
from covenant.models import attention
from covenant.models import gguf_file
from covenant.models import hf
from covenant.models import llama

_MODEL = config_lib.Model(
  vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, ffn_width=48
)
_LINES = ['to be or not to be', 'that is the question', 'whether it is']


def _needs(*packages):
  lacking = [p for p in packages if importlib.util.find_spec(p) is None]
  return unittest.skipIf(
    lacking, f"not installed: {lacking}; pip install 'covenant[hf]'"
  )


def _params(model):
  """Parameters large enough that every part of the model shows in a logit."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: np.float32(
      rng.normal(x.ndim == 1, 1 / math.sqrt(x.shape[-1]), x.shape)
    ),
    llama.abstract(model),
  )


def _files(tokenizer):
  return pretrained.files(tokenizer, 40)


class GgufTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path, 'a', 'x.gguf')
    self.bpe = tokenizer_lib.BPE.train(_LINES * 9, 300)

  def export(self, model, params, **options):
    wanted = {'name': 'mine', 'context': 40, 'files': _files(self.bpe)}
    wanted |= {'end_of_text': self.bpe.end_of_text} | options
    gguf_file.export(self.path, model, params, **wanted)

  @_needs('gguf')
  @parameterized.product(
    tie_embeddings=(False, True),
    scan_layers=(False, True),
    dtype=('float32', 'bfloat16'),
  )
  def test_reads_back_tensor_by_tensor(self, dtype, **switches):
    import gguf

    model = dataclasses.replace(_MODEL, **switches)
    params = _params(model)
    self.export(model, params, dtype=dtype, licence='mit')
    reader = gguf.GGUFReader(self.path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.layers)
    layout = hf.layout(model)
    self.assertLen(reader.tensors, len(layout))
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in layout.items():
      there = found[names.get_name(name, try_suffixes=('.weight',))]
      self.assertEqual(tuple(there.shape[::-1]), tensor.shape)
      data = there.data
      x = hf.leaf(params, tensor)
      x = x.T if tensor.turned else x
      if dtype == 'bfloat16' and x.ndim == 2:
        data = np.asarray(data).view(ml_dtypes.bfloat16)
        x = x.astype(ml_dtypes.bfloat16)
      heads = {'query': 4, 'key': 2}.get(tensor.leaf[-1])
      if heads:  # as llama.cpp's reader turns it back
        width = len(x) // heads // 2
        data = data.reshape(heads, width, 2, -1).swapaxes(1, 2)
      np.testing.assert_array_equal(np.asarray(data).reshape(x.shape), x)
    fields = {k: field.contents() for k, field in reader.fields.items()}
    for key, value in {
      'general.architecture': 'llama',
      'general.name': 'mine',
      'general.license': 'mit',
      'llama.context_length': 40,
      'llama.embedding_length': 32,
      'llama.block_count': 2,
      'llama.feed_forward_length': 48,
      'llama.attention.head_count': 4,
      'llama.attention.head_count_kv': 2,
      'llama.rope.dimension_count': 8,
      'llama.rope.freq_base': 10_000.0,
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.pre': 'gpt-2',
      'tokenizer.ggml.eos_token_id': self.bpe.end_of_text,
      'tokenizer.ggml.add_bos_token': False,
    }.items():
      self.assertEqual(fields[key], value, key)
    self.assertLen(fields['tokenizer.ggml.tokens'], 300)
    self.assertEqual([p.name for p in self.path.parent.iterdir()], ['x.gguf'])

  @_needs('gguf', 'llama_cpp')
  @pytest.mark.slow
  def test_llama_cpp_reads_the_same_tokens_and_logits(self):
    import llama_cpp

    model = dataclasses.replace(_MODEL, rope_factor=8.0, rope_context=64)
    params = _params(model)
    self.export(model, params)
    theirs = llama_cpp.Llama(
      str(self.path), n_ctx=64, logits_all=True, verbose=False
    )
    self.addCleanup(theirs.close)
    text = "To be, or not to be - that's it.\n\n 1601 é€"
    ids = self.bpe.encode(text)[:40]
    found = theirs.tokenize(text.encode(), add_bos=False, special=False)
    self.assertEqual(found[:40], ids.tolist())
    theirs.eval(ids.tolist())
    np.testing.assert_allclose(
      theirs.scores[: len(ids)],
      llama.apply(model, params, ids[None])[0],
      atol=0.02,  # it computes with halves
    )

  @_needs('gguf')
  def test_scaled_rotary_positions_are_a_tensor(self):
    import gguf

    model = dataclasses.replace(_MODEL, rope_factor=8.0, rope_context=64)
    self.export(model, _params(model))
    found = {t.name: t.data for t in gguf.GGUFReader(self.path).tensors}
    plain = attention.frequencies(_MODEL)
    np.testing.assert_allclose(
      plain / found['rope_freqs.weight'],
      attention.frequencies(model),
      rtol=1e-6,
    )

  @_needs('gguf')
  def test_an_earlier_file_stays(self):
    self.path.parent.mkdir()
    self.path.write_bytes(b'mine')
    with self.assertRaisesRegex(config_lib.ConfigError, 'exists'):
      self.export(_MODEL, _params(_MODEL))
    self.assertEqual(self.path.read_bytes(), b'mine')

  @_needs('gguf')
  def test_a_full_disk_leaves_nothing(self):
    with (
      mock.patch('gguf.GGUFWriter.write_tensor_data', side_effect=OSError(28)),
      self.assertRaisesRegex(config_lib.ConfigError, 'cannot be written'),
    ):
      self.export(_MODEL, _params(_MODEL))
    self.assertEmpty(list(self.path.parent.iterdir()))


class VocabularyTest(parameterized.TestCase):
  def test_bytes(self):
    v = gguf_file.read_vocabulary(_files(tokenizer_lib.Bytes()), 256)
    self.assertEqual((v.kind, v.split), ('gpt2', 'gpt-2'))
    self.assertLen(set(v.tokens), 256)
    end = tokenizer_lib.Bytes.end_of_text
    self.assertEqual([i for i, t in enumerate(v.types) if t == 3], [end])

  def test_byte_pairs(self):
    tokenizer = tokenizer_lib.BPE.train(_LINES * 9, 280)
    v = gguf_file.read_vocabulary(_files(tokenizer), 288)
    self.assertEqual(v.types[tokenizer.end_of_text], 3)
    self.assertEqual(v.types[280:], [5] * 8)
    for merge in v.merges:
      self.assertIn(merge.replace(' ', ''), v.tokens)

  def test_sentencepiece(self):
    prefix = f'{self.create_tempdir().full_path}/m'
    text = pathlib.Path(f'{prefix}.txt')
    text.write_text('\n'.join(_LINES * 20))
    sentencepiece.SentencePieceTrainer.train(
      input=str(text),
      model_prefix=prefix,
      vocab_size=300,
      model_type='bpe',
      byte_fallback=True,
      hard_vocab_limit=False,
      minloglevel=2,
    )
    content = pathlib.Path(f'{prefix}.model').read_bytes()
    v = gguf_file.read_vocabulary({'tokenizer.model': content}, 320)
    self.assertEqual(v.kind, 'llama')
    self.assertTrue(v.space_prefix)
    self.assertLen(v.tokens, 320)
    self.assertEqual(v.types[:4], [2, 3, 3, 6])
    self.assertEqual(v.tokens[3], '<0x00>')
    self.assertEqual(v.types[-1], 5)

  @parameterized.parameters(
    ({'type': 'ByteLevel', 'add_prefix_space': True},),
    ({'type': 'Whitespace'},),
    (
      {
        'type': 'Sequence',
        'pretokenizers': [
          {'type': 'Split', 'pattern': {'Regex': 'x'}},
          {'type': 'ByteLevel', 'use_regex': False},
        ],
      },
    ),
    (None,),
  )
  def test_another_split_is_refused(self, pre):
    tokenizer = tokenizer_lib.BPE.train(_LINES * 9, 280)
    files = _files(tokenizer)
    changed = json.loads(files['tokenizer.json']) | {'pre_tokenizer': pre}
    files['tokenizer.json'] = json.dumps(changed).encode()
    with self.assertRaisesRegex(config_lib.ConfigError, 'convert_hf_to_gguf'):
      gguf_file.read_vocabulary(files, 280)

  def test_the_split_of_llama_3(self):
    tokenizer = tokenizer_lib.BPE.train(_LINES * 9, 280)
    files = _files(tokenizer)
    expression = (
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
      r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    )
    steps = [
      {'type': 'Split', 'pattern': {'Regex': expression}},
      {'type': 'ByteLevel', 'use_regex': False},
    ]
    changed = json.loads(files['tokenizer.json'])
    changed['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': steps}
    files['tokenizer.json'] = json.dumps(changed).encode()
    v = gguf_file.read_vocabulary(files, 280)
    self.assertEqual(v.split, 'llama-bpe')


if __name__ == '__main__':
  absltest.main()
