"""Objects that a config names by 'module:attribute' or 'file.py:attribute'."""

import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any, TypeVar

from covenant import errors

_T = TypeVar('_T')


class PluginError(errors.CovenantError):
  """A reference names no object; the message says what is missing."""


def is_reference(text: str) -> bool:
  """True for 'module:attribute' and 'file.py:attribute'."""
  module, colon, attribute = text.rpartition(':')
  return bool(module and colon) and attribute.isidentifier()


def load(reference: str) -> Any:
  """Returns the object that a reference names; a file is executed once.

  >>> load('math:pi')
  3.141592653589793

  Raises:
    PluginError: it is no reference, or there is no such object.
  """
  module, _, attribute = reference.rpartition(':')
  if not is_reference(reference):
    raise PluginError(
      f"expected 'module:attribute' or 'file.py:attribute', got {reference!r}"
    )
  found = _file(module) if module.endswith('.py') else _module(module)
  if not hasattr(found, attribute):
    raise PluginError(f'{reference!r}: {module} has no {attribute}')
  return getattr(found, attribute)


def choose(field: str, known: Mapping[str, _T], name: str) -> _T:
  """Returns the known object of a name, or the one that it refers to.

  Args:
    field: of the config, for errors.
    known: objects by name.
    name: one of these names, or a reference.

  Raises:
    PluginError: it is neither.
  """
  if name in known:
    return known[name]
  try:
    return load(name)
  except PluginError as e:
    raise PluginError(f'{field}: {e}') from e


def _module(name: str) -> types.ModuleType:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as e:
    raise PluginError(f'there is no module {e.name!r} ({name})') from e


def _file(name: str) -> types.ModuleType:
  path = pathlib.Path(name).absolute()
  key = f'covenant_plugin:{path}'
  if key in sys.modules:
    return sys.modules[key]
  spec = importlib.util.spec_from_file_location(key, path)
  if not path.is_file() or spec is None or spec.loader is None:
    raise PluginError(f'there is no file {path}')
  module = importlib.util.module_from_spec(spec)
  sys.modules[key] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[key]
    raise
  return module
