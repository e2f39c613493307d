"""Attacks and faults that one node meets alone."""

import csv
import pathlib
from unittest import mock

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from experiments import reliability
from experiments.chaos import single_node
from tests import helpers

# tests/node/evaluator_test.py and tests/protocol/checkpoint_test.py have the
# two that take longest; `python -m experiments.reliability` runs all.
LONG = (
  'false checkpoints, shown to an evaluator',
  'flipped bits of a checkpoint',
)
CHOSEN = [
  (name, case) for _, name, case in single_node.CASES if name not in LONG
]


@pytest.mark.chaos
class CasesTest(parameterized.TestCase):
  @parameterized.parameters(*CHOSEN)
  def test_nothing_gets_through(self, name, case):
    folder = pathlib.Path(self.create_tempdir().full_path)
    tried, through = case(helpers.tiny(), folder)
    self.assertGreater(tried, 3, name)
    self.assertEqual(through, 0, name)


class OutcomesTest(absltest.TestCase):
  def test_what_gets_through_is_noticed(self):
    def refuses(config, folder):
      raise AssertionError('an honest key was refused')

    for case, wrong in (
      (lambda config, folder: (3, 0), ''),
      (lambda config, folder: (3, 1), '1 got through'),
      (lambda config, folder: (0, 0), 'nothing was tried'),
      (refuses, 'an honest key was refused'),
    ):
      with mock.patch.object(single_node, 'CASES', ((22, 'a case', case),)):
        (outcome,) = single_node.outcomes(helpers.tiny())
      self.assertEqual((outcome.wrong, outcome.passed), (wrong, not wrong))

  def test_the_results_are_those_of_the_page(self):
    with open(reliability.NODE_RESULTS, newline='') as file:
      header, *rows = csv.reader(file)
    self.assertEqual(header, list(reliability.NODE_HEADER))
    known = [[str(item), name] for item, name, _ in single_node.CASES]
    self.assertEqual([row[:2] for row in rows], known)
    page = (helpers.ROOT / 'docs' / 'reliability.md').read_text('utf-8')
    for row in rows:
      self.assertEqual(row[3:], ['0', 'passed'])
      self.assertIn(f'| {" | ".join(row)} |', page)


if __name__ == '__main__':
  absltest.main()
