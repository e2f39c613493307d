"""DiLoCo (arXiv 2311.08105) and Streaming DiLoCo (arXiv 2501.18512).

DiLoCo is the round of SparseLoCo with nothing left out: the mean of the dense
deltas, without error feedback.

Streaming DiLoCo partitions the parameters into P fragments. Fragment p has its
own place in the round of H steps, offset_p = p * H // P, so that the link
carries a P-th at a time. The mean of the deltas of step t is applied at step
t + tau, while the peers train on. With alpha = `mixing`, after inner step t:

  if (t - offset_p) mod H == 0 and t > 0:          send
    delta_p = mean_r (anchor_p - theta_r,p)
  if s = t - tau > 0 and (s - offset_p) mod H == 0:  receive
    anchor_p  = outer(anchor_p, delta_p)
    theta_r,p = alpha * theta_r,p + (1 - alpha) * anchor_p

alpha is the share of the peer's own parameters: 0 replaces them, and the tau
steps since the message was sent with them; 1 keeps them. The anchor is what
all peers share: every delta is measured against it, at the time of sending.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import typing as ct
from covenant.optim import arguments
from covenant.optim import collectives
from covenant.optim import exchange
from covenant.optim import finite
from covenant.optim import sparseloco
from covenant.optim import weight as weight_lib


class Fragment(NamedTuple):
  """The shared state of a fragment: trees with None for other leaves."""

  anchor: ct.Params  # its shared parameters, exactly
  pending: ct.Params  # float32: the mean delta that was sent last
  outer: optax.OptState


class StreamingState(NamedTuple):
  """The state of one peer; all but `inner` is the same on every peer."""

  count: jax.Array  # shape=(), dtype=jnp.int32: inner updates so far
  fragments: tuple[Fragment, ...]
  inner: optax.OptState
  SHARED = 'count', 'fragments'  # see `sparseloco.state_axes`


def diloco(
  inner: optax.GradientTransformation,
  *,
  outer: optax.GradientTransformation | None = None,
  inner_steps: int = 500,
  axis_name: ct.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns DiLoCo as an optax transformation.

  The arguments are those of `sparseloco.sparseloco`; `outer` is Nesterov at
  (0.7, 0.9) if omitted, the paper's values.
  """
  return sparseloco.sparseloco(
    inner,
    outer=outer
    if outer is not None
    else sparseloco.nesterov(0.7, momentum=0.9),
    inner_steps=inner_steps,
    compression=sparseloco.Dense(),
    error_decay=None,
    axis_name=axis_name,
    mean_over='all',
    clip='none',
  )


