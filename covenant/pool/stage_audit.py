"""The audit of a pipeline's stages: sampled microbatches, computed again.

The head makes a stage's shared parameters of the round itself, from the orders
as every newcomer does, and sends a sampled microbatch through them. In the
first inner step of a round a stage trains from these parameters, so that on the
same hardware its coordinates must be equal. Later it has moved away from them,
in a model that diverges far away: its coordinates must still be more like these
than made-up numbers are, whose cosine is within a few 1 / sqrt(n) of zero.
"""

from collections.abc import Callable, Mapping

import numpy as np

from covenant import config as config_lib
from covenant.optim import weight
from covenant.pool import orders as orders_lib
from covenant.pool import stage_keeper
from covenant.pool import stage_work
from covenant.train.pipeline import stage as stage_lib

FARTHEST = 0.3  # distance that other hardware may cause, relative to the norm
CHANCE = 4.0  # standard deviations that a later cosine must be above chance


class Auditor:
  """Computes microbatches again; holds one stage at a time.

  Args:
    config: the config of the run.
    island: the pipeline.
    log: the orders.
    part: returns the part of an order for a stage.
    read: returns the payload of a source.
    load: returns the bytes of tensors of a checkpoint.
  """

  def __init__(
    self,
    config: config_lib.Config,
    island: config_lib.Island,
    log: orders_lib.OrderLog,
    part: Callable[[orders_lib.Order, int], orders_lib.Order],
    read: Callable[[orders_lib.Source], bytes],
    load: stage_keeper.LoadTensors,
  ):
    self._config, self._island = config, island
    self._log, self._part, self._read, self._load = log, part, read, load
    self._stage: stage_lib.Stage | None = None
    self._number, self._id, self._square = 0, '', 0.0

  def outer_step(self, index: int) -> tuple[dict[str, list[str]], float]:
    """Takes the outer steps of a stage that has no holder.

    Returns:
      The digests of its tensors after the last order, and the sum of squares of
      its part of the last aggregated delta.

    Raises:
      OrderError, StoreError: as `is_honest`.
    """
    stage = self._at(index)
    return stage.digests(), self._square

  def is_honest(
    self,
    sample: stage_work.Sample,
    fitted_BxL1: np.ndarray,
    fits: Mapping[int, bytes],
  ) -> bool:
    """Returns whether a stage sent the output of its layers.

    The tokens and the fits are those of the round; see `StageRound`.

    Raises:
      OrderError, StoreError: the state of the stage cannot be made.
    """
    stage = self._at(sample.stage)
    s = sample.stage
    used = {s, s + 1, 1, sample.crossed}
    given = {i: fits[i] for i in fits if i in used}
    stage.begin(fitted_BxL1, b'', given, sample.crossed)
    work = 0, sample.tokens_bxL1, sample.came, sample.crossed
    if stage.programs.is_last:
      again, _ = stage.last(*work, sample.divisor)
    else:
      again = stage.forward(*work)
      if sample.given:
        again = stage.backward(0, sample.given)
    stage.abort()
    is_gradient = stage.programs.is_last or bool(sample.given)
    if again == sample.sent or (is_gradient and sample.step):
      return True  # later gradients are too far from those of this state
    want, got = (
      stage.numbers(sample.tokens_bxL1, data) for data in (again, sample.sent)
    )
    return is_alike(want, got, sample.step)

  def _at(self, index: int) -> stage_lib.Stage:
    """Returns a stage at the end of the log."""
    stage = self._stage
    if (
      stage is None
      or stage.programs.index != index
      or self._log.state(self._number) != self._id
    ):
      stage = stage_lib.Stage(self._config, self._island, index)
      base = self._log.base
      stage_keeper.begin_from(stage, base.files, base.places, self._load)
      self._stage, self._number, self._id = stage, base.number, base.id
      self._square = 0.0
    while (order := self._log.get(self._number)) is not None:
      part = self._part(order, index)
      sections = [orders_lib.cut(self._read(s), s) for s in part.sources]
      totals = weight.totals(part.parts_R)
      stage.follow(part.changes)
      update = stage_lib.StageUpdate(part.factors_RxP, part.parts_R, totals)
      self._square = stage.apply(sections, update)
      self._number, self._id = self._number + 1, order.after
    return stage


def is_alike(want: np.ndarray, got: np.ndarray, step: int) -> bool:
  """Returns whether the output of a stage may come from honest training.

  Args:
    want: the output for the microbatch by the round's shared parameters.
    got: the output that the stage sent, of the same shape.
    step: the inner step, from 0.
  """
  want, got = want.astype(np.float64), got.astype(np.float64)  # no overflow
  if not np.isfinite(got).all():
    return False
  norm = np.linalg.norm(want)
  if not step:
    return bool(np.linalg.norm(got - want) <= FARTHEST * norm)
  cosine = np.sum(got * want) / max(norm * np.linalg.norm(got), 1e-30)
  return bool(cosine >= CHANCE / np.sqrt(want.size))
