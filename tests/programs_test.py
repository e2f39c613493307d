"""Programs that tests start, written as strings, name what there is.

No linter sees them, and few of the tests that start them are unit tests.
"""

import ast
import builtins
import importlib
import re
from collections.abc import Iterator

from absl.testing import absltest

from tests import helpers


def programs() -> Iterator[tuple[str, str]]:
  """Yields (place, source) of each string that is a program of ours."""
  for path in sorted((helpers.ROOT / 'tests').rglob('*_test.py')):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if re.search(r'^from covenant[. ](.*\n){4}', node.value, re.MULTILINE):
          place = path.relative_to(helpers.ROOT)
          yield f'{place}:{node.lineno}', node.value


def bound(tree: ast.Module) -> tuple[dict[str, str], set[str]]:
  """Returns what names are imported from, and all other names set."""
  imported, names = {}, set(dir(builtins))
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        name = alias.asname or alias.name.split('.')[0]
        imported[name] = alias.name if alias.asname else name
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        name = alias.asname or alias.name
        imported[name] = f'{node.module}.{alias.name}'
    elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
      names.add(node.id)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.arg):
      names.add(node.arg)
    elif isinstance(node, ast.ExceptHandler) and node.name:
      names.add(node.name)
  return imported, names


def find(name: str):
  """The module or the object of a dotted name."""
  try:
    return importlib.import_module(name)
  except ImportError:
    module, _, last = name.rpartition('.')
    return getattr(importlib.import_module(module), last)


def wrong(source: str) -> list[str]:
  """Returns the names in a program that do not exist."""
  tree, found = ast.parse(source), []
  imported, names = bound(tree)
  for name in imported.values():
    if name.startswith('covenant'):
      find(name.removesuffix('.*'))
  for node in ast.walk(tree):
    if isinstance(node, ast.Name) and node.id not in names | set(imported):
      found.append(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      module = imported.get(node.value.id, '')
      if module.startswith('covenant'):
        if not hasattr(find(module), node.attr):
          found.append(f'{module}.{node.attr}')
  return found


class ProgramsTest(absltest.TestCase):
  def test_they_name_what_there_is(self):
    for place, source in programs():
      with self.subTest(place):
        self.assertEmpty(wrong(source))

  def test_what_is_not_there_is_found(self):
    source = (
      'import covenant.node.multihost as m; m._NOTHING = 1; ranks.start()'
    )
    self.assertEqual(
      set(wrong(source)), {'covenant.node.multihost._NOTHING', 'ranks'}
    )
    with self.assertRaises(AttributeError):
      wrong('import jax; from covenant.node import nothing')


# These take minutes, and run the code of `recipe` and `transformations`; tests
# have what is their own.
SAME = ('byzantine', 'recipe_parts')
# These need root. A test runs the first; the second takes four minutes.
ROOT_ONLY = ('shaped_links', 'joined_islands')


class ExperimentsTest(absltest.TestCase):
  def test_all_are_run_in_short(self):
    folder = helpers.ROOT / 'experiments'
    quick = {
      path.stem
      for path in folder.glob('*.py')
      if f'experiments.{path.stem} --quick' in path.read_text('utf-8')
    }
    self.assertContainsSubset({'islands', 'methods', 'reliability'}, quick)
    script = (helpers.ROOT / '.ci' / 'run').read_text('utf-8')
    (names,) = re.findall(r'for name in (islands .*?); do', script, re.DOTALL)
    run = {*names.replace('\\', ' ').split(), *SAME, *ROOT_ONLY}
    run |= {*re.findall(r'experiments\.(\w+) --quick', script)} - {'NAME'}
    self.assertEqual(run, quick)


if __name__ == '__main__':
  absltest.main()
