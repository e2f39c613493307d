"""The compilation of a stage's programs before they are needed."""

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct
from covenant.train.pipeline import stage as stage_lib
from covenant.train.pipeline import stage_bytes


def warm_up(stage: stage_lib.Stage, fitted: int, microbatch: int) -> None:
  """Compiles a stage's programs by a step on zeros; the state stays as it was.

  Args:
    stage: the stage.
    fitted: the number of sequences that boundaries are fitted to.
    microbatch: the sequences of a microbatch.
  """
  p, kept = stage.programs, (stage.shared, stage.private)
  stage.private = jax.tree.map(jnp.copy, stage.private)

  def zeros(abstract: ct.PyTree) -> bytes:
    return stage_bytes.to_bytes(
      jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    )

  def tokens(count: int) -> np.ndarray:
    return np.zeros((count, stage.context + 1), np.int32)

  def coordinates(count: int) -> bytes:
    return zeros(p.coordinates(count, stage.context))

  wanted = {p.index, 1} if p.index else set()
  fits = {i: zeros(p.fit_form) for i in wanted if i}
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
