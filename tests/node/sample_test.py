"""Text of a run's checkpoint, and of its export."""

import contextlib
import importlib.util
import io
import json
import pathlib
import unittest

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

from covenant import cli
from covenant import config as config_lib
from covenant.models import generate
from covenant.models import llama
from covenant.node import export
from covenant.node import sample
from covenant.protocol import checkpoint
from covenant.train import shared_state
from tests import helpers

CONFIG = config_lib.load(f'{helpers.CONFIGS}/tiny.py')
GREEDY = generate.Sampling(temperature=0.0)


class SampleTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.params = jax.jit(lambda key: llama.init(CONFIG.model, key))(
      jax.random.key(3)
    )

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    shared = shared_state.SharedState(self.params, {'momentum': np.ones(3)})
    with checkpoint.Checkpoints(
      self.workdir / 'checkpoints', CONFIG.checkpoint
    ) as checkpoints:
      checkpoints.save_tree(4, {'shared': shared, 'text': '{}'})

  def said(self, **values):
    with flagsaver.flagsaver(**values):
      out = io.StringIO()
      with contextlib.redirect_stdout(out):
        cli.ROLES['sample'](CONFIG, str(self.workdir))
    return out.getvalue()

  @pytest.mark.slow
  @unittest.skipUnless(
    importlib.util.find_spec('safetensors'), 'needs the extra hf'
  )
  def test_an_export_says_the_same(self):
    folder = export.Exporter(CONFIG, self.workdir).write(4, self.params)
    values = {'prompt': 'To be', 'tokens': 20, 'temperature': 0.0}
    text = self.said(**values)
    self.assertStartsWith(text, 'To be')
    self.assertGreater(len(text), 6)
    self.assertEqual(self.said(**values, model=str(folder)), text)
    drawn = {self.said(prompt='a', tokens=20, seed=n) for n in range(3)}
    self.assertLen(drawn, 3)

  def test_characters_of_several_tokens_come_whole(self):
    text = 'é€'

    def decode(ids):
      return bytes(ids).decode(errors='replace')

    source = sample.Source(CONFIG.model, self.params, list, decode, None)
    with absltest.mock.patch.object(
      generate, 'generate', lambda *_: iter(text.encode() + b'\xc3')
    ):
      parts = list(sample.continued(source, 'x', 9, GREEDY))
    self.assertEqual(parts, ['é', '€', '\ufffd'])

  def test_a_model_commands_no_terminal(self):
    with absltest.mock.patch.object(
      sample, 'continued', lambda *_: iter(['a\x1b[2J', 'é\n'])
    ):
      self.assertEqual(self.said(prompt='x'), 'xa\\x1b[2Jé\n\n')

  @parameterized.parameters(
    ({'top_p': 0.0}, '--top_p: expected above 0'),
    ({'model': '/nowhere'}, '--model: /nowhere/tokenizer.json: no such file'),
  )
  def test_errors_name_the_flag(self, values, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      self.said(**values)

  def test_a_folder_without_a_field_is_refused_by_it(self):
    folder = export.Exporter(CONFIG, self.workdir).write(4, self.params)
    path = folder / 'config.json'
    there = json.loads(path.read_text())
    for name in 'hidden_size', 'num_attention_heads', 'vocab_size':
      rest = {key: value for key, value in there.items() if key != name}
      path.write_text(json.dumps(rest))
      with self.assertRaisesRegex(config_lib.ConfigError, name):
        self.said(model=str(folder))

  def test_help_names_the_flags(self):
    known = flags.FLAGS.flags_by_module_dict()[sample.__name__]
    names = {flag.name for flag in known}
    self.assertContainsSubset({'prompt', 'tokens', 'top_k', 'model'}, names)


if __name__ == '__main__':
  absltest.main()
