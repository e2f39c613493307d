"""Fields with bounds: nested frozen dataclasses from mappings and flags.

A section is a frozen dataclass whose fields are made by `bounded` and its
relatives. Invalid values raise an error that names the field and says what is
allowed.
"""

import ast
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from covenant import errors
from covenant import plugins

_TINY = 5e-324  # the smallest positive float: the bound of "more than 0"

Value: TypeAlias = Any  # of a field, of any type, or its form in JSON


class ConfigError(errors.CovenantError, ValueError):
  """An invalid config; the message names the field and what is allowed."""


def require(holds: bool, field: str, message: str) -> None:
  """Raises a ConfigError about `field` unless `holds`."""
  if not holds:
    raise ConfigError(f'{field}: {message}')


class Section:
  """The base of every group of fields."""

  def check(self) -> None:
    """Holds the fields of this section against each other.

    Raises:
      ConfigError: names the first field that contradicts another one.
    """


class Text(NamedTuple):
  """The form that a tuple has in a flag, and had in config.json once."""

  read: Callable[[str], Value]
  show: Callable[[Value], str]


def bounded(default, *, low=None, high=None, choices=None, plugin=False):
  """A dataclass field with inclusive bounds; `choices` is a closed list.

  With `plugin` it may also be 'file.py:attribute' (covenant/plugins.py).
  """
  metadata = {'low': low, 'high': high, 'choices': choices, 'plugin': plugin}
  return dataclasses.field(default=default, metadata=metadata)


def positive(default):
  """A field of 1 or more if an integer, of more than 0 if a float."""
  return bounded(default, low=1 if isinstance(default, int) else _TINY)


def fraction(default):
  """A field between 0 and 1."""
  return bounded(default, low=0.0, high=1.0)


def listed(read, show):
  """A field that holds a tuple, empty by default, with a text for flags."""
  return dataclasses.field(default=(), metadata={'text': Text(read, show)})


def names():
  """A field that holds a tuple of strings; commas separate them in a flag."""
  return listed(_split, ','.join)


def _split(text: str) -> tuple[str, ...]:
  return tuple(part.strip() for part in text.split(',') if part.strip())


class Leaf(NamedTuple):
  """One field of nested sections."""

  path: str  # such as 'optim.inner_steps'
  value: Value
  text: Text | None

  @property
  def shown(self) -> str:
    """The value in an error or a list of differences."""
    return repr(self.text.show(self.value) if self.text else self.value)


def leaves(node: Section, prefix: str = '') -> Iterator[Leaf]:
  """Yields every field of nested sections."""
  for field in dataclasses.fields(typing.cast(Value, node)):
    value = getattr(node, field.name)
    if isinstance(value, Section):
      yield from leaves(value, f'{prefix}{field.name}.')
    else:
      yield Leaf(prefix + field.name, value, field.metadata.get('text'))


def override(raw: dict[str, Value], edit: str, defaults: Section) -> None:
  """Sets one field of nested dicts.

  Args:
    raw: the dicts to edit.
    edit: `path.to.field=text`.
    defaults: an instance of the outermost section.

  Raises:
    ConfigError: there is no such field, or the text is of another type.
  """
  path, equals, text = edit.partition('=')
  known = {leaf.path: leaf for leaf in leaves(defaults)}
  if path not in known:
    raise ConfigError(_unknown(path, known))
  if not equals:
    raise ConfigError(f'{path}: expected --config.{path}=VALUE')
  *sections, name = path.split('.')
  for section in sections:
    raw = raw[section]
  leaf = known[path]
  # `build` reads the text of a tuple, as it does in a config.json.
  raw[name] = text if leaf.text else _read(path, text, type(leaf.value))


def _read(path: str, text: str, kind: type) -> Value:
  """Converts a flag's text to `kind`."""
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


def build(cls: type, raw: object, prefix: str, known: Iterable[str]) -> Value:
  """Builds and checks an instance of the section `cls` from nested mappings.

  Args:
    cls: a section; its fields may be sections, too.
    raw: a mapping; missing fields get their defaults.
    prefix: the prefix of paths in messages, '' or such as 'optim.'.
    known: all paths, for suggestions.

  Raises:
    ConfigError: names the first invalid field and what is allowed.
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
    if isinstance(hints[name], type) and issubclass(hints[name], Section):
      values[name] = build(hints[name], raw[name], path + '.', known)
      continue
    value, text = raw[name], field.metadata.get('text')
    if text and isinstance(value, str):
      value = text.read(value)
    values[name] = _typed(path, value, hints[name])
    _check_bounds(path, values[name], field.metadata)
  made = cls(**values)
  made.check()
  return made


def _unknown(path: str, known: Iterable[str]) -> str:
  """The message about an unknown field, with the nearest known one."""
  known = list(known)
  near = difflib.get_close_matches(path, known, n=1)
  if not near:
    leaf = path.rsplit('.', 1)[-1]
    near = [name for name in known if name.rsplit('.', 1)[-1] == leaf][:1]
  hint = f'did you mean {near[0]}?' if near else 'see covenant/config/'
  return f'{path}: no such field; {hint}'


def _typed(path: str, value: Value, kind: Value) -> Value:
  """`value` as `kind`; an int may stand for a float, nothing else converts."""
  if typing.get_origin(kind) is tuple:
    return _tuple(path, value, typing.get_args(kind))
  if isinstance(kind, type) and issubclass(kind, Section):
    raw = vars(value) if isinstance(value, kind) else value
    fields = dataclasses.fields(typing.cast(Value, kind))
    known = [f'{path}.{field.name}' for field in fields]
    return build(kind, raw, f'{path}.', known)
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(
      f'{path}: expected {kind.__name__}, got {type(value).__name__} {value!r}'
    )
  return value


def _tuple(
  path: str, value: object, kinds: tuple[Value, ...]
) -> tuple[Value, ...]:
  """A tuple of the given types; `(kind, ...)` stands for any length."""
  endless = kinds[-1] is Ellipsis
  if not isinstance(value, list | tuple):
    expected = 'a tuple' if endless else f'{len(kinds)} numbers'
    raise ConfigError(f'{path}: expected {expected}, got {value!r}')
  if endless:
    return tuple(
      _typed(f'{path}[{i}]', element, kinds[0])
      for i, element in enumerate(value)
    )
  if len(value) != len(kinds):
    raise ConfigError(f'{path}: expected {len(kinds)} numbers, got {value!r}')
  return tuple(_typed(path, v, k) for v, k in zip(value, kinds, strict=True))


def _check_bounds(path: str, value: Value, bounds: Mapping[str, Value]) -> None:
  choices = bounds.get('choices')
  is_plugin = bounds.get('plugin') and plugins.is_reference(value)
  if choices is not None and value not in choices and not is_plugin:
    other = " or 'file.py:attribute'" if bounds.get('plugin') else ''
    raise ConfigError(
      f'{path}: expected one of {choices}{other}, got {value!r}'
    )
  low, high = bounds.get('low'), bounds.get('high')
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f'{path}: expected a finite number, got {value!r}')
  if low is not None and value < low:
    least = 'more than 0' if low == _TINY else f'at least {low}'
    raise ConfigError(f'{path}: expected {least}, got {value!r}')
  if high is not None and value > high:
    raise ConfigError(f'{path}: expected at most {high}, got {value!r}')
