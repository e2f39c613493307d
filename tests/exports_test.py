"""The names in `covenant` itself: the optimizer, and runs from Python."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import pytest
from absl.testing import absltest
from absl.testing import parameterized

import covenant
from tests import helpers

RUNS = ['Results', 'emulate', 'read_results', 'run']  # need the extra `run`
NAMES = [n for n in covenant.__all__ if not n.startswith('_')] + RUNS
# A package that may be called (tests/emulate/results_test.py).
CALLED = 'emulate'
ROOMS = 'covenant.optim.', 'covenant.emulate.', 'covenant.report.'


class ExportsTest(parameterized.TestCase):
  @parameterized.parameters(*(name for name in NAMES if name != CALLED))
  def test_each_is_what_its_module_has(self, name):
    value = getattr(covenant, name)
    self.assertNotIsInstance(value, types.ModuleType)
    home = importlib.import_module(value.__module__)
    self.assertIs(getattr(home, name), value)
    self.assertTrue(home.__name__.startswith(ROOMS), home.__name__)

  def test_none_is_the_name_of_a_module(self):
    modules = {m.name for m in pkgutil.iter_modules(covenant.__path__)}
    self.assertEqual(modules.intersection(NAMES), {CALLED})
    self.assertNoCommonElements(RUNS, covenant.__all__)
    module = importlib.import_module(f'covenant.{CALLED}')
    self.assertIs(covenant.emulate, module)
    self.assertTrue(callable(module))

  @pytest.mark.slow
  def test_module_and_function_stay_apart(self):
    # In either order, and in a process of its own, where nothing is loaded.
    function = 'from covenant import sparseloco as f'
    module = 'import covenant.optim.sparseloco as m'
    again = 'from covenant.optim import sparseloco as n'
    check = (
      'import covenant, types; '
      'assert m is n and isinstance(m, types.ModuleType); '
      'assert f is m.sparseloco is covenant.sparseloco'
    )
    for lines in ([function, module, again], [again, module, function]):
      code = '; '.join([*lines, check])
      subprocess.run([sys.executable, '-c', code], cwd=helpers.ROOT, check=True)

  def test_importing_covenant_loads_nothing_of_it(self):
    code = (
      'import sys, covenant; covenant.__version__; '
      'print(*[m for m in sys.modules if m.startswith("covenant.")], '
      '*{"jax", "numpy"} & set(sys.modules))'
    )
    done = subprocess.run(
      [sys.executable, '-c', code], cwd=helpers.ROOT, check=True,
      capture_output=True, text=True,
    )  # fmt: skip
    self.assertEqual(done.stdout, '\n')

  def test_type_checkers_see_the_same_names(self):
    source = pathlib.Path(inspect.getfile(covenant)).read_text(encoding='utf-8')
    pairs = re.findall(
      r'^  from covenant\.(\S+) import (\w+)(?: as \w+)?$', source, re.M
    )
    self.assertEqual(
      {name: module for module, name in pairs}, covenant._MODULES
    )
    self.assertEqual(sorted(covenant._MODULES), sorted(NAMES))

  def test_dir_and_unknown_names(self):
    self.assertContainsSubset(NAMES, dir(covenant))
    with self.assertRaisesRegex(
      AttributeError, "'covenant' has no .* 'sparse'"
    ):
      covenant.sparse  # noqa: B018

  def test_each_is_in_the_reference(self):
    page = (helpers.ROOT / 'docs' / 'api.rst').read_text(encoding='utf-8')
    found = re.findall(
      r'^\.\. auto\w+:: covenant\.(?:emulate\.results\.)?(\w+)$', page, re.M
    )
    self.assertContainsSubset(NAMES, found)


if __name__ == '__main__':
  absltest.main()
