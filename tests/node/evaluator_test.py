"""Tests of the evaluator's process."""

import pathlib
import sys
import types
from unittest import mock

from absl.testing import absltest

from covenant import config as config_lib
from covenant.node import evaluator
from covenant.node import export
from covenant.node import workdir as workdir_lib
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.train import shared_state
from tests import helpers
from tests.node.export_test import FILES
from tests.node.export_test import names

CONFIG = config_lib.load(f'{helpers.CONFIGS}/tiny.py', ['checkpoint.keep=2'])


class EvaluatorProcessTest(absltest.TestCase):
  """The evaluator, on places that a test hands it."""

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    for name in ('chain', 'objects'):
      self.enterContext(mock.patch.object(evaluator.connect, name))
    self.status = self.enterContext(
      mock.patch.object(workdir_lib.Workdir, 'status')
    )

  def evaluate(self, *rounds, installed):
    spec = types.SimpleNamespace() if installed else None
    with (
      mock.patch('importlib.util.find_spec', return_value=spec),
      mock.patch('builtins.print') as self.printed,
    ):
      process = evaluator.EvaluatorProcess(CONFIG, self.workdir)
      shared = shared_state.SharedModel(CONFIG).init()
      for completed in rounds:
        place = apply.Position(completed, bytes(32), shared)
        index = published_checkpoint.Index(completed, '00', 'f', [], {})
        process._evaluate(place, index)
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
    self.printed.assert_called_once_with(export.WITHOUT, file=sys.stderr)

  def test_a_full_disk_stops_no_evaluation(self):
    with mock.patch('shutil.disk_usage') as usage:
      usage.return_value.free = 0
      table = self.evaluate(2, installed=True)
    self.assertLen(table.splitlines(), 2)
    said = [call.kwargs for call in self.status.mock_calls]
    errors = [fields['error'] for fields in said if 'error' in fields]
    self.assertLen(errors, 1)
    self.assertRegex(errors[0], 'export: .*the disk has 0.0 GB')


if __name__ == '__main__':
  absltest.main()
