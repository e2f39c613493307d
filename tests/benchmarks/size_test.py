import contextlib
import io
import pathlib

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from benchmarks import size

_STEP = '''"""Of a step."""
import typing
from typing import Any

import numpy as np
from pack import leaf
from pack.room.deep import name


def step(x: Any, y: typing.Any) -> None:
  """What is done."""
  import pack.late


class Anything:
  """Anything but a clause."""
'''


class SizeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir())
    body = '\n'.join(f'  x = {i}' for i in range(60))
    for name, text in {
      'pack/__init__.py': '"""A package."""\n',
      'pack/step.py': _STEP,
      'pack/leaf.py': 'from pack import step\n',
      'pack/late.py': '',
      'pack/unused.py': f'def long():\n{body}\n\n\ndef short(): ...\n',
      'pack/room/__init__.py': '',
      'pack/room/deep.py': 'name = 1\n' * 401,
    }.items():
      path = self.root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    self.size = size.measure(self.root, 'pack', 'pack.step')

  def test_counts_a_planted_package(self):
    steps = _STEP.count('\n')
    self.assertEqual(self.size.lines, 1 + steps + 1 + 0 + 64 + 0 + 401)
    self.assertLen(self.size.module_lines, 5)
    self.assertEqual(self.size.long_modules, ['pack/room/deep.py: 401 lines'])
    self.assertLen(self.size.function_lines, 3)
    self.assertEqual(
      self.size.long_functions, ['pack/unused.py:1 long: 61 lines']
    )
    self.assertEqual(self.size.anys, ['pack/step.py:10', 'pack/step.py:10'])
    self.assertEqual(self.size.docstrings, 4)
    self.assertEqual(
      self.size.clauses,
      ['pack/step.py:1 Of a step.', 'pack/step.py:10 What is done.'],
    )

  def test_closure_follows_imports_of_ours(self):
    self.assertCountEqual(
      self.size.closure,
      ['pack.step', 'pack.leaf', 'pack.late', 'pack.room.deep'],
    )
    self.assertEqual(self.size.closure_lines, self.size.lines - 64)

  def test_imports_for_type_checkers_are_in_no_closure(self):
    init = self.root / 'pack' / '__init__.py'
    for test in ('TYPE_CHECKING', 'typing.TYPE_CHECKING'):
      init.write_text(f'if {test}:\n  from pack import unused\n')
      self.assertNotIn('pack.unused', size.closure(self.root, 'pack.step'))
    init.write_text('if True:\n  from pack import unused\n')
    self.assertIn('pack.unused', size.closure(self.root, 'pack.step'))

  def test_measures_one_file(self):
    one = size.measure(self.root, 'pack/unused.py', 'pack.step')
    self.assertEqual(one.lines, 64)

  def test_table_compares_with_targets(self):
    rows = {row.name: row for row in size.table(self.size, 7)}
    self.assertEqual(rows['config fields'].value, '7')
    self.assertTrue(rows['modules'].met)
    self.assertFalse(rows['lines per module, most'].met)
    self.assertFalse(rows['functions over 60 lines'].met)
    self.assertEqual(rows['functions over 60 lines'].value, '33.3 % (1 of 3)')
    share = rows['docstrings that begin with a clause']
    self.assertEqual(share.value, '50.0 % (2 of 4)')

  def test_write_replaces_what_stands_between_the_markers(self):
    page = self.root / 'page.md'
    page.write_text('a\n<!-- size: begin -->\nold\n<!-- size: end -->\nb\n')
    size.write(page, 'new')
    self.assertEqual(
      page.read_text(), 'a\n<!-- size: begin -->\nnew\n<!-- size: end -->\nb\n'
    )

  @parameterized.parameters('', '<!-- size: end -->\n<!-- size: begin -->')
  def test_write_refuses_a_page_without_markers(self, text):
    page = self.root / 'page.md'
    page.write_text(text)
    with self.assertRaisesRegex(ValueError, 'expected the markers'):
      size.write(page, 'new')
    self.assertEqual(page.read_text(), text)

  @parameterized.parameters(
    ([], '| package lines |'),
    (['--find', 'covenant/optim/topk.py'], 'uses of Any: '),
  )
  @pytest.mark.rows(1)
  def test_prints(self, arguments, expected):
    with contextlib.redirect_stdout(io.StringIO()) as out:
      size.main(arguments)
    self.assertIn(expected, out.getvalue())


if __name__ == '__main__':
  absltest.main()
