"""The difference of two trees of arrays, in words."""

import jax

from covenant import typing as ct


def difference(stored: ct.PyTree, abstract: ct.PyTree) -> str:
  """Returns the first difference of two trees, in words; empty if none."""
  there, here = _by_name(stored), _by_name(abstract)
  for name in sorted(there.keys() | here.keys()):
    if here.get(name) is ...:
      continue
    is_there, is_here = (_form(leaves, name) for leaves in (there, here))
    if is_there != is_here:
      return f'{name} is {is_there} there, {is_here} here'
  return ''


def _by_name(tree: ct.PyTree) -> dict[str, ct.PyTree]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _form(leaves: dict[str, ct.PyTree], name: str) -> str:
  if name not in leaves:
    return 'missing'
  x = leaves[name]
  return f'{x.dtype}{list(x.shape)}' if hasattr(x, 'shape') else 'text'
