"""Every field of a config is read by code outside covenant/config/."""

import ast
import dataclasses
import pathlib
from collections.abc import Iterator

import pytest
from absl.testing import absltest

from covenant import config as config_lib
from tests import helpers

# The class of each section, by the name of the field that holds it.
SECTIONS = {'config': config_lib.Config, 'island': config_lib.Island}
for _outer in (config_lib.Config(), config_lib.Optim()):
  for _field in dataclasses.fields(_outer):
    _value = getattr(_outer, _field.name)
    if dataclasses.is_dataclass(_value):
      SECTIONS[_field.name] = type(_value)
NAMES = {cls.__name__: name for name, cls in SECTIONS.items()}


def last_name(node: ast.AST) -> str:
  """`b` of the expressions `b`, `_b`, `a.b` and `a._b`."""
  if isinstance(node, ast.Name):
    return node.id.lstrip('_')
  return node.attr.lstrip('_') if isinstance(node, ast.Attribute) else ''


def _bindings(tree: ast.AST) -> Iterator[tuple[str, str]]:
  """Yields (variable, section) for `x = config.plan` and `x: config.Plan`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Assign):
      for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
          pairs = list(zip(target.elts, node.value.elts, strict=True))
        for name, value in pairs:
          yield last_name(name), last_name(value)
    elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
      name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
      yield name.lstrip('_'), NAMES.get(last_name(node.annotation), '')


def reads(source: str) -> set[tuple[str, str]]:
  """(section, field) of all fields that a module reads."""
  tree = ast.parse(source)
  sections = {name: {name} for name in SECTIONS}
  for name, section in _bindings(tree):
    if section in SECTIONS:
      sections.setdefault(name, set()).add(section)
  return {
    (section, node.attr)
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
    for section in sections.get(last_name(node.value), ())
  }


def unread(sources: list[str]) -> list[str]:
  found = set().union(*map(reads, sources))
  return [
    f'{section}.{field.name}'
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
    if (section, field.name) not in found
  ]


def package() -> list[pathlib.Path]:
  root = helpers.ROOT / 'covenant'
  return [path for path in root.rglob('*.py') if path.parent != root / 'config']


class FieldsTest(absltest.TestCase):
  def test_every_field_is_read(self):
    self.assertEmpty(unread([path.read_text() for path in package()]))

  @pytest.mark.slow
  def test_a_field_that_is_not_read_is_found(self):
    sources = [
      path.read_text().replace('.takeover_blocks', '.other')
      for path in package()
    ]
    self.assertEqual(unread(sources), ['phases.takeover_blocks'])

  def test_variables_are_followed(self):
    source = """
def f(inner: config.Inner, x):
  asked, n = x.config.plan, 3
  inner.eps, asked.jitter, self._config.seed, other.b1
"""
    self.assertEqual(
      reads(source) - {('config', 'plan'), ('config', 'Inner')},
      {('inner', 'eps'), ('plan', 'jitter'), ('config', 'seed')},
    )


if __name__ == '__main__':
  absltest.main()
