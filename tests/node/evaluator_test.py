"""Tests of the evaluator's process."""

import dataclasses
import importlib.util
import pathlib
import sys
import types
import unittest
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from covenant import cli
from covenant import config as config_lib
from covenant import files
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.models import llama
from covenant.models import sharding
from covenant.node import evaluator as evaluator_lib
from covenant.node import workdir as workdir_lib
from covenant.protocol import apply
from covenant.protocol import checkpoint
from covenant.protocol import published_checkpoint
from covenant.train import shared_state
from experiments.chaos import network as network_lib
from experiments.chaos import scenario
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


class EvaluatorProcessTest(absltest.TestCase):
  """The evaluator, on places that a test hands it."""

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    for name in ('chain', 'objects'):
      self.enterContext(mock.patch.object(evaluator_lib.connect, name))
    self.status = self.enterContext(
      mock.patch.object(workdir_lib.Workdir, 'status')
    )

  def evaluate(self, *rounds, installed):
    spec = types.SimpleNamespace() if installed else None
    with (
      mock.patch('importlib.util.find_spec', return_value=spec),
      mock.patch('builtins.print') as self.printed,
    ):
      process = evaluator_lib.EvaluatorProcess(CONFIG, self.workdir)
      shared = shared_state.SharedModel(CONFIG).init()
      for completed in rounds:
        place = apply.Position(completed, bytes(32), shared)
        process._evaluate(place)
    return (self.workdir / 'evaluations.csv').read_text()

  def test_with_lm_eval(self):
    table = self.evaluate(2, 4, 6, installed=True)
    self.assertLen(table.splitlines(), 4)
    self.assertEqual(names(self.workdir / 'hf'), ['4', '6'])
    self.assertEqual(names(self.workdir / 'hf' / '6'), FILES)
    self.printed.assert_not_called()

  def test_without_it_says_so_once(self):
    table = self.evaluate(2, 4, installed=False)
    self.assertLen(table.splitlines(), 3)
    self.assertFalse((self.workdir / 'hf').exists())
    self.printed.assert_called_once_with(evaluator_lib.WITHOUT, file=sys.stderr)

  def test_a_full_disk_stops_no_evaluation(self):
    with mock.patch('shutil.disk_usage') as usage:
      usage.return_value.free = 0
      table = self.evaluate(2, installed=True)
    self.assertLen(table.splitlines(), 2)
    said = [call.kwargs for call in self.status.mock_calls]
    errors = [fields['error'] for fields in said if 'error' in fields]
    self.assertLen(errors, 1)
    self.assertRegex(errors[0], 'export: .*the disk has 0.0 GB')


class BelievesTest(absltest.TestCase):
  """The evaluator believes what the chain's history vouches for."""

  def test_no_validator_alone(self):
    config = dataclasses.replace(
      scenario.get_config(helpers.tiny()),
      miners=2,
      validators=2,
      checkpoint=config_lib.Checkpoint(every=1, keep=2, publish=1),
    )
    network = network_lib.Network(
      config, host_lib.Host(config, dataset.load(config))
    )
    config = dataclasses.replace(config, rounds=5)
    start = network.plan.start
    place = network.nodes['3'].place
    stranger = network.host.objects('stranger')
    for name, found in (
      ('chain', network.nodes['0'].chain),
      ('objects', stranger),
    ):
      self.enterContext(
        mock.patch.object(evaluator_lib.connect, name, return_value=found)
      )
    workdir = pathlib.Path(self.create_tempdir().full_path)
    process = evaluator_lib.EvaluatorProcess(config, workdir)

    def lie():
      liar, model = network.nodes['3'], network.host.shared_model
      wrong = jax.tree.map(lambda x: x + 7, place.shared)
      for r, root in ((100, b'e' * 32), (liar.state.round, liar.root)):
        lies = apply.Position(r, root, wrong)
        sign, objects = liar.chain.sign, liar.objects
        objects.bucket.delete([objects.key('checkpoints', r)])
        published_checkpoint.publish(objects, lies, model, sign)

    def rows():
      path = workdir / 'evaluations.jsonl'
      return [row['round'] for row in files.read_jsonl(path)]

    while network.block < start(1):
      network.step()
      lie()
      self.assertFalse(process._look())  # nothing is vouched for
    states = {}
    while network.block < start(5) - 1:
      network.step()
      node = network.nodes['2']
      states[node.state.round] = node.shared
      lie()
      process._look()
    self.assertEqual(rows(), [1, 2, 3])
    network.run(6)
    process._look()
    self.assertEqual(rows(), [1, 2, 3, 5])
    model = shared_state.SharedModel(config)
    for row in files.read_jsonl(workdir / 'evaluations.jsonl'):
      if row['round'] in states:
        want = model.fingerprint(states[row['round']])
        self.assertEqual(row['fingerprint'], want, row['round'])
    self.assertLen(states, 5)


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
    folder = evaluator_lib.Exporter(CONFIG, self.workdir).write(4, self.params)
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
    completed, params = evaluator_lib.newest(self.workdir)
    self.assertEqual(completed, 12)
    self.assertEqual(
      shared_state.fingerprint(params), shared_state.fingerprint(self.params)
    )

  def test_newest_on_a_mesh(self):
    """Each device has its shard; the exported files are the same."""
    self.save(3)
    devices = config_lib.Devices(fsdp=2)
    mesh = sharding.mesh(devices, jax.devices())
    completed, params = evaluator_lib.newest(self.workdir, mesh)
    self.assertEqual(completed, 3)
    self.assertLen(params['embedding'].sharding.device_set, 2)
    self.assertEqual(
      shared_state.fingerprint(params), shared_state.fingerprint(self.params)
    )
    folders = []
    for name, x in ('alone', self.params), ('mesh', params):
      workdir = self.workdir / name
      workdir.mkdir()
      folders.append(evaluator_lib.Exporter(CONFIG, workdir).write(3, x))
    for file in FILES:
      one, other = ((folder / file).read_bytes() for folder in folders)
      self.assertEqual(one, other, file)

  def test_no_checkpoint(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, 'expected the --workdir of a run'
    ):
      evaluator_lib.newest(self.workdir)
    (self.workdir / 'checkpoints').mkdir()
    with self.assertRaisesRegex(config_lib.ConfigError, 'no checkpoint yet'):
      evaluator_lib.newest(self.workdir)

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
    exporter = evaluator_lib.Exporter(CONFIG, self.workdir)
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
