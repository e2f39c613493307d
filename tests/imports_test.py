"""Imports go one way, through the rooms of docs/architecture.md."""

import ast
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import helpers

# Lowest first. A room may import the rooms of lower levels, and itself. A room
# is a module or a package; the longest name that fits a module is its room.
LEVELS = (
  ('covenant.errors', 'covenant.typing'),
  ('covenant.extras',),
  (
    'covenant.device_sums',
    'covenant.files',
    'covenant.folder_lock',
    'covenant.plugins',
    'covenant.proxy',
    'covenant.startup',
    'covenant.tensorboard',
  ),
  ('covenant.config', 'covenant.metrics'),
  ('covenant.chain', 'covenant.store'),
  ('covenant.telemetry',),
  ('covenant.models', 'covenant.data', 'covenant.optim'),
  ('covenant.wire',),
  ('covenant.gauntlet', 'covenant.train'),
  ('covenant.protocol', 'covenant.plan'),
  ('covenant.node',),
  ('covenant.pool', 'covenant.adversaries'),
  ('covenant.emulate',),
  ('covenant.report',),
  ('covenant.cli',),
  ('covenant.__main__',),
  ('benchmarks',),
  ('run', 'configs', 'experiments'),
)
# Importing a leaf runs these first, so they must import nothing of ours.
PACKAGES_OF_LEAVES = ('covenant',)

_LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
_OURS = {room.split('.')[0] for room in _LEVEL}


def room_of(module: str) -> str | None:
  """The room of a module, or of a name in a module; None if it has none."""
  fits = [r for r in _LEVEL if f'{module}.'.startswith(f'{r}.')]
  return max(fits, key=len, default=None)


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
  """Yields (line, full name, name bound here) of every import, at any depth."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        bound = alias.asname or alias.name.split('.')[0]
        yield node.lineno, alias.name, bound
    elif isinstance(node, ast.ImportFrom):
      prefix = '.' * node.level + (node.module or '')
      for alias in node.names:
        yield node.lineno, f'{prefix}.{alias.name}', alias.asname or alias.name


def _is_private(name: str) -> bool:
  return name.startswith('_') and not name.startswith('__')


def _is_for_types(node: ast.stmt) -> bool:
  return isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'


def violations(module: str, source: str) -> list[str]:
  """Returns the violations in the imports of one module, a line each."""
  found = []
  tree = ast.parse(source)
  here = room_of(module)
  if module in PACKAGES_OF_LEAVES:  # for readers and type checkers: never run
    tree.body = [n for n in tree.body if not _is_for_types(n)]
  if here is None and module not in PACKAGES_OF_LEAVES:
    return [f'{module} is in no room: add it to LEVELS']
  neighbours = {}  # name bound here -> room
  for line, target, bound in imports(tree):
    where = f'{module}:{line} imports {target}'
    if target.startswith('.'):
      found.append(f'{where}: write the full name')
      continue
    if target.split('.')[0] not in _OURS or target in PACKAGES_OF_LEAVES:
      continue
    there = room_of(target)
    if there is None:
      found.append(f'{where}, which is in no room')
    elif module in PACKAGES_OF_LEAVES:
      found.append(f'{where}, and runs before every leaf')
    elif there != here:
      neighbours[bound] = there
      if _LEVEL[there] > _LEVEL[here]:
        found.append(f'{where}, a later room')
      elif _LEVEL[there] == _LEVEL[here]:
        found.append(f'{where}, a room of its own level')
      if any(map(_is_private, target.split('.'))):
        found.append(f'{where}, a private name')
  for node in ast.walk(tree):
    if (
      isinstance(node, ast.Attribute)
      and _is_private(node.attr)
      and isinstance(node.value, ast.Name)
      and node.value.id in neighbours
    ):
      room = neighbours[node.value.id]
      found.append(
        f'{module}:{node.lineno} uses {node.value.id}.{node.attr}, '
        f'a private name of {room}'
      )
  return found


def modules() -> Iterator[tuple[str, pathlib.Path]]:
  """Yields (dotted name, file) of every module of ours but the tests."""
  for top in sorted(_OURS):
    files = [
      helpers.ROOT / f'{top}.py',
      *sorted((helpers.ROOT / top).rglob('*.py')),
    ]
    for path in filter(pathlib.Path.exists, files):
      parts = path.relative_to(helpers.ROOT).with_suffix('').parts
      if parts[-1] == '__init__':
        parts = parts[:-1]
      yield '.'.join(parts), path


# Packages that `pip install covenant` brings, with those that they need.
_CORE = {'absl', 'jax', 'ml_dtypes', 'numpy', 'optax', 'scipy'}


def unnamed(module: str, source: str) -> list[str]:
  """Imports of an extra's package that would not say which extra it is in.

  Only statements of the module itself count: a function may import what another
  one that is always called before has asked for.
  """
  found = []
  for node in ast.parse(source).body:
    if isinstance(node, ast.Import):
      targets = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      targets = [node.module or '']
    else:
      continue
    for target in targets:
      package = target.partition('.')[0]
      if package not in {*sys.stdlib_module_names, *_CORE, *_OURS}:
        found.append(
          f'{module}:{node.lineno} imports {target}: put it below '
          "`with extras.needed('EXTRA'):`"
        )
  return found


class _Class(NamedTuple):
  """A class of ours, by what its source says."""

  module: str
  line: int
  bases: tuple[str, ...]  # full names
  private: frozenset[str]  # methods and attributes that begin with '_'

  @property
  def package(self) -> str:
    return self.module.rpartition('.')[0] or self.module


def _classes(module: str, source: str) -> Iterator[tuple[str, _Class]]:
  """Yields (full name, class) of a module's classes, nested ones too."""
  tree = ast.parse(source)
  bound = {  # `import a.b` binds a
    name: name if target.startswith(f'{name}.') else target
    for _, target, name in imports(tree)
  }

  def full_name(base: ast.expr) -> str:
    while isinstance(base, ast.Subscript):  # Generic[T]
      base = base.value
    first, *rest = ast.unparse(base).split('.')
    return '.'.join([bound.get(first, f'{module}.{first}'), *rest])

  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef):
      names: set[str] = set()
      for item in node.body:
        match item:
          case ast.FunctionDef() | ast.AsyncFunctionDef():
            names.add(item.name)
          case ast.Assign():
            names |= {t.id for t in item.targets if isinstance(t, ast.Name)}
          case ast.AnnAssign(target=ast.Name()):
            names.add(item.target.id)
      private = frozenset(filter(_is_private, names))
      bases = tuple(map(full_name, node.bases))
      yield (
        f'{module}.{node.name}',
        _Class(module, node.lineno, bases, private),
      )


