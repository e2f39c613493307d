"""Fine-tuning on chats: packing, the loss of answers, the template."""

import contextlib
import importlib.util
import io
import json
import pathlib
import unittest

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

from covenant import cli
from covenant import config as config_lib
from covenant.data import pretrained
from covenant.data import tokenizer as tokenizer_lib
from covenant.models import llama
from covenant.node import finetune
from covenant.protocol import checkpoint
from covenant.train import shared_state
from tests import helpers

CONFIG = config_lib.load(f'{helpers.CONFIGS}/tiny.py')
_CHATS = (
  [('user', 'a?'), ('assistant', 'bb')],
  [('system', 's'), ('user', 'c?'), ('assistant', 'd'), ('assistant', 'e')],
  [('user', 'fff'), ('assistant', 'g' * 40)],
)


def _encode(text):
  return list(text.encode())


def _packed(chats, length):
  return finetune.pack(chats, _encode, 0, length)


class PackTest(parameterized.TestCase):
  def test_only_answers_and_their_end_count(self):
    packed = _packed(_CHATS[:1], 60)
    (row,), (counts,) = packed
    ids = np.where(row < 0, ~row, row)
    text = b'<|user|>\na?\n<|assistant|>\nbb\0\n'
    self.assertEqual(bytes(ids[: len(text)].tolist()), text)
    self.assertEqual((row < 0).nonzero()[0].tolist(), [0, len(text)])
    counted = ids[1:][counts == 1]
    self.assertEqual(bytes(counted.tolist()), b'bb\0')

  def test_chats_share_sequences_as_far_as_they_fit(self):
    with self.assertNoLogs():
      packed = _packed(_CHATS, 120)
    self.assertEqual(packed.tokens_NxL1.shape, (2, 121))
    starts = [(row < 0).sum() for row in packed.tokens_NxL1]
    self.assertEqual(starts, [3, 2])  # and the padding
    self.assertEqual(packed.counts_NxL.sum(), 3 + 2 + 2 + 41)

  def test_one_that_is_too_long_is_left_out(self):
    self.assertEqual(_packed(_CHATS, 60).counts_NxL.sum(), 7)
    with self.assertRaisesRegex(config_lib.ConfigError, 'none fits'):
      _packed(_CHATS, 10)

  @pytest.mark.slow
  def test_the_loss_of_a_chat_does_not_depend_on_its_neighbors(self):
    model = config_lib.PackedModel(**vars(CONFIG.model))
    params = llama.init(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 5, params)  # far from uniform

    def nats(*chats):
      packed = _packed(chats, 100)
      self.assertLen(packed.tokens_NxL1, 1)
      count = packed.counts_NxL.sum()
      return float(finetune.answer_loss(model, params, *packed) * count)

    apart = nats(_CHATS[0]) + nats(_CHATS[1])
    self.assertAlmostEqual(nats(*_CHATS[:2]), apart, places=3)
    other = [('user', 'zz'), ('assistant', 'bb')]
    self.assertNotAlmostEqual(nats(other), nats(_CHATS[0]), places=3)


class ReadTest(parameterized.TestCase):
  @parameterized.parameters(
    'x',
    '[]',
    '{}',
    '{"messages": 3}',
    '{"messages": []}',
    '{"messages": [{"role": "user", "content": "a"}]}',
    '{"messages": [{"role": "robot", "content": "a"}]}',
    '{"messages": [{"role": "assistant", "content": 3}]}',
    '{"messages": [{"role": "assistant"}]}',
  )
  def test_what_is_no_chat_is_refused_by_its_line(self, line):
    path = pathlib.Path(self.create_tempdir().full_path, 'x.jsonl')
    good = '{"messages": [{"role": "assistant", "content": "a"}]}'
    path.write_text(f'{good}\n{line}\n')
    with self.assertRaisesRegex(config_lib.ConfigError, 'x.jsonl:2: expected'):
      list(finetune.read(path))


class FinetuneTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    params = jax.jit(lambda key: llama.init(CONFIG.model, key))(
      jax.random.key(3)
    )
    shared = shared_state.SharedState(params, {'momentum': np.ones(3)})
    with checkpoint.Checkpoints(
      self.workdir / 'checkpoints', CONFIG.checkpoint
    ) as checkpoints:
      checkpoints.save_tree(4, {'shared': shared, 'text': '{}'})
    self.chats = self.workdir / 'chats.jsonl'
    lines = [
      {'messages': [{'role': r, 'content': c} for r, c in chat]}
      for chat in _CHATS[:2] * 4
    ]
    self.chats.write_text('\n'.join(map(json.dumps, lines)) + '\n')

  @unittest.skipUnless(
    importlib.util.find_spec('safetensors'), 'needs the extra hf'
  )
  @pytest.mark.slow
  def test_it_learns_the_answers_and_its_export_says_them(self):
    flags = {'chats': str(self.chats), 'epochs': 30, 'rate': 1e-2}
    with flagsaver.flagsaver(**flags, batch=8, length=64):
      cli.ROLES['finetune'](CONFIG, str(self.workdir))
    folder = self.workdir / finetune.FOLDER
    there = {path.name for path in folder.iterdir()}
    self.assertContainsSubset({'tokenizer.json', 'config.json'}, there)
    settings = json.loads((folder / 'tokenizer_config.json').read_text())
    self.assertEqual(settings['chat_template'], finetune.TEMPLATE)
    source = finetune.sample.of_folder(folder)
    asked = '<|user|>\na?\n<|assistant|>\n'
    greedy = finetune.sample.generate.Sampling(temperature=0.0)
    said = ''.join(finetune.sample.continued(source, asked, 9, greedy))
    self.assertEqual(said, 'bb')
    out = io.StringIO()
    values = {'chat': True, 'prompt': 'a?', 'temperature': 0.0, 'tokens': 9}
    with (
      flagsaver.flagsaver(**values, model=str(folder)),
      contextlib.redirect_stdout(out),
    ):
      cli.ROLES['sample'](CONFIG, str(self.workdir))
    self.assertEqual(out.getvalue(), f'{asked}bb\n')
    # A second one, from the export, needs a folder of its own.
    with flagsaver.flagsaver(**flags, model=str(folder)):
      with self.assertRaisesRegex(config_lib.ConfigError, 'exists'):
        cli.ROLES['finetune'](CONFIG, str(self.workdir))

  def test_needs_chats(self):
    with self.assertRaisesRegex(config_lib.ConfigError, '--chats'):
      cli.ROLES['finetune'](CONFIG, str(self.workdir))


class TemplateTest(absltest.TestCase):
  @unittest.skipUnless(
    importlib.util.find_spec('transformers')
    and importlib.util.find_spec('jinja2'),
    'needs the extra hf',
  )
  @pytest.mark.filterwarnings('ignore')  # theirs
  def test_transformers_reads_a_chat_as_the_same_ids(self):
    import transformers

    texts = ['to be or not to be, a? bb fff'] * 9
    tokenizer = tokenizer_lib.BPE.train(texts, 300)
    folder = pathlib.Path(self.create_tempdir().full_path)
    files = finetune.with_template(pretrained.files(tokenizer, 64))
    for name, content in files.items():
      (folder / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encode, _ = finetune.sample._tokenizer(
      (folder / 'tokenizer.json').read_text(), 'x'
    )
    end = tokenizer.end_of_text
    for chat in _CHATS:
      messages = [{'role': r, 'content': c} for r, c in chat]
      got = theirs.apply_chat_template(messages, return_dict=True)['input_ids']
      row = finetune.pack([chat], encode, end, 100).tokens_NxL1[0]
      ids = np.where(row < 0, ~row, row)[: len(got)]
      self.assertEqual(ids.tolist(), got)
      self.assertEqual(row[len(got)], ~0)


if __name__ == '__main__':
  absltest.main()