def streaming_diloco(
  inner: optax.GradientTransformation,
  *,
  outer: optax.GradientTransformation | None = None,
  inner_steps: int = 100,
  fragments: int = 1,
  overlap: int = 0,
  mixing: float = 0.0,
  axis_name: ct.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns Streaming DiLoCo as an optax transformation.

  With `fragments=1`, `overlap=0` and `mixing=0.0`, the defaults, it is
  `diloco`. The deltas are dense float32 (the paper sends 4-bit floats).

  The mean is taken in the step that sends. As in other single-program versions
  only the arithmetic overlaps; XLA may hide the collective, no thread does.

  Args:
    inner: the local optimizer, such as `optax.adamw(3e-4)`.
    outer: descends the mean delta of each fragment, with a state for each;
      `nesterov(0.7, 0.9)` if omitted, DiLoCo's values.
    inner_steps: H, local updates between two messages of one fragment; the
      paper tried 30 and 100.
    fragments: P. Leaf i belongs to fragment i mod P: strided, as the paper
      prefers, but by leaf. Layers that a scan stacks in one leaf stay together.
    overlap: tau, steps from sending to applying, less than `inner_steps`.
    mixing: alpha, the share of a peer's own parameters, from 0 to 1.
    axis_name: the named axis of `jax.shard_map` or `jax.vmap` along which the
      peers live; None for a single peer.

  Returns:
    A transformation whose `update` needs `params`, and takes the `weight` of
    `sparseloco.sparseloco`: it counts where a fragment is sent.

  Raises:
    ValueError, TypeError: an argument is not what it should be; from `init`,
      there are fewer leaves than fragments.
  """
  arguments.check(inner, outer, inner_steps, None, axis_name)
  arguments.check_count('inner_steps', inner_steps)
  arguments.check_count('fragments', fragments)
  if fragments > inner_steps:
    raise ValueError(
      f'fragments: expected 1 to inner_steps = {inner_steps}, got {fragments}'
    )
  arguments.check_count('overlap', overlap, 0)
  if overlap >= inner_steps:
    raise ValueError(
      f'overlap: expected 0 to inner_steps - 1 = {inner_steps - 1}, '
      f'got {overlap}'
    )
  arguments.check_number('mixing', mixing, 0, 1)
  inner = optax.with_extra_args_support(inner)
  outer = outer if outer is not None else sparseloco.nesterov(0.7, momentum=0.9)
  # Branches of `lax.cond` must agree on which values differ between peers.
  varying = functools.partial(collectives.varying, axis_name=axis_name)

  def init(params: ct.Params) -> StreamingState:
    arguments.check_params(params)
    leaves = len(jax.tree.leaves(params))
    if fragments > leaves:
      raise ValueError(
        f'fragments: expected at most one for each of the {leaves} leaves of '
        f'params, got {fragments}'
      )
    parts = tuple(
      Fragment(
        # A copy: callers donate params and state together.
        anchor=jax.tree.map(jnp.copy, part),
        pending=sparseloco.init_error(part),
        outer=outer.init(part),
      )
      for part in split(params, fragments)
    )
    return StreamingState(
      jnp.zeros((), jnp.int32), parts, varying(inner.init(params))
    )

  def due(step: jax.Array, p: int) -> jax.Array:
    """Returns whether fragment p sends after inner step `step`, from 1."""
    offset = p * inner_steps // fragments
    return (step > 0) & ((step - offset) % inner_steps == 0)

  rules = exchange.Rules(axis_name, mean_over='all', clip='none')

  def mean(delta: ct.Delta, parts: jax.Array) -> tuple[ct.PyTree, ...]:
    shards = [
      collectives.shard_axes(x, axis_name) for x in jax.tree.leaves(delta)
    ]
    dense = [sparseloco.Dense()] * len(shards)
    done = exchange.exchange(delta, None, parts, dense, rules, shards)
    return done.delta, ()

  def send(
    local: ct.Params, fragment: Fragment, parts: jax.Array
  ) -> tuple[ct.Params, Fragment]:
    delta = sparseloco.pseudo_gradient(fragment.anchor, local)
    if axis_name is None:
      delta = jax.tree.map(lambda d: jnp.where(parts > 0, d, 0), delta)
    else:
      # Shard by shard, if the types say that there are shards.
      delta, _ = collectives.on_shards(mean, (delta,), axis_name, (parts,))
    pending = collectives.typed_as(delta, fragment.pending)
    return local, fragment._replace(pending=pending)

  def receive(
    local: ct.Params, fragment: Fragment, parts: jax.Array
  ) -> tuple[ct.Params, Fragment]:
    del parts
    anchor, outer_state = sparseloco.outer_update(
      outer, fragment.pending, fragment.outer, fragment.anchor
    )
    local = jax.tree.map(
      lambda x, a: mixing * x + (1 - mixing) * a, local, anchor
    )
    moved = fragment._replace(anchor=anchor, outer=outer_state)
    return local, collectives.typed_as(moved, fragment)

  def stay(
    local: ct.Params, fragment: Fragment, parts: jax.Array
  ) -> tuple[ct.Params, Fragment]:
    del parts
    return local, fragment

  def update(
    updates: ct.Grads,
    state: ct.PyTree,
    params: ct.Params | None = None,
    weight: ct.Scalar = None,
    **extra_args: object,
  ) -> tuple[ct.Params, StreamingState]:
    if params is None:
      raise ValueError('streaming_diloco: update needs params, got None')
    arguments.check_state(state, StreamingState)
    params = arguments.where_given(updates, params)
    arguments.check_trees(params, updates=updates)
    arguments.check_axes(params, axis_name)
    weight_parts = varying(weight_lib.parts_of(weight))
    updates, inner_state = inner.update(
      updates, state.inner, params, **extra_args
    )
    updates, inner_state, _ = finite.step(
      updates, params, inner_state, state.inner
    )
    count = state.count + 1
    own = varying(split(optax.apply_updates(params, updates), fragments))
    moved = []
    for p, part in enumerate(zip(own, state.fragments, strict=True)):
      part = jax.lax.cond(due(count, p), send, stay, *part, weight_parts)
      part = jax.lax.cond(
        due(count - overlap, p), receive, stay, *part, weight_parts
      )
      moved.append(part)
    new = merge([local for local, _ in moved], params)
    state = StreamingState(count, tuple(f for _, f in moved), inner_state)
    return jax.tree.map(lambda n, old: n - old, new, params), state

  return optax.GradientTransformationExtraArgs(init, update)


def split(tree: ct.PyTree, fragments: int) -> list[ct.PyTree]:
  """Returns one tree per fragment, with None for the leaves of the others.

  >>> split({'a': 1, 'b': 2, 'c': 3}, 2)
  [{'a': 1, 'b': None, 'c': 3}, {'a': None, 'b': 2, 'c': None}]
  """
  leaves, treedef = jax.tree.flatten(tree)
  return [
    treedef.unflatten(
      [x if i % fragments == p else None for i, x in enumerate(leaves)]
    )
    for p in range(fragments)
  ]


def merge(parts: list[ct.PyTree], like: ct.PyTree) -> ct.PyTree:
  """Returns the tree, structured like `like`, that `split` took apart."""
  leaves = [iter(jax.tree.leaves(part)) for part in parts]
  treedef = jax.tree.structure(like)
  return treedef.unflatten(
    [next(leaves[i % len(parts)]) for i in range(treedef.num_leaves)]
  )
