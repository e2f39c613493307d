"""The inner step of a miner, as a program for its mesh.

Pure functions of a config and a mesh: they need no data, and with an abstract
mesh no devices, so that the step can be lowered and compiled for hardware that
is not there:

  step.inner_step(config, method, mesh).lower(
    *step.arguments(config, method, mesh)
  )
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from covenant import config as config_lib
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.models import sharding
from covenant.optim import inner as inner_lib
from covenant.optim import method as method_lib
from covenant.train import island as island_lib
from covenant.train.pipeline import gpipe as gpipe_lib
from covenant.train.pipeline import subspace


def inner_step(
  config: config_lib.Config,
  method: method_lib.Method,
  mesh: sharding.AnyMesh | None = None,
  pipeline: island_lib.Island | None = None,
) -> Any:
  """The jitted step: -> (params, state, loss in nats a token).

  Its arguments are params and state, which it consumes, tokens_BxL1, the inner
  step of the run, the one at which the miner joined, and of a pipeline with a
  subspace what `enter` found fixed.

  Args:
    config: of the run.
    method: of the config; it has an inner optimizer.
    mesh: of the miner: params and the state of the optimizer are cut by
      `sharding.specs`, the batch by `sharding.batch_spec`. None: one device.
      Of a pipeline its stages: params are as `pipeline.split` gives them.
    pipeline: an island with a rank.

  Raises:
    ConfigError: the model or the batch cannot be cut so.
  """
  gradient: Callable[..., tuple[jax.Array, Any]]
  if pipeline is None:
    gradient = _loss_and_gradient(config, mesh)
  else:
    gradient = _pipeline(config, pipeline, mesh)
  assert method.inner is not None

  def step(
    params: Any,
    state: Any,
    tokens_BxL1: jax.Array,
    step: jax.Array,
    joined: jax.Array,
    *fixed: subspace.Fixed,
  ) -> tuple[Any, Any, jax.Array]:
    nats, grads = gradient(params, tokens_BxL1, *fixed)
    updates, state = method.inner.update(grads, state, params)
    rate = method.schedule(step) * inner_lib.rejoin_factor(
      config.optim.inner, step, joined
    )
    updates = jax.tree.map(lambda u: rate * u, updates)
    return optax.apply_updates(params, updates), state, nats

  said: dict[str, Any] = {}
  if mesh is not None and pipeline is None:
    params, state, *_ = arguments(config, method, mesh)
    said['out_shardings'] = (
      *jax.tree.map(lambda x: x.sharding, (params, state)),
      jax.NamedSharding(mesh, jax.P()),
    )
  return jax.jit(step, donate_argnames=('params', 'state'), **said)


def enter(config: config_lib.Config, island: island_lib.Island) -> Any:
  """The jitted (params, tokens_BxL1) -> `subspace.Fixed` of a round."""
  return jax.jit(functools.partial(subspace.fix, config.model, island=island))


def leave(config: config_lib.Config, island: island_lib.Island) -> Any:
  """The jitted (start, end, `subspace.Fixed`) -> what the round has taught."""

  def learned(start: Any, end: Any, fixed: subspace.Fixed) -> Any:
    return subspace.learned(config.model, start, end, island, fixed)

  return jax.jit(learned, donate_argnames='end')


def gradient(
  config: config_lib.Config, mesh: sharding.AnyMesh | None = None
) -> Any:
  """The jitted (params, tokens_BxL1) -> (nats a token, gradient)."""
  said: dict[str, Any] = {}
  if mesh is not None:
    whole = jax.NamedSharding(mesh, jax.P())
    said['out_shardings'] = whole, sharding.shardings(_params(config), mesh)
  return jax.jit(_loss_and_gradient(config, mesh), **said)


def arguments(
  config: config_lib.Config,
  method: method_lib.Method,
  mesh: sharding.AnyMesh | None = None,
) -> tuple[Any, ...]:
  """What `inner_step` takes, as shapes that say where they are."""
  assert method.inner is not None
  params = _params(config)
  state = jax.eval_shape(method.inner.init, params)
  shape = config.optim.inner.batch_size, config.data.context + 1
  tokens_BxL1 = jax.ShapeDtypeStruct(shape, jnp.int32)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  if mesh is None:
    return params, state, tokens_BxL1, scalar, scalar

  def placed(x: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
    where = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  cut = (params, state)
  return (
    *jax.tree.map(placed, cut, sharding.specs(cut, mesh)),
    placed(tokens_BxL1, sharding.batch_spec(mesh)),
    placed(scalar, jax.P()),
    placed(scalar, jax.P()),
  )


def _params(config: config_lib.Config) -> Any:
  return jax.eval_shape(lambda: llama.init(config.model, jax.random.key(0)))


def _loss_and_gradient(
  config: config_lib.Config, mesh: sharding.AnyMesh | None
) -> Callable[[Any, jax.Array], tuple[jax.Array, Any]]:
  gradient = functools.partial(
    loss_lib.next_token_gradient,
    config.model,
    microbatch=_microbatch(config.optim.inner, mesh),
  )

  def alone(params: Any, tokens_BxL1: jax.Array) -> tuple[jax.Array, Any]:
    loss, grads = gradient(params, tokens_BxL1)
    return loss.nats, grads

  if mesh is None:
    return alone
  dense = config.optim.method in ('diloco', 'ddp')
  block = (1, 1) if dense else config.optim.compression.block
  sharding.check(config.model, block, mesh)
  specs = sharding.specs(_params(config), mesh)
  batch = sharding.split('batch', mesh)
  whole = [_others(batch, spec) for spec in jax.tree.leaves(specs)]

  def share(params: Any, tokens_bxL1: jax.Array) -> tuple[jax.Array, Any]:
    """The same, from this device's sequences and shards."""
    # What is whole along an axis of the batch would be summed over it by each
    # microbatch; as each device's own it is summed once, at the end.
    leaves, treedef = jax.tree.flatten(params)
    leaves = [_own(x, axes) for x, axes in zip(leaves, whole, strict=True)]
    loss, grads = gradient(treedef.unflatten(leaves), tokens_bxL1)
    grads = jax.tree.leaves(grads)
    for axes in filter(None, dict.fromkeys(whole)):
      of = [i for i, others in enumerate(whole) if others == axes]
      sums = jax.lax.psum([grads[i] for i in of], axes)
      for i, x in zip(of, sums, strict=True):
        grads[i] = x
    return loss.nats, treedef.unflatten(grads)

  return jax.shard_map(
    share,
    mesh=mesh,
    in_specs=(specs, sharding.batch_spec(mesh)),
    out_specs=(jax.P(), specs),
  )


