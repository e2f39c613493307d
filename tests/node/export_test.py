"""Tests of exports of a run: from its checkpoints, and by its evaluator."""

import dataclasses
import importlib.util
import pathlib
import unittest
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from covenant import cli
from covenant import config as config_lib
from covenant.data import dataset
from covenant.models import llama
from covenant.models import sharding
from covenant.node import export
from covenant.protocol import checkpoint
from covenant.train import shared_state
from tests import helpers

CONFIG = config_lib.load(f'{helpers.CONFIGS}/tiny.py', ['checkpoint.keep=2'])
FILES = [
  'config.json',
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
    """As a member of a network does, with what only it knows."""
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
    folder = export.Exporter(CONFIG, self.workdir).write(4, self.params)
    config = dataclasses.replace(CONFIG, pretrained=str(folder))
    dataset.load(config)
    want = shared_state.fingerprint(self.params)
    for mesh in None, sharding.mesh(config_lib.Devices(fsdp=2), jax.devices()):
      of_run = shared_state.SharedModel(config, mesh)
      self.assertEqual(of_run.fingerprint(of_run.init()), want)
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
    completed, params = export.newest(self.workdir)
    self.assertEqual(completed, 12)
    self.assertEqual(
      shared_state.fingerprint(params), shared_state.fingerprint(self.params)
    )

  def test_no_checkpoint(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'expected the --workdir of a run'
    ):
      export.newest(self.workdir)
    (self.workdir / 'checkpoints').mkdir()
    with self.assertRaisesRegex(config_lib.ConfigError, 'no checkpoint yet'):
      export.newest(self.workdir)

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
    exporter = export.Exporter(CONFIG, self.workdir)
    (self.workdir / 'hf' / '.9.0123.partial').mkdir(parents=True)
    for completed in (8, 9, 10, 11):
      exporter.write(completed, self.params)
    content = self.workdir / 'hf' / '11' / 'config.json'
    content.write_text('as it was')
    exporter.write(11, self.params)
    exporter.prune()
    self.assertEqual(names(self.workdir / 'hf'), ['10', '11'])
    self.assertEqual(content.read_text(), 'as it was')


if __name__ == '__main__':
  absltest.main()
