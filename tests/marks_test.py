"""Marks of tests reach every row that is made of them."""

import ast

from absl.testing import absltest

from tests import helpers


def lost(source: str) -> list[str]:
  """Returns the functions with a mark above `parameterized`, which drops it."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef):
      names = [ast.unparse(x) for x in node.decorator_list]
      marks = [i for i, x in enumerate(names) if x.startswith('pytest.mark.')]
      rows = [i for i, x in enumerate(names) if x.startswith('parameterized.')]
      if marks and rows and marks[0] < rows[-1]:
        found.append(node.name)
  return found


class MarksTest(absltest.TestCase):
  def test_none_is_above_what_makes_rows(self):
    for path in sorted((helpers.ROOT / 'tests').rglob('*_test.py')):
      with self.subTest(path.name):
        self.assertEmpty(lost(path.read_text(encoding='utf-8')))

  def test_one_above_is_found(self):
    mark, rows = '@pytest.mark.slow', '@parameterized.parameters(1)'
    self.assertEqual(lost(f'{mark}\n{rows}\ndef f(): ...'), ['f'])
    self.assertEmpty(lost(f'{rows}\n{mark}\ndef f(): ...'))


if __name__ == '__main__':
  absltest.main()
