"""The compiled tools of a stage, made once per process."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import jax

from covenant import config as config_lib
from covenant import typing as ct
from covenant.config import amend
from covenant.models import llama
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import compressor as compressor_lib
from covenant.optim import outer_step as outer_step_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train.pipeline import stage_programs
from covenant.wire import payload


class StageTools(NamedTuple):
  """The parts without state that equal stages share in a process."""

  config: config_lib.Config  # with the rules that they follow
  programs: stage_programs.StagePrograms
  method: algorithm_lib.Algorithm
  own: ct.Params  # shapes
  spec: payload.Spec  # of its own tensors
  held_spec: payload.Spec  # the same with the embedding
  compressor: compressor_lib.Compressor
  outer_step: outer_step_lib.OuterStep
  initial: Callable[[], shared_state_lib.SharedState]


def of(
  config: config_lib.Config,
  island: config_lib.Island,
  index: int,
  changes: amend.Changes = amend.NOTHING,
) -> StageTools:
  """Returns the tools of a stage; their programs are compiled once.

  Where the stage is, and to whom it talks, makes no difference.

  Args:
    config: the config that the run began with.
    island: the pipeline.
    index: the number of the stage.
    changes: values of it that are others by now (`amend.for_stages`).

  Raises:
    ConfigError: a value may not change so.
  """
  pool, network = config_lib.Pool(), config_lib.Network()
  alike = dataclasses.replace(config, pool=pool, network=network)
  if not changes:
    return _of(alike, island, index)
  return _amended(alike, island, index, json.dumps(changes, sort_keys=True))


@functools.lru_cache(maxsize=32)
def _amended(
  config: config_lib.Config, island: config_lib.Island, index: int, text: str
) -> StageTools:
  """Returns the tools under other values; what does not change is kept."""
  tools = _of(config, island, index)
  new = amend.amended(config, 1, json.loads(text))
  method, outer_step = algorithm_lib.make(new), tools.outer_step
  if new.optim.outer != config.optim.outer:
    held = stage_programs.pick(
      llama.abstract(new.model), tools.programs.names.held
    )
    outer_step = _outer_step(held, method)
  programs = tools.programs.amended(new)
  return tools._replace(
    config=new, programs=programs, method=method, outer_step=outer_step
  )


def _outer_step(
  held: ct.Params, method: algorithm_lib.Algorithm
) -> outer_step_lib.OuterStep:
  return outer_step_lib.OuterStep(
    held, method.compression, method.outer, method.mean_over, method.clip
  )


@functools.lru_cache(maxsize=32)
def _of(
  config: config_lib.Config, island: config_lib.Island, index: int
) -> StageTools:
  programs = stage_programs.StagePrograms(config, island, index)
  method = algorithm_lib.make(config)
  abstract = llama.abstract(config.model)
  own = stage_programs.pick(abstract, programs.names.own)
  held = stage_programs.pick(abstract, programs.names.held)
  compression, codec = method.compression, config.optim.compression.codec

  def init() -> ct.Params:
    params = llama.init(config.model, jax.random.key(config.seed))
    return stage_programs.pick(params, programs.names.held)

  make = jax.jit(init)

  def initial() -> shared_state_lib.SharedState:
    params = make()
    return shared_state_lib.SharedState(params, method.outer.init(params))

  return StageTools(
    config,
    programs,
    method,
    own,
    payload.make_spec(own, compression, codec),
    payload.make_spec(held, compression, codec),
    compressor_lib.Compressor(own, compression, method.error_decay),
    _outer_step(held, method),
    initial,
  )
