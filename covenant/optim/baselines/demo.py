"""DeMo (arXiv 2411.19870): peers keep their momentum and send its peaks.

One step of peer r, with beta = `error_decay`:

  e_r    = beta * e_r + lr * gradient_r
  sent_r = the 32 largest DCT coefficients of each 64 x 64 block of e_r
  e_r    = e_r - iDCT(sent_r)
  theta  = theta - lr * sign(iDCT(mean_r sent_r))

The mean of a coefficient is over the peers that sent it. This is SparseLoCo's
exchange after every gradient, with the residual as the momentum and the sign
as the outer optimizer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import typing as ct
from covenant.optim import arguments
from covenant.optim import collectives
from covenant.optim import compression as compression_lib
from covenant.optim import exchange
from covenant.optim import quantize
from covenant.optim import sparseloco
from covenant.optim import topk_variants
from covenant.optim import weight as weight_lib

Compression = compression_lib.Compression


class DemoState(NamedTuple):
  """The state of one peer; peers share only the count."""

  count: jax.Array  # shape=(), dtype=jnp.int32: updates so far
  error: (
    ct.Params
  )  # the decoupled momentum, float32, shaped like the parameters


def demo(
  learning_rate: optax.ScalarOrSchedule = 1e-3,
  *,
  compression: Compression | None = None,
  error_decay: float = 0.999,
  axis_name: ct.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns DeMo as an optax transformation with the defaults of its source.

  Only the message crosses `axis_name` (an all-gather), every step. All peers
  get the same updates, so equal parameters stay equal.

  Where the parameters' types say how they are sharded, every shard compresses
  itself, as in `sparseloco`: blocks are cut, and transformed, in the shard.

  The default compression keeps one density in all blocks. The source cuts as
  `DCTTopK(layout='divisors')` does, and so sends half of a vector.

  Args:
    learning_rate: the rate of the accumulator and of the signed step; a
      number, or a function of the count of updates.
    compression: `DCTTopK(k=32, quantizer=Exact())` if omitted.
    error_decay: beta.
    axis_name: the named axis of `jax.shard_map` or `jax.vmap` along which the
      peers live; None for a single peer.

  Returns:
    A transformation whose updates are -lr, 0 or lr, in the gradient's dtype.
    Its `update` takes the `weight` of `sparseloco.sparseloco`.

  Raises:
    ValueError, TypeError: an argument is not what it should be; says which.

  Example:
    >>> tx = demo(0.5)
    >>> gradient = jnp.array([3.0, 1.0])
    >>> updates, state = tx.update(gradient, tx.init(gradient))
    >>> print(updates)  # of two coefficients one is sent: the mean
    [-0.5 -0.5]
    >>> print(state.error.round(3))  # the difference waits
    [ 0.5 -0.5]
  """
  arguments.check_number('error_decay', error_decay, 0, 1)
  arguments.check_axis_name(axis_name)
  if not callable(learning_rate):
    arguments.check_number(
      'learning_rate', learning_rate, 0, more='or schedule'
    )
  if compression is None:
    compression = topk_variants.DCTTopK(k=32, quantizer=quantize.Exact())
  compression_lib.check(compression)

  def init(params: ct.Params) -> DemoState:
    arguments.check_params(params)
    # Typed as after an update, which a scan in `jax.shard_map` insists on.
    error = collectives.varying(sparseloco.init_error(params), axis_name)
    return DemoState(jnp.zeros((), jnp.int32), error)

  def transmit(
    delta: ct.Delta, error: ct.Params, parts: jax.Array, shards: ct.PyTree
  ) -> tuple[ct.PyTree, ...]:
    # Without clipping; the mean is that of coefficients, transformed later.
    rules = exchange.Rules(axis_name, error_decay, 'senders', 'none')
    compressions = compression_lib.each_leaf(compression, delta)
    done = exchange.exchange(delta, error, parts, compressions, rules, shards)
    return done.delta, done.error, ()

  def update(
    updates: ct.Grads,
    state: ct.PyTree,
    params: ct.Params | None = None,
    weight: ct.Scalar = None,
    **extra_args: object,
  ) -> tuple[ct.Grads, DemoState]:
    del params, extra_args
    arguments.check_state(state, DemoState)
    arguments.check_trees(state.error, updates=updates)
    arguments.check_axes(updates, axis_name)
    parts = collectives.varying(weight_lib.parts_of(weight), axis_name)
    rate = learning_rate
    if callable(rate):
      rate = rate(state.count)
    rate = jnp.asarray(rate, jnp.float32)
    delta = jax.tree.map(lambda g: rate * g.astype(jnp.float32), updates)
    shards = [
      collectives.shard_axes(x, axis_name) for x in jax.tree.leaves(delta)
    ]
    mean, error, _ = collectives.on_shards(
      functools.partial(transmit, shards=shards),
      (delta, state.error),
      axis_name,
      (parts,),
    )
    updates = jax.tree.map(
      lambda m, g: (-rate * jnp.sign(m)).astype(g.dtype), mean, updates
    )
    return updates, DemoState(state.count + 1, error)

  return optax.GradientTransformationExtraArgs(init, update)


def signed(
  schedule: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
  """Returns the nodes' outer step: theta -= lr * (sign(delta) + decay * theta).

  The momentum of nodes sums plain gradients; `demo`, like its source, weights
  each by the rate of its step. At a constant rate both take equal steps.
  """
  return optax.chain(
    optax.stateless(lambda delta, _: jax.tree.map(jnp.sign, delta)),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_schedule(schedule),
    optax.scale(-1.0),
  )
