"""SPARTA: every step averages a few random parameters over the peers.

Peers exchange parameters, not gradients: a fraction p = 0.005 of them, the same
ones on all peers. It needs no error feedback: each parameter is averaged about
every 1 / p steps, however far it drifted. The code of the authors is EXO Gym.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import typing as ct
from covenant.optim import arguments
from covenant.optim import collectives
from covenant.optim import finite
from covenant.optim import weight as weight_lib


class SpartaState(NamedTuple):
  """The state of one peer; `count` is the same on every peer."""

  count: jax.Array  # shape=(), dtype=jnp.int32: updates so far
  inner: optax.OptState


def sparta(
  inner: optax.GradientTransformation,
  *,
  p: float = 0.005,
  axis_name: ct.AxisName = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Returns SPARTA as an optax transformation around a local optimizer.

  Every update applies `inner`, then sets max(1, round(p * size)) elements of
  each leaf to their mean over the peers. Only these values cross the axis.
  Peers begin equal or drift together; unlike after an exchange of SparseLoCo
  they are never all equal at once. Where the parameters' types say how they
  are sharded, every shard draws elements of its own.

  Args:
    inner: the local optimizer, such as `optax.adamw(3e-4)`, or `diloco(...)`.
    p: the fraction of the parameters that a step averages.
    axis_name: the named axis of `jax.shard_map` or `jax.vmap` along which the
      peers live; None for a single peer, whose updates are those of `inner`.
    seed: the seed of the choice of elements, equal on all peers.

  Returns:
    A transformation whose `update` needs `params`, and takes the `weight` of
    `sparseloco.sparseloco`.

  Raises:
    ValueError, TypeError: an argument is not what it should be; says which.
  """
  arguments.check_transformation('inner', inner)
  arguments.check_number('p', p, 0, 1)
  if p == 0:
    raise ValueError(f'p: expected more than 0 and at most 1, got {p}')
  arguments.check_count('seed', seed, 0)
  arguments.check_axis_name(axis_name)
  inner = optax.with_extra_args_support(inner)

  def init(params: ct.Params) -> SpartaState:
    arguments.check_params(params)
    return SpartaState(jnp.zeros((), jnp.int32), inner.init(params))

  def average(
    updates: ct.Grads,
    params: ct.Params,
    count: jax.Array,
    parts: jax.Array,
    shards: ct.PyTree,
  ) -> tuple[ct.PyTree, ...]:
    """Returns `updates` that lead to the mean at the chosen elements."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    leaves, treedef = jax.tree.flatten(updates)
    flat = [u.reshape(-1) for u in leaves]
    where, old, new = [], [], []
    axes = treedef.flatten_up_to(shards)
    for i, param in enumerate(treedef.flatten_up_to(params)):
      chosen = min(param.size, max(1, round(p * param.size)))
      key_of_leaf = jax.random.fold_in(key, i)
      if axes[i]:
        shard = jax.lax.axis_index(axes[i])
        key_of_leaf = jax.random.fold_in(key_of_leaf, shard)
      at = positions(key_of_leaf, param.size, chosen)
      where.append(at)
      old.append(param.reshape(-1)[at])
      new.append(optax.apply_updates(old[i], flat[i][at]))
    # One collective for all leaves. A mean of bfloat16 needs more bits.
    weight = weight_lib.wholes(parts)
    wide = [x.astype(jnp.float32) for x in new]
    total, *sums = jax.lax.psum(
      [weight, *(weight * x for x in wide)], axis_name
    )
    for i, u in enumerate(leaves):
      mean = jnp.where(total > 0, sums[i] / total, wide[i])
      to_mean = mean.astype(old[i].dtype) - old[i]
      flat[i] = (
        flat[i]
        .at[where[i]]
        .set(
          to_mean.astype(u.dtype), indices_are_sorted=True, unique_indices=True
        )
      )
    updates = treedef.unflatten(
      [x.reshape(u.shape) for x, u in zip(flat, leaves, strict=True)]
    )
    return updates, params, ()

  def update(
    updates: ct.Grads,
    state: ct.PyTree,
    params: ct.Params | None = None,
    weight: ct.Scalar = None,
    **extra_args: object,
  ) -> tuple[ct.Grads, SpartaState]:
    if params is None:
      raise ValueError('sparta: update needs params, got None')
    arguments.check_state(state, SpartaState)
    params = arguments.where_given(updates, params)
    arguments.check_trees(params, updates=updates)
    arguments.check_axes(params, axis_name)
    parts = weight_lib.parts_of(weight)
    updates, inner_state = inner.update(
      updates, state.inner, params, **extra_args
    )
    if axis_name is not None:
      updates, inner_state, _ = finite.step(
        updates, params, inner_state, state.inner
      )
      shards = jax.tree.map(
        lambda x: collectives.shard_axes(x, axis_name), params
      )
      updates, *_ = collectives.on_shards(
        functools.partial(average, shards=shards),
        (updates, params),
        axis_name,
        (state.count, parts),
      )
    return updates, SpartaState(state.count + 1, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def positions(key: jax.Array, size: int, count: int) -> jax.Array:
  """Draws `count` random positions below `size`: int32 [count], increasing.

  One position is drawn from each of `count` strata whose sizes differ by at
  most one. All elements have nearly the same chance, and no sort of a leaf is
  needed to avoid drawing one twice.

  >>> print(positions(jax.random.key(0), 4, 4))  # strata of one element
  [0 1 2 3]
  """
  whole, rest = divmod(size, max(count, 1))  # an empty leaf has none
  i = jnp.arange(count, dtype=jnp.int32)
  starts = i * whole + jnp.minimum(i, rest)
  widths = jnp.where(i < rest, whole + 1, whole)
  return starts + jax.random.randint(key, (count,), 0, widths)
