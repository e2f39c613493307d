"""The collectives across named mesh axes, in `jax.shard_map` and `jax.vmap`.

Two kinds of axes occur. Peers live along `axis_name`. A peer's tensors may be
sharded along other axes (FSDP, tensor parallelism), as their types say; a
function that `on_shards` runs sees one shard of each tensor.
"""

from collections.abc import Callable

import jax

from covenant import typing as ct


def gather(message: ct.Message, axis_name: str | None) -> list[ct.Message]:
  """Returns all peers' messages along an axis, by one all-gather per leaf.

  Args:
    message: this peer's.
    axis_name: the axis of the peers; None for a single peer.
  """
  if axis_name is None:
    return [message]
  gathered = jax.lax.all_gather(message, axis_name)
  return [
    jax.tree.map(lambda x, r=r: x[r], gathered)
    for r in range(jax.lax.axis_size(axis_name))
  ]


def sum_over(tree: ct.PyTree, axes: tuple[str, ...]) -> ct.PyTree:
  """Returns the sum of every leaf over the shards along mesh axes, if any."""
  return jax.lax.psum(tree, axes) if axes else tree


def shard_axes(x: jax.Array, axis_name: str | None) -> tuple[str, ...]:
  """Returns the axes along which `x`, of one peer, is sharded, sorted.

  They follow from its type: the explicit axes of its sharding and, inside
  `jax.shard_map`, the axes along which it varies.
  """
  kind = jax.typeof(x)
  return tuple(
    sorted(_explicit(x) | kind.manual_axis_type.varying - {axis_name})
  )


def on_shards(
  f: Callable[..., tuple[ct.PyTree, ...]],
  trees: tuple[ct.PyTree, ...],
  axis_name: str | None,
) -> tuple[ct.PyTree, ...]:
  """Returns `f(*trees)`, where f takes and returns one shard of every leaf.

  Args:
    f: returns `trees`, sharded as they came, then values that are the same on
      all shards. It may use `axis_name`, and the axes that its arguments are
      sharded on.
    trees: pytrees of arrays. Without explicit sharding, f is just called.
    axis_name: the axis of the peers.
  """
  leaves = jax.tree.leaves(trees)
  axes = frozenset().union(*map(_explicit, leaves))
  if not axes:
    return f(*trees)
  mesh = next(jax.typeof(x).sharding.mesh for x in leaves if _explicit(x))
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, trees)
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return jax.shard_map(
    f,
    mesh=mesh,
    in_specs=specs,
    out_specs=(*specs, jax.P()),
    axis_names=axes,
    # JAX cannot type a collective along an axis of `jax.vmap` in here.
    check_vma=axis_name is None or axis_name in manual,
  )(*trees)


def _explicit(x: jax.Array) -> frozenset[str]:
  """Returns the explicit mesh axes that `x` is sharded on."""
  axes = set()
  for entry in jax.typeof(x).sharding.spec:
    if entry is not None:
      axes.update((entry,) if isinstance(entry, str) else entry)
  return frozenset(axes)


def varying(tree: ct.PyTree, axis_name: str | None) -> ct.PyTree:
  """Types every leaf as varying over the peers, inside `jax.shard_map`.

  An exchanged value and a local one differ in type there, and the branches of
  `lax.cond` may not. `jax.vmap` types nothing.
  """
  if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
    return tree

  def cast(x: jax.Array) -> jax.Array:
    if axis_name in jax.typeof(x).manual_axis_type.varying:
      return x
    return jax.lax.pcast(x, axis_name, to='varying')

  return jax.tree.map(cast, tree)
