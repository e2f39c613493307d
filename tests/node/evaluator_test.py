"""Tests of the evaluator's process."""

import dataclasses
import pathlib
import sys
import types
from unittest import mock

import jax
import pytest
from absl.testing import absltest

from covenant import config as config_lib
from covenant import files
from covenant.data import dataset
from covenant.emulate import host as host_lib
from covenant.node import evaluator as evaluator_lib
from covenant.node import workdir as workdir_lib
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.train import shared_state
from experiments.chaos import network as network_lib
from experiments.chaos import scenario
from tests import helpers
from tests.node import export_test

CONFIG = config_lib.load(f'{helpers.CONFIGS}/tiny.py', ['checkpoint.keep=2'])


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
    self.assertEqual(export_test.names(self.workdir / 'hf'), ['4', '6'])
    self.assertEqual(
      export_test.names(self.workdir / 'hf' / '6'), export_test.FILES
    )
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

  @pytest.mark.slow
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


if __name__ == '__main__':
  absltest.main()
