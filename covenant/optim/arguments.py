"""Checks of the arguments of a transformation, at construction and in `update`.

What `optax.inject_hyperparams` gives instead of numbers are arrays, whose
values are not checked.
"""

from typing import Any

import jax
import numpy as np

from covenant import typing as ct


def check(
  inner: Any,
  outer: Any,
  inner_steps: Any,
  error_decay: Any,
  axis_name: Any,
) -> None:
  """Raises for arguments of `sparseloco`; `inject_hyperparams` gives arrays."""
  for name, tx in ('inner', inner), ('outer', outer):
    known = hasattr(tx, 'init') and hasattr(tx, 'update')
    if not (name == 'outer' and tx is None) and (
      isinstance(tx, type) or not known
    ):
      raise TypeError(
        f'{name}: expected an optax transformation, such as optax.adamw(3e-4), '
        f'got {tx!r}'
      )
  if not isinstance(inner_steps, jax.Array | np.ndarray):
    if not _is_number(inner_steps, int | np.integer):
      raise TypeError(f'inner_steps: expected an integer, got {inner_steps!r}')
    if inner_steps < 1:
      raise ValueError(f'inner_steps: expected at least 1, got {inner_steps}')
  if not isinstance(error_decay, jax.Array | np.ndarray | None):
    if not _is_number(error_decay, int | float | np.number):
      raise TypeError(
        f'error_decay: expected a number or None, got {error_decay!r}'
      )
    if not 0 <= error_decay <= 1:
      raise ValueError(f'error_decay: expected 0 to 1, got {error_decay}')
  names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
  if axis_name is not None and not (
    names and all(isinstance(name, str) for name in names)
  ):
    raise TypeError(
      "axis_name: expected a name such as 'peers', a tuple of names, or None, "
      f'got {axis_name!r}'
    )


def _is_number(x: Any, kinds: Any) -> bool:
  return isinstance(x, kinds) and not isinstance(x, bool)


def check_axes(params: ct.Params, axis_name: ct.AxisName) -> None:
  """Raises ValueError for axes that are not there, or not named."""
  if axis_name is not None:
    try:
      jax.lax.axis_size(axis_name)
    except NameError:
      manual = jax.sharding.get_abstract_mesh().manual_axes
      raise ValueError(
        f'axis_name: there is no axis {axis_name!r} here; expected a named '
        f'axis of jax.vmap or jax.shard_map (of the latter: {manual})'
      ) from None
    return
  axes = sorted(
    {a for x in jax.tree.leaves(params)
     for a in jax.typeof(x).manual_axis_type.varying}
  )  # fmt: skip
  if axes:
    raise ValueError(
      f'axis_name: the parameters vary along the mesh axes {axes}, and '
      'axis_name is None; name the axis along which the peers live'
    )


def check_trees(
  updates: ct.Grads, params: ct.Params, anchor: ct.Params
) -> None:
  """Raises ValueError unless gradients, parameters and state fit together."""
  wanted = jax.tree.structure(params)
  for name, tree in ('updates', updates), ('state', anchor):
    found = jax.tree.structure(tree)
    if found != wanted:
      raise ValueError(
        f'{name}: expected a tree like that of params, {wanted}, got {found}'
      )
