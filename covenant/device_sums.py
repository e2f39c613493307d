"""Sums over the devices of mesh axes, for functions in `jax.shard_map`.

The devices of one CPU process are summed in their order, x0 + x1 + x2. Gloo,
which connects CPU processes, has orders of its own, and so other bits. There
the parts are gathered, and added here in the order of the devices: the number
of processes changes no bits. Accelerators sum by their own libraries.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from covenant import typing as ct


def psum(tree: ct.PyTree, axes: str | Sequence[str]) -> ct.PyTree:
  """Returns the sum of every leaf over mesh axes."""
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  if not _is_ordered_here():
    return jax.lax.psum(tree, axes)

  def one(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      return jax.lax.psum(x, axes)
    if _varies(x, axes):
      parts = jax.lax.all_gather(x, axes, to='invarying')
    else:  # types are not checked here
      parts = jax.lax.all_gather(x, axes)
    return _added(parts)

  return jax.tree.map(one, tree)


def psum_scatter(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
  """Returns this device's part of a sum, cut along an axis of the array."""
  if not _is_ordered_here():
    return jax.lax.psum_scatter(
      x, axis_name, scatter_dimension=axis, tiled=True
    )
  n = jax.lax.axis_size(axis_name)
  x = x.reshape(*x.shape[:axis], n, -1, *x.shape[axis + 1 :])
  parts = jax.lax.all_to_all(x, axis_name, axis, axis, tiled=True)
  return _added(jnp.moveaxis(parts, axis, 0))


def pmean(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Returns the mean of an array over mesh axes."""
  if not _is_ordered_here():
    return jax.lax.pmean(x, tuple(axes))
  return psum(x, axes) / jax.lax.axis_size(tuple(axes))


def all_gather(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
  """Concatenates the arrays of devices; its gradient is a `psum_scatter`."""
  if _is_ordered_here():
    return _all_gather(x, axis_name, axis)
  return jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Casts an array to each device's own; its gradient is a `psum`."""
  if _is_ordered_here():
    return _vary(x, axes)
  return jax.lax.pcast(x, axes, to='varying')


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
  return jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _gather_forward(
  x: jax.Array, axis_name: str, axis: int
) -> tuple[jax.Array, None]:
  return _all_gather(x, axis_name, axis), None


def _gather_backward(
  axis_name: str, axis: int, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
  return (psum_scatter(gradient, axis_name, axis),)


_all_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  return jax.lax.pcast(x, axes, to='varying')


def _vary_forward(
  x: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, None]:
  return _vary(x, axes), None


def _vary_backward(
  axes: tuple[str, ...], _: None, gradient: jax.Array
) -> tuple[jax.Array]:
  return (psum(gradient, axes),)


_vary.defvjp(_vary_forward, _vary_backward)


def _is_ordered_here() -> bool:
  return jax.process_count() > 1 and jax.default_backend() == 'cpu'


def _varies(x: jax.Array, axes: tuple[str, ...]) -> bool:
  return set(axes) <= set(jax.typeof(x).manual_axis_type.varying)


def _added(parts: jax.Array) -> jax.Array:
  return functools.reduce(operator.add, list(parts))
