"""Tests of exports: their folders, cards and tokenizers."""

import dataclasses
import importlib.util
import json
import pathlib
import unittest
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest
from absl.testing import flagsaver

from covenant import cli
from covenant import config as config_lib
from covenant import metrics
from covenant.data import dataset
from covenant.data import pretrained
from covenant.models import llama
from covenant.models import sharding
from covenant.node import export as export_lib
from covenant.protocol import checkpoint
from covenant.train import shared_state
from tests import helpers

CONFIG = config_lib.load(f'{helpers.CONFIGS}/tiny.py', ['checkpoint.keep=2'])
FILES = [
  'README.md',
  'config.json',
  'generation_config.json',
  'model-00001-of-00001.safetensors',
  'model.safetensors.index.json',
  'tokenizer.json',
  'tokenizer_config.json',
]


def names(folder):
  return sorted(path.name for path in folder.iterdir())


class ExportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    self.params = jax.jit(lambda key: llama.init(CONFIG.model, key))(
      jax.random.key(3)
    )

  def save(self, completed):
    """Saves a checkpoint as a member of a network does, with its own state."""
    shared = shared_state.SharedState(self.params, {'momentum': np.ones(3)})
    with checkpoint.Checkpoints(
      self.workdir / 'checkpoints', CONFIG.checkpoint
    ) as checkpoints:
      checkpoints.save_tree(
        completed, {'shared': shared, 'text': '{}', 'private': np.ones(2)}
      )

  @unittest.skipUnless(
    importlib.util.find_spec('safetensors'), 'needs the extra hf'
  )
  def test_a_run_begins_with_what_another_exported(self):
    folder = export_lib.Exporter(CONFIG, self.workdir).write(4, self.params)
    config = dataclasses.replace(CONFIG, pretrained=str(folder))
    dataset.load(config)
    want = shared_state.fingerprint(self.params)
    for mesh in None, sharding.mesh(config_lib.Devices(fsdp=2), jax.devices()):
      of_run = shared_state.SharedModel(config, mesh)
      got = shared_state.fingerprint(of_run.init().params)
      self.assertEqual(got, want)
    self.assertNotEqual(of_run.run, shared_state.SharedModel(CONFIG).run)

    other = dataclasses.replace(config.data, tokenizer='bpe')
    model = dataclasses.replace(config.model, vocab_size=512)
    with self.assertRaisesRegex(config_lib.ConfigError, 'another tokenizer'):
      dataset.load(dataclasses.replace(config, data=other, model=model))
    with self.assertRaisesRegex(config_lib.ConfigError, 'vocab_size'):
      shared_state.SharedModel(dataclasses.replace(config, model=model)).init()

  def test_newest(self):
    self.save(2)
    self.save(12)
    completed, params = export_lib.newest(self.workdir)
    self.assertEqual(completed, 12)
    self.assertEqual(
      shared_state.fingerprint(params), shared_state.fingerprint(self.params)
    )

  def test_newest_on_a_mesh(self):
    """Each device has its shard; the exported files are the same."""
    self.save(3)
    devices = config_lib.Devices(fsdp=2)
    mesh = sharding.mesh(devices, jax.devices())
    completed, params = export_lib.newest(self.workdir, mesh)
    self.assertEqual(completed, 3)
    self.assertLen(params['embedding'].sharding.device_set, 2)
    self.assertEqual(
      shared_state.fingerprint(params), shared_state.fingerprint(self.params)
    )
    folders = []
    for name, x in ('alone', self.params), ('mesh', params):
      workdir = self.workdir / name
      workdir.mkdir()
      folders.append(export_lib.Exporter(CONFIG, workdir).write(3, x))
    for file in FILES:
      one, other = ((folder / file).read_bytes() for folder in folders)
      self.assertEqual(one, other, file)

  def test_no_checkpoint(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'expected the --workdir of a run'
    ):
      export_lib.newest(self.workdir)
    (self.workdir / 'checkpoints').mkdir()
    with self.assertRaisesRegex(config_lib.ConfigError, 'no checkpoint yet'):
      export_lib.newest(self.workdir)

  def test_role(self):
    self.save(7)
    with mock.patch('builtins.print') as printed:
      cli.ROLES['export'](CONFIG, str(self.workdir))
    folder = self.workdir / 'hf' / '7'
    self.assertIn(f'after round 7 is in {folder}', printed.call_args.args[0])
    self.assertEqual(names(folder), FILES)
    other = config_lib.load(f'{helpers.CONFIGS}/tiny.py', ['model.layers=2'])
    folder.rename(self.workdir / 'hf' / 'old')
    with self.assertRaisesRegex(config_lib.ConfigError, 'layers_1.*got none'):
      cli.ROLES['export'](other, str(self.workdir))
    self.assertEqual(names(self.workdir / 'hf'), ['old'])

  def test_newest_ones_are_kept(self):
    exporter = export_lib.Exporter(CONFIG, self.workdir)
    (self.workdir / 'hf' / '.9.0123.partial').mkdir(parents=True)
    for completed in (8, 9, 10, 11):
      exporter.write(completed, self.params)
    content = self.workdir / 'hf' / '11' / 'README.md'
    content.write_text('as it was')
    exporter.write(11, self.params)
    exporter.prune()
    self.assertEqual(names(self.workdir / 'hf'), ['10', '11'])
    self.assertEqual(content.read_text(), 'as it was')

  def test_card(self):
    path = self.workdir / 'metrics.jsonl'
    found = [
      metrics.Evaluation(r, 1000 * r, 7, 2.0 / r, 1.0, 1.5 / r, 8, 0.1)
      for r in (2, 4, 6)
    ]
    path.write_text(''.join(metrics.encode(e) + '\n' for e in found))
    text = export_lib.card(CONFIG, self.workdir, 4, 'apache-2.0')
    self.assertStartsWith(text, '---\nlibrary_name: transformers\n')
    self.assertIn('\nlicense: apache-2.0\n', text)
    self.assertIn('| 4 | 4,000 | 0.5000 | 0.3750 |', text)
    self.assertNotIn('| 6 |', text)
    path.unlink()
    (self.workdir / 'starts.jsonl').write_text(
      '{"time": 1, "host": "a", "versions": {}, "commit": "0123abc-dirty"}\n'
    )
    text = export_lib.card(CONFIG, self.workdir, 4)
    self.assertIn('commit 0123abc-dirty.', text)
    self.assertNotIn('license', text)
    self.assertNotIn('held-out', text)

  def test_needs_no_text_once_the_tokenizer_is_kept(self):
    data = dataset.load(CONFIG)
    pretrained.keep(self.workdir, CONFIG, data)
    pretrained.keep(self.workdir, CONFIG, data)  # as it was
    lost = mock.patch.object(pretrained, 'of', side_effect=AssertionError)
    with lost:
      folder = export_lib.Exporter(CONFIG, self.workdir).write(4, self.params)
    self.assertEqual(names(folder), FILES)
    made = pretrained.files(pretrained.of(CONFIG), CONFIG.data.context)
    for name, content in made.items():
      self.assertEqual((folder / name).read_bytes(), content)

  def test_half_precision(self):
    self.save(7)
    with flagsaver.flagsaver(dtype='bfloat16', license='mit'):
      cli.ROLES['export'](CONFIG, str(self.workdir))
    folder = self.workdir / 'hf' / '7'
    content = json.loads((folder / 'config.json').read_text())
    self.assertEqual(content['torch_dtype'], 'bfloat16')
    self.assertIn('license: mit', (folder / 'README.md').read_text())
    with self.assertRaisesRegex(config_lib.ConfigError, 'there, in bfloat16'):
      cli.ROLES['export'](CONFIG, str(self.workdir))


if __name__ == '__main__':
  absltest.main()
