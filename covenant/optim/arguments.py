"""Checks of the arguments of a transformation, at construction and in `update`.

`optax.inject_hyperparams` gives arrays instead of numbers. Their values are
checked unless they are traced.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct


def check(
  inner: Any,
  outer: Any,
  inner_steps: Any,
  error_decay: Any,
  axis_name: Any,
) -> None:
  """Raises for arguments that `sparseloco` cannot use."""
  check_transformation('inner', inner)
  if outer is not None:
    check_transformation('outer', outer)
  # A schedule may lie between two integers.
  check_count('inner_steps', inner_steps, scheduled=True)
  if error_decay is not None:
    check_number('error_decay', error_decay, 0, 1, 'or None')
  check_axis_name(axis_name)


def check_transformation(name: str, tx: Any) -> None:
  """Raises TypeError unless `tx` is an optax transformation."""
  methods = getattr(tx, 'init', None), getattr(tx, 'update', None)
  if isinstance(tx, type) or not all(map(callable, methods)):
    raise TypeError(
      f'{name}: expected an optax transformation, such as optax.adamw(3e-4), '
      f'got {tx!r}'
    )


def check_number(
  name: str, x: Any, low: float, high: float = math.inf, more: str = ''
) -> None:
  """Raises unless `x` is a finite number from `low` to `high`."""
  if _is_traced(x):
    return
  found = _known(x)
  if not isinstance(found, int | float) or isinstance(found, bool):
    wanted = f'a number {more}'.rstrip()
    raise TypeError(f'{name}: expected {wanted}, got {x!r}')
  if not low <= found <= high or found == math.inf:
    allowed = f'{low} or more' if high == math.inf else f'{low} to {high}'
    raise ValueError(f'{name}: expected {allowed}, got {found}')


def check_count(
  name: str, x: Any, low: int = 1, high: int | None = None,
  scheduled: bool = False,
) -> None:  # fmt: skip
  """Raises unless `x` is an integer from `low` to `high`.

  Args:
    name: that of the argument.
    x: a number or an array of one.
    low: the least that is allowed.
    high: the most that is allowed, if there is such.
    scheduled: whether a JAX array may lie between two integers, or be traced.
  """
  if scheduled and _is_traced(x):
    return
  kinds = int | float if scheduled and isinstance(x, jax.Array) else int
  found = _known(x)
  if not isinstance(found, kinds) or isinstance(found, bool):
    raise TypeError(f'{name}: expected an integer, got {x!r}')
  if not low <= found or (high is not None and found > high):
    allowed = f'at least {low}' if high is None else f'{low} to {high}'
    raise ValueError(f'{name}: expected {allowed}, got {found}')


def _is_traced(x: Any) -> bool:
  return isinstance(x, jax.core.Tracer) and x.shape == ()


def _known(x: Any) -> Any:
  """Returns the number in an array of one; others as they are."""
  is_array = isinstance(x, jax.Array | np.ndarray | np.number)
  if not is_array or x.shape or isinstance(x, jax.core.Tracer):
    return x
  return x.item()


def check_axis_name(axis_name: Any) -> None:
  """Raises TypeError unless `axis_name` is a name, a tuple of names or None."""
  if axis_name is None:
    return
  names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
  if (
    not names
    or not all(isinstance(name, str) and name for name in names)
    or len(set(names)) < len(names)
  ):
    raise TypeError(
      "axis_name: expected a name such as 'peers', a tuple of different names, "
      f'or None, got {axis_name!r}'
    )


def float_type(name: str, dtype: Any) -> Any:
  """Returns the type of floats that `dtype` names; None of None."""
  if dtype is None:
    return None
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or not jnp.issubdtype(found, jnp.floating):
    raise TypeError(
      f"{name}: expected a type of floats such as 'float32', or None, got "
      f'{dtype!r}'
    )
  if jax.dtypes.canonicalize_dtype(found) != found:
    raise ValueError(f'{name}: {found} needs the option jax_enable_x64')
  return found


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


def check_params(params: ct.Params) -> None:
  """Raises TypeError for complex parameters, naming the leaf."""
  for path, x in jax.tree.leaves_with_path(params):
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
      raise TypeError(
        f'params{jax.tree_util.keystr(path)}: expected real numbers, got '
        f'{jnp.result_type(x)}; optax.contrib.split_real_and_imaginary makes '
        'two real leaves of it'
      )


def check_state(state: Any, kind: type) -> None:
  """Raises TypeError unless `state` is what `init` returns."""
  if not isinstance(state, kind):
    raise TypeError(
      f'state: expected the {kind.__name__} of init, got '
      f'{jax.tree.structure(state)}'
    )


def check_trees(params: ct.Params, **trees: ct.PyTree) -> None:
  """Raises ValueError for trees that do not fit to `params`, by their names."""
  wanted = jax.tree.structure(params)
  for name, tree in trees.items():
    found = jax.tree.structure(tree)
    if found != wanted:
      raise ValueError(
        f'{name}: expected a tree like that of params, {wanted}, got {found}'
      )
    for (path, x), like in zip(
      jax.tree.leaves_with_path(tree), jax.tree.leaves(params), strict=True
    ):
      if jnp.shape(x) != jnp.shape(like):
        raise ValueError(
          f'{name}{jax.tree_util.keystr(path)}: expected the shape of the '
          f'parameter, {jnp.shape(like)}, got {jnp.shape(x)}'
        )


def where_given(updates: ct.Grads, params: ct.Params) -> ct.Params:
  """Returns `params` with None where `updates` has None.

  A model of Equinox has leaves that are no arrays, and no gradients of these.
  """
  is_none = lambda x: x is None  # noqa: E731
  if not any(map(is_none, jax.tree.leaves(updates, is_leaf=is_none))):
    return params
  try:
    return jax.tree.map(
      lambda u, p: None if u is None else p, updates, params, is_leaf=is_none
    )
  except ValueError:  # said by `check_trees`
    return params
