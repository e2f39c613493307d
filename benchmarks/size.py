"""Prints how large and how readable the package is, beside its targets.

python -m benchmarks.size               # a Markdown table
python -m benchmarks.size --write       # the same, into docs/architecture.md
python -m benchmarks.size --find covenant/emulate    # what misses a target

Lines are those of `wc -l`, with comments and docstrings; a module is a file
other than `__init__.py`.
"""

import argparse
import ast
import dataclasses
import pathlib
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from covenant import config as config_lib

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGE = _ROOT / 'docs' / 'architecture.md'
_BEGIN, _END = '<!-- size: begin -->', '<!-- size: end -->'
_TRAINING_STEP = 'covenant.train.replica'
_MODULE_LINES = 400
_FUNCTION_LINES = 60
# A first word that makes a docstring a clause, where a sentence is expected.
_CLAUSES = frozenset(
  ('What', 'Who', 'Whose', 'Of', 'As', 'Whether', 'Where', 'Which', 'How')
  + ('That',)
)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Size:
  """The measurements of a package."""

  lines: int
  module_lines: dict[str, int]  # by path
  function_lines: dict[str, int]  # by path:line name
  anys: list[str]  # path:line of every use of typing.Any
  docstrings: int
  clauses: list[str]  # path:line and first line of a docstring
  closure: list[str]  # modules that the training step imports
  closure_lines: int

  @property
  def long_modules(self) -> list[str]:
    return _longer(self.module_lines, _MODULE_LINES)

  @property
  def long_functions(self) -> list[str]:
    return _longer(self.function_lines, _FUNCTION_LINES)


class Row(NamedTuple):
  """A line of the table."""

  name: str
  value: str
  target: str
  met: bool


def measure(
  root: pathlib.Path, folder: str = 'covenant', entry: str = _TRAINING_STEP
) -> Size:
  """Measures the Python files of a folder.

  Args:
    root: the folder that imports are relative to.
    folder: the package, or one of its folders, relative to `root`.
    entry: the module whose import closure is measured.
  """
  lines, anys, docstrings, clauses = 0, [], 0, []
  module_lines: dict[str, int] = {}
  function_lines: dict[str, int] = {}
  base = root / folder
  for path in sorted(base.rglob('*.py')) if base.is_dir() else [base]:
    name = str(path.relative_to(root))
    text = path.read_text(encoding='utf-8')
    lines += text.count('\n')
    if path.name != '__init__.py':
      module_lines[name] = text.count('\n')
    for node in _in_order(ast.parse(text)):
      if isinstance(node, _Definition):
        span = (node.end_lineno or 0) - node.lineno + 1
        function_lines[f'{name}:{node.lineno} {node.name}'] = span
      line = getattr(node, 'lineno', 1)
      if _is_any(node):
        anys.append(f'{name}:{line}')
      if isinstance(node, ast.Module | ast.ClassDef | _Definition):
        docstring = ast.get_docstring(node) or ''
        docstrings += bool(docstring)
        if docstring and docstring.split()[0] in _CLAUSES:
          clauses.append(f'{name}:{line} {docstring.splitlines()[0]}')
  files = closure(root, entry)
  return Size(
    lines,
    module_lines,
    function_lines,
    anys,
    docstrings,
    clauses,
    [module for module, path in files.items() if path.name != '__init__.py'],
    sum(p.read_text(encoding='utf-8').count('\n') for p in files.values()),
  )


