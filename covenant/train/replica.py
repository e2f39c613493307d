"""The kinds of replicas: how miners of each kind train within a round.

full       the whole model, on one device or sharded over a mesh
pipeline   stages that pass a few coordinates of each activation to the next
gradient   the gradient of one batch, if the method has no inner optimizer

With `optim.overlap` the first steps of a round are trained before the last one
is exchanged (`overlapped`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import jax
import optax

from covenant import config as config_lib
from covenant import typing as ct
from covenant.data import tokens as tokens_lib
from covenant.train import island as island_lib
from covenant.train import local as local_lib
from covenant.train import placement as placement_lib
from covenant.train import step as step_lib
from covenant.train.pipeline import subspace


def kind(island: island_lib.Island) -> island_lib.Island:
  """Returns what islands that train by the same programs have in common."""
  stages = island.stages if island.rank else 1
  return dataclasses.replace(island, steps=0, stages=stages)


def make(
  config: config_lib.Config,
  islands: Iterable[island_lib.Island],
  placement: placement_lib.Placement,
  split: tokens_lib.Split,
  stages: jax.sharding.Mesh | None = None,
) -> dict[island_lib.Island, local_lib.Replica]:
  """Makes the replicas of a run, one per `kind` of island.

  Args:
    config: the config of the run.
    islands: the islands, as `island.of` gives them.
    placement: the placement of miners at rest.
    split: the data to train on.
    stages: the devices of a pipeline. An island with a rank and as many stages
      has one on each; any other pipeline is emulated on one device.

  Raises:
    ConfigError: the model or the batch cannot be sharded so, or no island uses
      the stages.
  """
  kinds = list(dict.fromkeys(map(kind, islands)))
  if config.optim.method in ('ddp', 'demo'):
    return dict.fromkeys(kinds, gradient(config, placement))
  ranked = [island for island in kinds if island.rank]
  if config.optim.overlap and ranked:
    raise config_lib.ConfigError(
      'islands: expected rank=0 with optim.overlap='
      f'{config.optim.overlap}, got rank={ranked[0].rank}: a pipeline fits its '
      'subspace to the shared parameters, which early steps do not wait for'
    )
  if stages is not None and stages.size not in {x.stages for x in ranked}:
    raise config_lib.ConfigError(
      f'devices.stage: expected an island with stages={stages.size} and a '
      'rank, which alone has a device per stage; there is none'
    )
  return {
    island: pipeline(config, island, placement, split, stages)
    if island.rank
    else full(_with_batch(config, island), placement)
    for island in kinds
  }


def _with_batch(
  config: config_lib.Config, island: island_lib.Island
) -> config_lib.Config:
  """Returns the config with the batch size of an island."""
  inner = dataclasses.replace(config.optim.inner, batch_size=island.batch)
  optim = dataclasses.replace(config.optim, inner=inner)
  return dataclasses.replace(config, optim=optim)


def full(
  config: config_lib.Config, placement: placement_lib.Placement
) -> local_lib.Replica:
  """Makes the replica of miners that hold the whole model.

  Args:
    config: the config of the run, with the batch size of the miners.
    placement: the placement of the miners.

  Raises:
    ConfigError: the model or the batch cannot be sharded so.
  """
  load, offload = placement.host.load, placement.host.offload

  def begin_round(
    params: ct.Params,
    state: local_lib.MinerState,
    run: local_lib.RoundInProgress,
  ) -> tuple[ct.Params, ct.OptState | None, local_lib.Constants]:
    del run
    # The first step consumes its parameters: never the shared ones.
    shared = not placement_lib.is_offloaded(params)
    local = placement.replicate(load(params), fresh=shared)
    return local, placement.replicate(load(state.inner)), ()

  def end_round(
    params: ct.Params, local: ct.Params, constants: local_lib.Constants
  ) -> tuple[ct.Params, ct.Params]:
    del constants
    end = placement.gather(local)
    return placement.to_home(load(params)), end

  return local_lib.Replica(
    begin_round,
    placement.shard_batch,
    step_lib.inner_step(config, placement.mesh),
    lambda inner: offload(placement.gather(inner)),
    end_round,
  )


def pipeline(
  config: config_lib.Config,
  island: island_lib.Island,
  placement: placement_lib.Placement,
  split: tokens_lib.Split,
  stages: jax.sharding.Mesh | None = None,
) -> local_lib.Replica:
  """Makes the replica of miners whose stages pass a subspace.

  Args:
    config: the config of the run.
    island: an island with a rank.
    placement: the placement of miners at rest, on one device.
    split: the data to train on.
    stages: as in `make`.

  Raises:
    ConfigError: the mesh or the optimizer does not fit a pipeline.
  """
  stages = _stages(config, island, placement, stages)
  model, load = config.decoder, placement.host.load
  fit = jax.jit(functools.partial(subspace.fix, model, island=island))
  learned = jax.jit(
    functools.partial(subspace.learned, model, island=island),
    donate_argnames='end',
  )
  devices: placement_lib.Placement | placement_lib.PipelinePlacement = placement
  if stages is not None:
    devices = placement_lib.PipelinePlacement(model, stages)

  def begin_round(
    params: ct.Params,
    state: local_lib.MinerState,
    run: local_lib.RoundInProgress,
  ) -> tuple[ct.Params, ct.OptState | None, local_lib.Constants]:
    start = placement.to_home(load(params))
    ids_n = local_lib.batch_ids(config, run.task, split).flat[: subspace.FITTED]
    fixed = fit(start, split.read(ids_n, config.data.context))
    if stages is not None:
      fixed = devices.replicate(fixed)
    shared = not placement_lib.is_offloaded(params)
    local = devices.replicate(start, fresh=shared)
    return local, devices.replicate(load(state.inner)), (fixed,)

  def end_round(
    params: ct.Params, local: ct.Params, constants: local_lib.Constants
  ) -> tuple[ct.Params, ct.Params]:
    (fixed,) = constants
    end = devices.gather(local)
    start = placement.to_home(load(params))
    return start, learned(start, end, fixed=devices.gather(fixed))

  return local_lib.Replica(
    begin_round,
    devices.shard_batch,
    step_lib.inner_step(_with_batch(config, island), stages, island),
    lambda inner: placement.host.offload(devices.gather(inner)),
    end_round,
  )


def _stages(
  config: config_lib.Config,
  island: island_lib.Island,
  placement: placement_lib.Placement,
  stages: jax.sharding.Mesh | None,
) -> jax.sharding.Mesh | None:
  """Returns the devices of a pipeline's stages; None: it is emulated on one."""
  if placement.mesh is not None:
    raise config_lib.ConfigError(
      'islands: a stage of a miner with a rank is one device; expected '
      'devices.data, devices.fsdp and devices.tensor to be 1'
    )
  if stages is None or stages.size != island.stages:
    return None
  if len(set(island.layers)) > 1:
    raise config_lib.ConfigError(
      'devices.stage: expected stages with equally many layers, got '
      f'{"-".join(map(str, island.layers))}'
    )
  if config.optim.inner.kind != 'adamw':
    raise config_lib.ConfigError(
      "devices.stage: expected optim.inner.kind='adamw' with more than one, "
      f'got {config.optim.inner.kind!r}'
    )
  return stages


