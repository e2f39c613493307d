"""How an island trains within a round: where, from what, by which step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from covenant import config as config_lib
from covenant.optim import method as method_lib
from covenant.train import island as island_lib
from covenant.train import placement as placement_lib
from covenant.train import staging
from covenant.train import step as step_lib
from covenant.train.pipeline import subspace


class Course(NamedTuple):
  place: placement_lib.Placement | staging.Staging  # of what it trains
  step: Any  # as `step.inner_step` makes it
  # Of a pipeline with a subspace: from the shared parameters at home, and
  # tokens of the round, what its step takes besides.
  enter: Callable[[Any, Any], subspace.Fixed] | None = None
  # And from those parameters, those at its end, and that: what it has learned.
  leave: Callable[[Any, Any, subspace.Fixed], Any] | None = None


def make(
  config: config_lib.Config,
  method: method_lib.Method,
  place: placement_lib.Placement,
  island: island_lib.Island,
  stages: jax.sharding.Mesh | None = None,
) -> Course:
  """The course of an island.

  Args:
    config: of the run.
    method: of the config; it has an inner optimizer.
    place: of the miner at rest.
    island: of the miner, as `island.of` gives it.
    stages: the devices of a pipeline. An island with a rank and as many stages
      has one on each; any other pipeline is emulated, by one device.

  Raises:
    ConfigError: the model or the batch cannot be cut so.
  """
  inner = dataclasses.replace(config.optim.inner, batch_size=island.batch)
  optim = dataclasses.replace(config.optim, inner=inner)
  config = dataclasses.replace(config, optim=optim)
  if not island.rank:
    step = step_lib.inner_step(config, method, place.mesh)
    return Course(place, step)
  if place.mesh is not None:
    raise config_lib.ConfigError(
      'islands: a stage of a miner with a rank is one device; expected '
      'devices.data, devices.fsdp and devices.tensor to be 1'
    )
  enter, leave = step_lib.enter(config, island), step_lib.leave(config, island)
  if stages is None or stages.size != island.stages:
    step = step_lib.inner_step(config, method, pipeline=island)
    return Course(place, step, enter, leave)
  if inner.kind != 'adamw':
    raise config_lib.ConfigError(
      "devices.stage: expected optim.inner.kind='adamw' with more than one, "
      f'got {inner.kind!r}'
    )
  staged = staging.Staging(config.model, stages)
  step = step_lib.inner_step(config, method, stages, island)
  return Course(
    staged,
    step,
    lambda *x: staged.share(enter(*x)),
    lambda start, end, fixed: leave(start, end, staged.settle(fixed)),
  )