def overrides(sources: Iterable[tuple[str, str]]) -> list[str]:
  """Private names that a class replaces of a base in another package.

  Args:
    sources: (module, source) of all modules.
  """
  classes = {
    name: found for module, text in sources for name, found in
    _classes(module, text)
  }  # fmt: skip
  wrong = []
  for name, own in classes.items():
    seen, bases = set(), list(own.bases)
    while bases:
      base = bases.pop()
      if base in classes and base not in seen:
        seen.add(base)
        bases += classes[base].bases
        if classes[base].package != own.package:
          wrong += [
            f'{own.module}:{own.line} {name} overrides {base}.{private}'
            for private in sorted(own.private & classes[base].private)
          ]
  return wrong


class OverridesTest(absltest.TestCase):
  def test_no_private_name_of_another_package_is_overridden(self):
    found = overrides((m, p.read_text(encoding='utf-8')) for m, p in modules())
    self.assertEmpty(found, '\n' + '\n'.join(found))

  def test_planted_override_is_found(self):
    base = 'class Node:\n  def _apply(self): ...\n  def poll(self): ...'
    middle = (
      'from covenant.node import base as node_lib\n'
      'class Miner(node_lib.Node[int]):\n  pass'
    )
    here = ('covenant.node.base', base)
    for text, module, want in (
      ('from covenant.node import base\nclass A(base.Node):\n  _apply = 1',
       'covenant.emulate.host', 'host.A overrides covenant.node.base.Node._a'),
      ('from covenant.node.base import Node\n'
       'class A(Node):\n  def _apply(self): ...',
       'experiments.chaos.faults', 'faults.A overrides'),
      ('import covenant.node.miner\nclass A(covenant.node.miner.Miner):\n'
       '  async def _apply(self): ...', 'benchmarks.a', 'a.A overrides'),
    ):  # fmt: skip
      sources = [here, ('covenant.node.miner', middle), (module, text)]
      (found,) = overrides(sources)
      self.assertIn(want, found)

  def test_allowed_overrides(self):
    base = ('covenant.node.base', 'class Node:\n  def _a(self): ...\n')
    beside = (
      'covenant.node.miner',
      'from covenant.node import base\nclass A(base.Node):\n  _a = 1',
    )
    public = (
      'covenant.emulate.host',
      'from covenant.node import base\nclass A(base.Node):\n  _b = 1\n  a = 1',
    )
    self.assertEmpty(overrides([base, beside, public]))


class ImportsTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_imports_go_one_way(self):
    found = []
    for module, path in modules():
      found += violations(module, path.read_text(encoding='utf-8'))
    self.assertEmpty(found, '\n' + '\n'.join(found))

  def test_packages_of_extras_are_named(self):
    found = []
    for module, path in modules():
      if module.partition('.')[0] == 'covenant':
        found += unnamed(module, path.read_text(encoding='utf-8'))
    self.assertEmpty(found, '\n' + '\n'.join(found))

  def test_planted_package_of_an_extra_is_found(self):
    for bad in 'import flax.linen as nn', 'from orbax import checkpoint':
      (found,) = unnamed('covenant.a', bad)
      self.assertIn('covenant.a:1 imports', found)
    for good in (
      'import jax.numpy as jnp\nimport covenant.b\nimport os.path',
      "with extras.needed('run'):\n  import flax",
      'def f():\n  import flax',
    ):
      self.assertEmpty(unnamed('covenant.a', good))

  def test_modules_are_found(self):
    names = [module for module, _ in modules()]
    self.assertIn('covenant.config.config', names)
    self.assertIn('covenant.report', names)
    self.assertIn('covenant.metrics', names)

  @parameterized.parameters(
    ('covenant.optim.topk', 'import covenant.node.miner', 'a later room'),
    ('covenant.optim.topk', 'from covenant import models', 'its own level'),
    ('covenant.optim.topk', 'from covenant.report import plots', 'a later'),
    ('covenant.optim', 'from covenant.wire import codec', 'a later room'),
    (
      'covenant.config.config',
      'from covenant.optim import topk',
      'a later room',
    ),
    ('covenant.protocol.round', 'from run import main', 'a later room'),
    (
      'covenant.protocol.round',
      'def f():\n  import run',
      ':2 imports run, a l',
    ),
    ('covenant.wire.codec', 'from covenant.optim.topk import _x', 'a private'),
    ('covenant.wire.codec', 'from covenant.optim import _topk', 'a private'),
    (
      'covenant.wire.codec',
      'from covenant.optim import topk as t\nt._x(1)',
      ':2 uses t._x, a private name of covenant.optim',
    ),
    ('covenant.wire.codec', 'from . import payload', 'write the full name'),
    ('covenant.wire.codec', 'from covenant import rest', 'in no room'),
    ('covenant.rest', '', 'in no room'),
    (
      'covenant',
      'from covenant.config import Config',
      'before every leaf',
    ),
    ('run', 'import experiments.wire', 'its own level'),
  )
  def test_planted_violation_is_found(self, module, source, message):
    (found,) = violations(module, source)
    self.assertIn(message, found)

  @parameterized.parameters(
    ('covenant.optim.topk', 'from covenant.optim import _cut\n_cut._x'),
    ('covenant.optim.topk', 'from covenant import config'),
    ('covenant.optim.topk', 'from covenant import metrics'),
    ('covenant.optim.topk', 'import jax\njax._src'),
    ('covenant.protocol.round', 'from covenant.optim.topk import compress'),
    ('covenant.report.page', 'from covenant.report import plots'),
    ('run', 'import covenant\nfrom covenant.emulate import host'),
    ('covenant', ''),
    ('covenant', 'if TYPE_CHECKING:\n  from covenant.optim import topk'),
  )
  def test_allowed(self, module, source):
    self.assertEmpty(violations(module, source))


if __name__ == '__main__':
  absltest.main()
