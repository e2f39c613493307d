"""Messages across a named mesh axis: what `jax.shard_map` and `vmap` need."""

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
  """
  messages = [message]
  if axis_name is not None:
    gathered = jax.lax.all_gather(message, axis_name)
    messages = [
      jax.tree.map(lambda x, r=r: x[r], gathered)
      for r in range(jax.lax.axis_size(axis_name))
    ]
  return aggregate_lib.aggregate(messages, like, compression, mean_over, clip)


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