def _pipeline(
  config: config_lib.Config, island: island_lib.Island, mesh: Any
) -> Callable[[Any, jax.Array, subspace.Fixed], tuple[jax.Array, Any]]:
  """As `_loss_and_gradient`, of a pipeline with a subspace.

  On the stages of a mesh, or on one device.
  """
  model, microbatch = config.model, _microbatch(config.optim.inner, None)
  if mesh is not None:
    return functools.partial(
      gpipe_lib.next_token_gradient,
      model,
      mesh=mesh,
      bits=island.bits,
      microbatch=microbatch,
    )

  def emulated(
    params: Any, tokens_BxL1: jax.Array, fixed: subspace.Fixed
  ) -> tuple[jax.Array, Any]:
    loss, grads = subspace.next_token_gradient(
      model, params, tokens_BxL1, island, fixed, microbatch
    )
    return loss.nats, grads

  return emulated


def _others(axes: tuple[str, ...], spec: jax.P) -> tuple[str, ...]:
  """Those of the axes along which the spec cuts nothing."""
  cut: set[str] = set()
  for entry in spec:
    cut.update((entry,) if isinstance(entry, str) else entry or ())
  return tuple(axis for axis in axes if axis not in cut)


def _own(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  return jax.lax.pcast(x, axes, to='varying') if axes else x


def _microbatch(
  inner: config_lib.Inner, mesh: sharding.AnyMesh | None
) -> int | None:
  """Sequences that a device has in flight at once; None is all of its own."""
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
