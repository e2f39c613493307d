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
  )
  def test_others_are_refused_by_the_field(self, changes, message):
    with self.assertRaisesRegex(config.ConfigError, message) as caught:
      hf_config.read(self.write(LLAMA_31 | changes))
    self.assertNotIn('\n', str(caught.exception))

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
