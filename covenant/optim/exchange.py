"""Messages across a named mesh axis: what `jax.shard_map` and `vmap` need.

Two kinds of axes occur. Along `axis_name` live the peers. Along any other one
a peer's tensors may be sharded (FSDP, tensor parallelism), as their types say;
what `on_shards` runs sees one shard of each.
"""

from collections.abc import Callable
from typing import Any

import jax

from covenant.optim import aggregate as aggregate_lib
from covenant.optim import compression as compression_lib


def exchange(
  message: Any,
  like: Any,
  compression: compression_lib.Compression,
  axis_name: str | None,
  mean_over: str = 'senders',
  clip: str = 'median',
  shards: Any = None,
) -> Any:
  """The aggregate of all peers' messages along an axis.

  Only the message crosses it, by one all-gather a leaf.

  Args:
    message: this peer's.
    like: the parameters, or their shapes.
    compression: what made the message.
    axis_name: where the peers are; None for a single peer.
    mean_over: see `aggregate`.
    clip: see `aggregate`.
    shards: see `aggregate`.
  """
  messages = [message]
  if axis_name is not None:
    gathered = jax.lax.all_gather(message, axis_name)
    messages = [
      jax.tree.map(lambda x, r=r: x[r], gathered)
      for r in range(jax.lax.axis_size(axis_name))
    ]
  return aggregate_lib.aggregate(
    messages, like, compression, mean_over, clip, shards
  )


def shard_axes(x: jax.Array, axis_name: str | None) -> tuple[str, ...]:
  """The axes along which `x`, of one peer, is sharded, sorted.

  By its type: the explicit axes of its sharding and, inside `jax.shard_map`,
  the axes along which it varies.
  """
  kind = jax.typeof(x)
  return tuple(
    sorted(_explicit(x) | kind.manual_axis_type.varying - {axis_name})
  )


def on_shards(
  f: Callable[..., tuple[Any, ...]],
  trees: tuple[Any, ...],
  axis_name: str | None,
) -> tuple[Any, ...]:
  """`f(*trees)`, where f sees and gives one shard of every leaf.

  Args:
    f: gives `trees`, sharded as they came, and then values that are the same
      on all shards. It may use `axis_name`, and the axes that its arguments
      are sharded on.
    trees: pytrees of arrays. Without explicit sharding, f is just called.
    axis_name: where the peers are.
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
  """The explicit mesh axes that `x` is sharded on."""
  axes = set()
  for entry in jax.typeof(x).sharding.spec:
    if entry is not None:
      axes.update((entry,) if isinstance(entry, str) else entry)
  return frozenset(axes)


def varying(tree: Any, axis_name: str | None) -> Any:
  """Types every leaf as its peer's own, inside `jax.shard_map`.

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