def closure(root: pathlib.Path, entry: str) -> dict[str, pathlib.Path]:
  """Returns the files of ours that importing a module reads, by module.

  Imports inside functions count, and so do the packages around a module; those
  for type checkers do not.
  """
  found: dict[str, pathlib.Path] = {}
  waiting = [entry]
  while waiting:
    module = waiting.pop()
    path = _file(root, module)
    if module in found or path is None:
      continue
    found[module] = path
    if '.' in module:
      waiting.append(module.rpartition('.')[0])
    tree = ast.parse(path.read_text(encoding='utf-8'))
    tree.body = [node for node in tree.body if not _is_for_types(node)]
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        waiting += [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.module:
        waiting.append(node.module)
        waiting += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


def _is_for_types(node: ast.stmt) -> bool:
  """Returns True for `if TYPE_CHECKING:`."""
  return isinstance(node, ast.If) and ast.unparse(node.test).endswith(
    'TYPE_CHECKING'
  )


def table(size: Size, config_fields: int) -> list[Row]:
  """Returns the lines of the table."""
  values = list(size.module_lines.values())
  functions = len(size.function_lines)
  return [
    _row('package lines', size.lines, 29_500),
    _row('modules', len(values), 125),
    _row('lines per module, median', round(statistics.median(values))),
    Row(
      'lines per module, most',
      str(max(values)),
      f'at most {_MODULE_LINES}',
      max(values) <= _MODULE_LINES,
    ),
    _share(
      f'functions over {_FUNCTION_LINES} lines',
      len(size.long_functions),
      functions,
    ),
    _row('uses of `Any`', len(size.anys), 300),
    _share(
      'docstrings that begin with a clause', len(size.clauses), size.docstrings
    ),
    _row('config fields', config_fields),
    _row('modules that one training step imports', len(size.closure)),
    _row('lines that one training step imports', size.closure_lines, 6_000),
  ]


def markdown(rows: list[Row]) -> str:
  """Returns the table as Markdown.

  >>> print(markdown([Row('modules', '130', 'below 125', False)]))
  | measure | value | target | |
  | --- | ---: | ---: | --- |
  | modules | 130 | below 125 | missed |
  """
  lines = ['| measure | value | target | |', '| --- | ---: | ---: | --- |']
  for row in rows:
    verdict = ('met' if row.met else 'missed') if row.target else ''
    cells = f'{row.name} | {row.value} | {row.target} | {verdict}'.rstrip()
    lines.append(f'| {cells} |')
  return '\n'.join(lines)


def write(page: pathlib.Path, text: str) -> None:
  """Replaces what stands between the markers of a page.

  Raises:
    ValueError: the page does not have both markers, in order.
  """
  before, begin, rest = page.read_text(encoding='utf-8').partition(_BEGIN)
  _, end, after = rest.partition(_END)
  if not (begin and end):
    raise ValueError(f'{page}: expected the markers {_BEGIN} and {_END}')
  page.write_text(f'{before}{begin}\n{text}\n{end}{after}', encoding='utf-8')


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--write', action='store_true', help=f'into {_PAGE.relative_to(_ROOT)}'
  )
  parser.add_argument(
    '--find', metavar='PATH', help='list what misses a target in PATH'
  )
  chosen = parser.parse_args(arguments)
  if chosen.find:
    size = measure(_ROOT, chosen.find.rstrip('/'))
    for name, found in (
      (f'modules over {_MODULE_LINES} lines', size.long_modules),
      (f'functions over {_FUNCTION_LINES} lines', size.long_functions),
      ('uses of Any', size.anys),
      ('docstrings that begin with a clause', size.clauses),
    ):
      print(f'{name}: {len(found)}', *found, sep='\n  ')
    return
  fields = len(config_lib.flatten(config_lib.Config()))
  text = markdown(table(measure(_ROOT), fields))
  print(text)
  if chosen.write:
    write(_PAGE, text)


def _row(name: str, value: int, below: int | None = None) -> Row:
  if below is None:
    return Row(name, f'{value:,}', '', True)
  return Row(name, f'{value:,}', f'below {below:,}', value < below)


def _share(name: str, count: int, total: int, percent: float = 1.0) -> Row:
  share = 100 * count / max(total, 1)
  value = f'{share:.1f} % ({count:,} of {total:,})'
  return Row(name, value, f'at most {percent:g} %', share <= percent)


def _longer(lines: dict[str, int], most: int) -> list[str]:
  long = [(count, name) for name, count in lines.items() if count > most]
  return [f'{name}: {count} lines' for count, name in sorted(long)[::-1]]


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
  """Yields a syntax tree from its first line to its last."""
  yield node
  for child in ast.iter_child_nodes(node):
    yield from _in_order(child)


def _is_any(node: ast.AST) -> bool:
  if isinstance(node, ast.Attribute):
    return node.attr == 'Any'
  return isinstance(node, ast.Name) and node.id == 'Any'


def _file(root: pathlib.Path, module: str) -> pathlib.Path | None:
  """Returns the file of a module below `root`; None if there is none."""
  path = root.joinpath(*module.split('.'))
  for candidate in (path.with_name(f'{path.name}.py'), path / '__init__.py'):
    if candidate.is_file():
      return candidate
  return None


if __name__ == '__main__':
  main()
