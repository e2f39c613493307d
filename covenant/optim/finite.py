"""Numbers that are not finite: a step does not take them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from covenant import typing as ct


def step(
  updates: ct.Grads, params: ct.Params, new: ct.OptState, old: ct.OptState
) -> tuple[ct.Grads, ct.OptState, jax.Array]:
  """Returns a step without what is not finite, and whether it lost something.

  Args:
    updates: the step; an element that would make its parameter infinite or NaN
      becomes zero, and a type narrower than the parameter's becomes that one.
    params: the parameters before the step.
    new: the state of the optimizer; numbers that are not finite stay `old`.
    old: the state before the step.
  """
  updates = jax.tree.map(_as_wide, updates, params)
  moved = jax.tree.leaves(optax.apply_updates(params, updates))
  leaves, treedef = jax.tree.flatten(updates)
  finite = [jnp.isfinite(x) for x in moved]
  flags = [jnp.all(x) for x in _masks(finite)]
  updates = treedef.unflatten(
    [
      jax.lax.select(x, u, jnp.zeros_like(u))
      for u, x in zip(leaves, finite, strict=True)
    ]
  )
  lost = ~jnp.all(jnp.stack([jnp.array(True), *flags]))
  return updates, jax.tree.map(_finite_or, new, old), lost


def _masks(finite: list[jax.Array]) -> list[jax.Array]:
  """Returns where all leaves of a shape are finite.

  A reduction of every leaf would be most of what XLA compiles here. Where a
  mesh has automatic axes, or may have, leaves of one shape may lie differently,
  and stay apart.
  """
  mesh = jax.sharding.get_abstract_mesh()
  together = mesh.axis_names and set(mesh.axis_names) == set(mesh.manual_axes)
  masks: dict[Any, jax.Array] = {}
  for i, x in enumerate(finite):
    key = jnp.shape(x) if together else i
    masks[key] = masks[key] & x if key in masks else x
  return list(masks.values())


def _as_wide(update: Any, param: Any) -> Any:
  """Returns an update that can lead to every value of its parameter."""
  update, param = jnp.asarray(update), jnp.asarray(param)
  is_float = jnp.issubdtype(param.dtype, jnp.floating)
  if is_float and update.dtype.itemsize < param.dtype.itemsize:
    return update.astype(param.dtype)
  return update


def _finite_or(new: Any, old: Any) -> Any:
  if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
    return new
  new = jnp.asarray(new)
  old = jnp.asarray(old, new.dtype)
  return jax.lax.select(jnp.isfinite(new), new, old)
