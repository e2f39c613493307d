"""How an island trains within a round: where, from what, by which step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from covenant import config as config_lib
from covenant.islands import island as island_lib
from covenant.node import placement as placement_lib
from covenant.node import step as step_lib
from covenant.optim import method as method_lib


class Course(NamedTuple):
  place: placement_lib.Placement  # of what it trains
  # From the shared parameters at home: those that it starts with, then what
  # its step takes besides, the same for a whole round.
  enter: Callable[[Any], tuple[Any, ...]]
  step: Any  # as `step.inner_step` makes it


def make(
  config: config_lib.Config,
  method: method_lib.Method,
  place: placement_lib.Placement,
  island: island_lib.Island,
) -> Course:
  """The course of an island.

  Args:
    config: of the run.
    method: of the config; it has an inner optimizer.
    place: of the miner.
    island: of the miner, as `island.of` gives it.

  Raises:
    ConfigError: the model or the batch cannot be cut so.
  """
  inner = dataclasses.replace(config.optim.inner, batch_size=island.batch)
  optim = dataclasses.replace(config.optim, inner=inner)
  config = dataclasses.replace(config, optim=optim)
  if not island.rank:
    step = step_lib.inner_step(config, method, place.mesh)
    return Course(place, lambda params: (params,), step)
  if place.mesh is not None:
    raise config_lib.ConfigError(
      'islands: a miner with a rank trains on one device; expected '
      'devices.data, devices.fsdp and devices.tensor to be 1'
    )
  step = step_lib.inner_step(config, method, stages=island.stages)
  return Course(place, step_lib.enter(config, island), step)
