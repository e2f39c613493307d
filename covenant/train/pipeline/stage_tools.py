"""The compiled tools of a stage, made once per process."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import llama
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import compressor as compressor_lib
from covenant.optim import outer_step as outer_step_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train.pipeline import stage_programs
from covenant.wire import payload


class StageTools(NamedTuple):
  """The parts without state that equal stages share in a process."""

  programs: stage_programs.StagePrograms
  method: algorithm_lib.Algorithm
  own: ct.Params  # shapes
  spec: payload.Spec  # of its own tensors
  held_spec: payload.Spec  # the same with the embedding
  compressor: compressor_lib.Compressor
  outer_step: outer_step_lib.OuterStep
  initial: Callable[[], shared_state_lib.SharedState]


def of(
  config: config_lib.Config, island: config_lib.Island, index: int
) -> StageTools:
  """Returns the tools of a stage; their programs are compiled once.

  Where the stage is, and to whom it talks, makes no difference.
  """
  pool, network = config_lib.Pool(), config_lib.Network()
  alike = dataclasses.replace(config, pool=pool, network=network)
  return _of(alike, island, index)


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
    programs,
    method,
    own,
    payload.make_spec(own, compression, codec),
    payload.make_spec(held, compression, codec),
    compressor_lib.Compressor(own, compression, method.error_decay),
    outer_step_lib.OuterStep(
      held, compression, method.outer, method.mean_over, method.clip
    ),
    initial,
  )