def gradient(
  config: config_lib.Config, placement: placement_lib.Placement
) -> local_lib.Replica:
  """Makes the replica of miners that send the gradient of one batch.

  Their one step replaces the parameters by the gradient.

  Args:
    config: the config of the run.
    placement: the placement of the miners.

  Raises:
    ConfigError: the model or the batch cannot be sharded so.
  """
  loss_and_gradient = step_lib.gradient(config, placement.mesh)
  norm = jax.jit(optax.tree.norm)

  def begin_round(
    params: ct.Params,
    state: local_lib.MinerState,
    run: local_lib.RoundInProgress,
  ) -> tuple[ct.Params, ct.OptState | None, local_lib.Constants]:
    del state, run
    return placement.replicate(placement.host.load(params)), None, ()

  def step(
    params: ct.Params,
    inner: ct.OptState | None,
    tokens_BxL1: ct.Tokens,
    *_: object,
  ) -> tuple[ct.Grads, ct.OptState | None, step_lib.StepOutcome]:
    nats, grads = loss_and_gradient(params, tokens_BxL1)
    return grads, inner, step_lib.StepOutcome(nats, norm(grads))

  def end_round(
    params: ct.Params, grads: ct.Grads, constants: local_lib.Constants
  ) -> tuple[None, ct.Grads]:
    del params, constants
    return None, placement.gather(grads)

  return local_lib.Replica(
    begin_round, placement.shard_batch, step, lambda inner: inner, end_round
  )


def train_early(
  replica: local_lib.Replica,
  state: local_lib.MinerState,
  run: local_lib.RoundInProgress,
  steps: int,
) -> tuple[local_lib.RoundInProgress, local_lib.MinerState]:
  """Trains the first steps of a round before the last round is exchanged.

  The steps continue from the miner's own parameters. Returns while they are
  under way.

  Args:
    replica: the functions of the miner's kind, without overlap.
    state: the miner's own state, with `local`; consumed.
    run: a round without steps.
    steps: the number of steps to train.
  """
  assert state.local is not None
  run = run._replace(origin=state.local)
  local, inner, constants = replica.begin_round(state.local, state, run)
  for tokens_BxL1 in itertools.islice(run.batches, steps):
    local, inner = local_lib.inner_step(
      replica, run, tokens_BxL1, local, inner, constants
    )
  return run, state._replace(inner=inner, local=local)


def overlapped(
  replica: local_lib.Replica, placement: placement_lib.Placement
) -> local_lib.Replica:
  """Returns the replica of miners whose rounds `train_early` has begun.

  The difference that the early steps made is added to the shared parameters,
  and the delta of the round is measured against these. So every step is part of
  exactly one delta.

  Args:
    replica: the functions of the miner's kind, without overlap.
    placement: the placement of the miner.
  """
  load = placement.host.load

  def begin_round(
    params: ct.Params,
    state: local_lib.MinerState,
    run: local_lib.RoundInProgress,
  ) -> tuple[ct.Params, ct.OptState | None, local_lib.Constants]:
    local = _shift(
      placement.replicate(load(params)),
      placement.replicate(load(run.origin)),
      state.local,
    )
    return local, placement.replicate(load(state.inner)), ()

  return replica._replace(begin_round=begin_round, keep=placement.host.offload)


@functools.partial(jax.jit, donate_argnames='local')
def _shift(params: ct.Params, origin: ct.Params, local: ct.Params) -> ct.Params:
  """Returns `params` moved by the difference of `local` and `origin`."""
  return jax.tree.map(lambda p, o, x: p + (x - o), params, origin, local)
