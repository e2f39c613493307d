"""The inner step of a miner, as a program for its mesh.

Pure functions of a config and a mesh: they need no data, and with an abstract
mesh no devices, so that the step can be lowered and compiled for hardware that
is not there:

  step.inner_step(config, mesh).lower(*step.arguments(config, mesh))
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from covenant import config as config_lib
from covenant import device_sums
from covenant import typing as ct
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.models import sharding
from covenant.optim import inner as inner_lib
from covenant.train import island as island_lib
from covenant.train.pipeline import gpipe as gpipe_lib
from covenant.train.pipeline import subspace


class StepOutcome(NamedTuple):
  """The numbers of an inner step. It was not taken unless both are finite."""

  nats: jax.Array  # loss, nats per token
  gradient_norm: jax.Array  # L2 norm of the gradient, before it is clipped


def inner_step(
  config: config_lib.Config,
  mesh: sharding.AnyMesh | None = None,
  pipeline: island_lib.Island | None = None,
  bypassed: frozenset[int] = frozenset(),
) -> jax.stages.Wrapped:
  """Returns the jitted inner step.

  It maps params and the state of the optimizer, which it consumes, tokens_BxL1,
  the inner step of the run, the inner step at which the miner joined and, in a
  pipeline, the `subspace.Fixed` of the round to (params, state, `StepOutcome`).
  Where the loss or the gradient is not finite, params and state stay as they
  are.

  Args:
    config: the config of the run.
    mesh: the mesh of the miner: params and the state of the optimizer are
      sharded by `sharding.specs`, the batch by `sharding.batch_spec`. None is
      one device. The mesh of a pipeline has its stages, and params are as
      `gpipe.split` returns them.
    pipeline: an island with a rank; None is a full replica.
    bypassed: stages of an emulated pipeline that have no part in the step;
      layers must not be stacked.

  Raises:
    ConfigError: the model or the batch cannot be sharded so.
  """
  inner = config.optim.inner
  optimizer = inner_lib.make(inner)
  learning_rate = inner_lib.schedule(
    inner, total_steps=config.rounds * config.optim.inner_steps
  )
  loss_and_gradient: Callable[..., tuple[jax.Array, ct.Grads]]
  away: set[str] = set()  # layers that stay as they are
  if pipeline is None:
    loss_and_gradient = _loss_and_gradient(config, mesh)
  else:
    loss_and_gradient = _pipeline(config, pipeline, mesh, bypassed)
    spans = subspace.spans(config.decoder, pipeline)
    away = {f'layers_{i}' for s in bypassed for i in spans[s]}

  def step(
    params: ct.Params,
    state: ct.OptState,
    tokens_BxL1: jax.Array,
    step: jax.Array,
    joined: jax.Array,
    *fixed: subspace.Fixed,
  ) -> tuple[ct.Params, ct.OptState, StepOutcome]:
    nats, grads = loss_and_gradient(params, tokens_BxL1, *fixed)
    norm = optax.tree.norm(grads)
    updates, moved = optimizer.update(grads, state, params)
    rate = learning_rate(step) * inner_lib.rejoin_factor(inner, step, joined)
    updates = jax.tree.map(lambda u: rate * u, updates)
    new = optax.apply_updates(params, updates), moved
    if away:
      new = hold_layers(away, new, (params, state))
    finite = jnp.isfinite(nats) & jnp.isfinite(norm)
    params, state = jax.tree.map(
      lambda x, old: jnp.where(finite, x, old), new, (params, state)
    )
    return params, state, StepOutcome(nats, norm)

  shardings: dict[str, ct.PyTree] = {}
  if mesh is not None and pipeline is None:
    params, state, *_ = arguments(config, mesh)
    shardings['out_shardings'] = (
      *jax.tree.map(lambda x: x.sharding, (params, state)),
      jax.NamedSharding(mesh, jax.P()),  # of both numbers
    )
  return jax.jit(step, donate_argnames=('params', 'state'), **shardings)


def hold_layers(layers: set[str], new: ct.PyTree, old: ct.PyTree) -> ct.PyTree:
  """Returns a tree with the old leaves of some layers, and the new others."""

  def choose(
    path: jax.tree_util.KeyPath, new: jax.Array, old: jax.Array
  ) -> jax.Array:
    keys = {getattr(key, 'key', '') for key in path}
    return new if layers.isdisjoint(keys) else old

  return jax.tree_util.tree_map_with_path(choose, new, old)


def gradient(
  config: config_lib.Config, mesh: sharding.AnyMesh | None = None
) -> jax.stages.Wrapped:
  """Returns the jitted (params, tokens_BxL1) -> (nats per token, gradient)."""
  shardings: dict[str, ct.PyTree] = {}
  if mesh is not None:
    whole = jax.NamedSharding(mesh, jax.P())
    cut = sharding.shardings(llama.abstract(config.model), mesh)
    shardings['out_shardings'] = whole, cut
  return jax.jit(_loss_and_gradient(config, mesh), **shardings)


def arguments(
  config: config_lib.Config, mesh: sharding.AnyMesh | None = None
) -> tuple[ct.PyTree, ...]:
  """Returns the arguments of `inner_step` as shapes with their shardings."""
  params = llama.abstract(config.model)
  state = jax.eval_shape(inner_lib.make(config.optim.inner).init, params)
  shape = config.optim.inner.batch_size, config.data.context + 1
  tokens_BxL1 = jax.ShapeDtypeStruct(shape, jnp.int32)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  if mesh is None:
    return params, state, tokens_BxL1, scalar, scalar

  def placed(x: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
    where = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  cut = (params, state)
  return (
    *jax.tree.map(placed, cut, sharding.specs(cut, mesh)),
    placed(tokens_BxL1, sharding.batch_spec(mesh)),
    placed(scalar, jax.P()),
    placed(scalar, jax.P()),
  )


def _loss_and_gradient(
  config: config_lib.Config, mesh: sharding.AnyMesh | None
) -> Callable[[ct.Params, jax.Array], tuple[jax.Array, ct.Grads]]:
  gradient = functools.partial(
    loss_lib.next_token_gradient,
    config.decoder,
    microbatch=_microbatch(config.optim.inner, mesh),
  )

  def one_device(
    params: ct.Params, tokens_BxL1: jax.Array
  ) -> tuple[jax.Array, ct.Grads]:
    loss, grads = gradient(params, tokens_BxL1)
    return loss.nats, grads

  if mesh is None:
    return one_device
  dense = config.optim.method in ('diloco', 'ddp')
  block = (1, 1) if dense else config.optim.compression.block
  sharding.check(config.model, block, mesh)
  specs = sharding.specs(llama.abstract(config.model), mesh)
  batch = sharding.split('batch', mesh)
  whole = [_others(batch, spec) for spec in jax.tree.leaves(specs)]

  def sharded(
    params: ct.Params, tokens_bxL1: jax.Array
  ) -> tuple[jax.Array, ct.Grads]:
    """Computes the same from this device's sequences and shards."""
    # The gradient of a leaf that is whole along an axis of the batch would be
    # summed over the axis in every microbatch. With the leaf cast to a value of
    # each device's own, it is summed once, at the end.
    leaves, treedef = jax.tree.flatten(params)
    leaves = [_own(x, axes) for x, axes in zip(leaves, whole, strict=True)]
    loss, grads = gradient(treedef.unflatten(leaves), tokens_bxL1)
    grads = jax.tree.leaves(grads)
    for axes in filter(None, dict.fromkeys(whole)):
      of = [i for i, others in enumerate(whole) if others == axes]
      sums = device_sums.psum([grads[i] for i in of], axes)
      for i, x in zip(of, sums, strict=True):
        grads[i] = x
    return loss.nats, treedef.unflatten(grads)

  return jax.shard_map(
    sharded,
    mesh=mesh,
    in_specs=(specs, sharding.batch_spec(mesh)),
    out_specs=(jax.P(), specs),
  )


