"""The compilation of a stage's programs before they are needed."""

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.optim import sparseloco
from covenant.optim import weight
from covenant.train.pipeline import stage as stage_lib
from covenant.train.pipeline import stage_bytes
from covenant.train.pipeline import subspace


def warm_up(stage: stage_lib.Stage) -> None:
  """Compiles a stage's programs by a round of zeros.

  Otherwise those of the outer step would be compiled at the end of the first
  round, while the network waits. The state stays as it was.
  """
  p, kept = stage.programs, (stage.shared, stage.private)
  fitted = min(subspace.FITTED, p.island.steps * p.island.batch)
  microbatch = stage.config.optim.inner.microbatch_size or p.island.batch
  stage.private = jax.tree.map(jnp.copy, stage.private)

  def zeros(abstract: ct.PyTree) -> ct.PyTree:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)

  def tokens(count: int) -> np.ndarray:
    return np.zeros((count, stage.context + 1), np.int32)

  def coordinates(count: int) -> bytes:
    return stage_bytes.to_bytes(zeros(p.coordinates(count, stage.context)))

  wanted = {p.index, 1} if p.index else set()
  fits = {i: stage_bytes.to_bytes(zeros(p.fit_form)) for i in wanted if i}
  stage.begin(tokens(fitted), coordinates(fitted), fits, p.index)
  some, c = tokens(microbatch), coordinates(microbatch)
  is_entry = p.is_first and not p.has_ring
  if p.is_last:
    stage.last(0, some, c, p.index, 1.0)
    if p.has_ring:
      stage.look_up(some)
      stage.backward(0, c)
  else:
    stage.forward(0, some, b'' if is_entry else c, p.index)
    stage.backward(0, c)
  stage.squares()
  stage.update(1.0, 1.0, 0)
  stage.seal()
  stage.shared, stage.private = kept
  shapes = sparseloco.abstract_message(
    stage.shared.params, stage.method.compression
  )
  parts_R = np.full(1, weight.WHOLE, np.uint16)
  stage.outer_step.apply_sum(
    stage.shared.params,
    stage.shared.outer,
    [zeros(shapes)],
    np.ones((1, len(stage.held_spec.tensors)), np.float32),
    parts_R,
    weight.totals(parts_R),
  )
