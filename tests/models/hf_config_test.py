"""The config.json of published models."""

import dataclasses
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config
from covenant.models import hf_config

# As in Meta's folder of Llama 3.1 8B.
LLAMA_31 = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'bos_token_id': 128000,
  'eos_token_id': 128001,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'vocab_size': 128256,
}


class HfConfigTest(parameterized.TestCase):
  def write(self, content):
    path = pathlib.Path(self.create_tempdir().full_path, 'config.json')
    path.write_text(json.dumps(content))
    return path

  def test_llama_3_1(self):
    model = hf_config.read(self.write(LLAMA_31))
    self.assertEqual((model.width, model.layers, model.kv_heads), (4096, 32, 8))
    self.assertEqual((model.rope_theta, model.rope_factor), (5e5, 8.0))
    made = hf_config.make(model, 131072, 128001)
    for name, value in LLAMA_31.items():
      if name not in ('bos_token_id', 'torch_dtype'):
        self.assertEqual(made[name], value, name)

  def test_its_own_is_read_as_it_was(self):
    for changes in {}, {'rope_factor': 4.0, 'rope_context': 64}:
      model = dataclasses.replace(config.Model(kv_heads=2), **changes)
      made = hf_config.make(model, 16, 0)
      self.assertEqual(hf_config.read(self.write(made)), model)

  @parameterized.parameters(
    ({'hidden_size': None}, 'hidden_size'),
    ({'num_attention_heads': 'x'}, 'num_attention_heads: expected a pos'),
    ({'model_type': 'qwen3'}, 'q_norm'),
    ({'head_dim': 64}, 'head_dim is 64'),
    ({'rope_scaling': {'rope_type': 'yarn'}}, "rope_type is 'yarn'"),
    ({'rope_scaling': 7}, 'rope_parameters: got 7'),
    ({'vocab_size': -1}, 'vocab_size'),
    ({'vocab_size': True}, 'vocab_size: expected a positive number'),
    ({'rope_theta': 0}, 'rope_theta: expected a positive number, got 0'),
    ({'rms_norm_eps': '1e-5'}, 'rms_norm_eps: expected a positive'),
    ({'tie_word_embeddings': 'no'}, "expected a bool, got 'no'"),
    (
      {'rope_scaling': {'rope_type': 'llama3', 'factor': '8'}},
      "factor: expected a positive number, got '8'",
    ),
    ({'attention_bias': True}, 'attention_bias is True'),
    ({'mlp_bias': True}, 'mlp_bias is True'),
    ({'model_type': 'qwen2', 'tie_word_embeddings': True}, 'q_proj.bias'),
    ({'model_type': 'qwen2', 'use_sliding_window': True}, 'q_proj.bias'),
    ({'model_type': 'qwen3', 'head_dim': 128}, 'q_norm.weight'),
    ({'model_type': 'qwen3_moe'}, "model_type is 'qwen3_moe'"),
    ({'model_type': 'mixtral'}, "model_type is 'mixtral'"),
    ({'model_type': None}, 'model_type is None'),
    ({'model_type': 'mistral'}, 'sliding_window is 4096'),
    ({'sliding_window': 4096}, 'sliding_window is 4096'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "is 'linear'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "is 'dynamic'"),
    ({'rope_scaling': {'rope_type': 'longrope'}}, "is 'longrope'"),
    ({'rope_parameters': {'full_attention': {}}}, 'rope_parameters'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5'),
    ({'quantization_config': {'bits': 4}}, "quantization_config is {'bits'"),
    ({'hidden_act': 'gelu_pytorch_tanh'}, "hidden_act is 'gelu_py"),
  )
  def test_others_are_refused_by_the_field(self, changes, message):
    with self.assertRaisesRegex(config.ConfigError, message) as caught:
      hf_config.read(self.write(LLAMA_31 | changes))
    self.assertNotIn('\n', str(caught.exception))

  def test_null_is_what_transformers_takes_it_for(self):
    plain = {k: v for k, v in LLAMA_31.items() if k != 'rope_scaling'}
    nulls = dict.fromkeys(
      ('rope_scaling', 'rope_parameters', 'sliding_window', 'head_dim',
       'attention_bias', 'mlp_bias', 'partial_rotary_factor',
       'quantization_config', 'rope_type')
    )  # fmt: skip
    self.assertEqual(
      hf_config.read(self.write(plain | nulls)),
      hf_config.read(self.write(plain)),
    )
    mistral = plain | {'model_type': 'mistral', 'sliding_window': None}
    self.assertEqual(hf_config.read(self.write(mistral)).kv_heads, 8)
    del mistral['num_key_value_heads']  # its default; a Llama's are its heads
    self.assertEqual(hf_config.read(self.write(mistral)).kv_heads, 8)

  @parameterized.parameters(
    (
      'pytorch_model.bin',
      'a pickle, which is not read: save it as safetensors',
    ),
    ('pytorch_model-00001-of-00002.bin', 'a pickle'),
    ('consolidated.00.pth', "its maker's own format"),
    ('consolidated.safetensors', "its maker's own format"),
    ('adapter_model.safetensors', 'an adapter: merge it'),
    ('ggml-model-q4.gguf', 'of llama.cpp'),
    ('model-00001-of-00002.safetensors', 'expected model.safetensors or the'),
    ('model.fp16.safetensors', 'expected model.safetensors or the index'),
  )
  def test_a_folder_with_other_weights(self, name, hint):
    folder = self.write({}).parent
    (folder / name).touch()
    index = 'model.safetensors.index.json'
    with self.assertRaisesRegex(
      config.ConfigError, f'{index}: no such file; there is {name}, {hint}'
    ) as caught:
      hf_config.read_json(folder / index)
    self.assertNotIn('\n', str(caught.exception))

  def test_no_folder(self):
    with self.assertRaisesRegex(config.ConfigError, 'fetch .*: hf download'):
      hf_config.read(pathlib.Path('meta-llama/Llama-3.1-8B/config.json'))

  def test_nested_without_an_end(self):
    path = self.write({})
    path.write_text('[' * 100_000)
    with self.assertRaisesRegex(config.ConfigError, 'not JSON'):
      hf_config.read(path)

  @parameterized.parameters(
    ({'eos_token_id': 3}, {}, 3),
    ({}, {'eos_token_id': [5, 6]}, 5),
    ({'eos_token_id': 3}, {'eos_token_id': 4}, 3),
    ({}, {}, None),
  )
  def test_end_of_text(self, generation, content, expected):
    folder = self.write(content).parent
    (folder / 'generation_config.json').write_text(json.dumps(generation))
    self.assertEqual(hf_config.end_of_text(folder), expected)


if __name__ == '__main__':
  absltest.main()