def _pipeline(
  config: config_lib.Config,
  island: island_lib.Island,
  mesh: sharding.AnyMesh | None,
  bypassed: frozenset[int],
) -> Callable[
  [ct.Params, jax.Array, subspace.Fixed], tuple[jax.Array, ct.Grads]
]:
  """Makes the loss and gradient of a pipeline.

  It runs on the stages of a mesh, or on one device without.
  """
  model, microbatch = config.decoder, _microbatch(config.optim.inner, None)
  if mesh is not None:
    return functools.partial(
      gpipe_lib.next_token_gradient,
      model,
      mesh=mesh,
      bits=island.bits,
      microbatch=microbatch,
    )

  def emulated(
    params: ct.Params, tokens_BxL1: jax.Array, fixed: subspace.Fixed
  ) -> tuple[jax.Array, ct.Grads]:
    loss, grads = subspace.next_token_gradient(
      model, params, tokens_BxL1, island, fixed, microbatch, bypassed
    )
    return loss.nats, grads

  return emulated


def _others(axes: tuple[str, ...], spec: jax.P) -> tuple[str, ...]:
  """Returns those of the axes along which the spec shards nothing."""
  cut: set[str] = set()
  for entry in spec:
    cut.update((entry,) if isinstance(entry, str) else entry or ())
  return tuple(axis for axis in axes if axis not in cut)


def _own(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Casts a leaf that is whole along axes to a value of each device's own."""
  return jax.lax.pcast(x, axes, to='varying') if axes else x


def _microbatch(
  inner: config_lib.Inner, mesh: sharding.AnyMesh | None
) -> int | None:
  """Returns the sequences per microbatch of a device; None is all it has."""
  devices = 1
  if mesh is not None:
    axes = sharding.split('batch', mesh)
    devices = math.prod(mesh.shape[axis] for axis in axes)
  own, rest = divmod(inner.batch_size, devices)
  if rest:
    raise config_lib.ConfigError(
      f'optim.inner.batch_size: expected a multiple of {devices}, the devices '
      f'of this miner that share it, got {inner.batch_size}'
    )
  if not 0 < inner.microbatch_size < own:
    return None
  if own % inner.microbatch_size:
    raise config_lib.ConfigError(
      f'optim.inner.microbatch_size: expected a divisor of {own}, the '
      f'sequences of a batch on each of {devices} devices, got '
      f'{inner.microbatch_size}'
    )
  return inner.microbatch_size
