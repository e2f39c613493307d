"""Fields with bounds: nested frozen dataclasses from mappings and flags.

What cannot be is an error that names the field and says what is allowed.
"""

import ast
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from covenant import errors

_TINY = 5e-324  # the least positive float: a bound of "more than 0"


class ConfigError(errors.CovenantError, ValueError):
  """A config that cannot run; the message names the field, what is allowed."""


def bounded(default, *, low=None, high=None, choices=None):
  """A dataclass field with bounds, inclusive; `choices` is a closed list."""
  metadata = {'low': low, 'high': high, 'choices': choices}
  return dataclasses.field(default=default, metadata=metadata)


def positive(default):
  """1 or more of an integer, anything above 0 of a float."""
  return bounded(default, low=1 if isinstance(default, int) else _TINY)


def fraction(default):
  """From 0 to 1."""
  return bounded(default, low=0.0, high=1.0)


def leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  """Every field of nested dataclasses, as path and value."""
  for field in dataclasses.fields(node):
    value = getattr(node, field.name)
    if dataclasses.is_dataclass(value):
      yield from leaves(value, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, value


def override(raw: dict[str, Any], edit: str, known: Mapping[str, Any]) -> None:
  """Sets one field of nested dicts.

  Args:
    raw: what to edit.
    edit: `path.to.field=text`.
    known: every field there is, by path, with a value of its type.

  Raises:
    ConfigError: there is no such field, or the text is of another type.
  """
  path, equals, text = edit.partition('=')
  if path not in known:
    raise ConfigError(_unknown(path, known))
  if not equals:
    raise ConfigError(f'{path}: expected --config.{path}=VALUE')
  *sections, name = path.split('.')
  for section in sections:
    raw = raw[section]
  raw[name] = _read(path, text, type(known[path]))


def _read(path: str, text: str, kind: type) -> Any:
  """A flag's text as `kind`."""
  if kind is str:
    return text
  if kind is bool:
    words = {'true': True, 'false': False, '1': True, '0': False}
    if text.lower() not in words:
      raise ConfigError(f'{path}: expected true or false, got {text!r}')
    return words[text.lower()]
  try:
    return ast.literal_eval(text) if kind is tuple else kind(text)
  except (ValueError, SyntaxError):
    raise ConfigError(
      f'{path}: expected {kind.__name__}, got {text!r}'
    ) from None


def build(cls: type, raw: Any, prefix: str, known: Mapping[str, Any]) -> Any:
  """An instance of the dataclass `cls` from nested mappings, type-checked.

  Args:
    cls: of `bounded` fields, or sections that are such classes.
    raw: a mapping; what is left out has its default.
    prefix: of the paths in messages: '' or 'optim.'.
    known: every path there is.

  Raises:
    ConfigError: names the first field that cannot be, and what is allowed.
  """
  if not isinstance(raw, Mapping):
    raise ConfigError(f'{prefix[:-1]}: expected a section, got {raw!r}')
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in raw:
    if name not in fields:
      raise ConfigError(_unknown(prefix + str(name), known))
  hints = typing.get_type_hints(cls)
  values = {}
  for name, field in fields.items():
    path = prefix + name
    if name not in raw:
      continue  # the file is older than the field, which then was its default
    if dataclasses.is_dataclass(hints[name]):
      values[name] = build(hints[name], raw[name], path + '.', known)
    else:
      values[name] = _typed(path, raw[name], hints[name])
      _check_bounds(path, values[name], field.metadata)
  return cls(**values)


def _unknown(path: str, known: Iterable[str]) -> str:
  """The message for a field the schema lacks, with the nearest that it has."""
  known = list(known)
  near = difflib.get_close_matches(path, known, n=1)
  if not near:
    leaf = path.rsplit('.', 1)[-1]
    near = [name for name in known if name.rsplit('.', 1)[-1] == leaf][:1]
  hint = f'did you mean {near[0]}?' if near else 'see covenant/config/config.py'
  return f'{path}: no such field; {hint}'


def _typed(path: str, value: Any, kind: Any) -> Any:
  """`value` as `kind`; an int may stand for a float, nothing else converts."""
  if typing.get_origin(kind) is tuple:
    kinds = typing.get_args(kind)
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
      raise ConfigError(f'{path}: expected {len(kinds)} numbers, got {value!r}')
    return tuple(_typed(path, v, k) for v, k in zip(value, kinds, strict=True))
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(
      f'{path}: expected {kind.__name__}, got {type(value).__name__} {value!r}'
    )
  return value


def _check_bounds(path: str, value: Any, bounds: Mapping[str, Any]) -> None:
  choices = bounds.get('choices')
  if choices is not None and value not in choices:
    raise ConfigError(f'{path}: expected one of {choices}, got {value!r}')
  low, high = bounds.get('low'), bounds.get('high')
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f'{path}: expected a finite number, got {value!r}')
  if low is not None and value < low:
    least = 'more than 0' if low == _TINY else f'at least {low}'
    raise ConfigError(f'{path}: expected {least}, got {value!r}')
  if high is not None and value > high:
    raise ConfigError(f'{path}: expected at most {high}, got {value!r}')
