"""Honest miners who are worse off than others. They must not be punished."""

import itertools
from collections.abc import Iterable

import numpy as np

from covenant.adversaries import base as adversary
from covenant.data import tokens as tokens_lib
from covenant.node import base as node_lib
from covenant.protocol import round as round_lib
from covenant.train import island as island_lib
from covenant.train import local as local_lib


class Slow(adversary.Adversary):
  """Is ready for the very last block of the window."""

  honest = True

  def _commit(self, command: round_lib.Command, head: int) -> None:
    """Raises NotYet until it is the last moment."""
    if head < self.plan.put_closes(command.round) - 1:
      raise node_lib.RetryLaterError
    super()._commit(command, head)


class Joiner(adversary.Adversary):
  """Begins to train in round 10."""

  honest, first = True, 10

  def _contribute(self, task: local_lib.Task) -> None:
    if task.round >= self.first:
      super()._contribute(task)


class MissedOne(adversary.Adversary):
  """Misses round 7, and no other."""

  honest, missed = True, 7

  def _contribute(self, task: local_lib.Task) -> None:
    super()._contribute(task)
    if task.round == self.missed:
      self.contribution = None


class SmallBatch(adversary.Adversary):
  """Trains on half of its sequences, in batches half as large, and says so."""

  honest = True

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    ids_HxB = local_lib.batch_ids(self.config, task, self._trainer.split)
    ids_n = ids_HxB.reshape(-1)[: max(ids_HxB.size // 2, 1)]
    batches = np.array_split(ids_n, min(len(ids_HxB), len(ids_n)))
    context = self.config.data.context
    return tokens_lib.prefetch(self._trainer.split, batches, context)


class Straggler(adversary.Adversary):
  """Has no time left after some of its inner steps, more or fewer each round.

  As a real one when the put window opens before it is done.
  """

  honest = True

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    steps = island_lib.of(self.config, task.uid).steps
    done = int(self._random(task).integers(1, steps + 1))
    return itertools.islice(super()._batches(task), done)


class LittleData(adversary.Adversary):
  """Has fetched half of its sequences only; trains on each of them twice."""

  honest = True

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    ids_HxB = local_lib.batch_ids(self.config, task, self._trainer.split)
    half = ids_HxB.reshape(-1)[: max(ids_HxB.size // 2, 1)]
    again = np.resize(half, ids_HxB.shape)
    context = self.config.data.context
    return tokens_lib.prefetch(self._trainer.split, again, context)

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    """The receipt is of what it read, once."""
    half = max(work.sequences // 2, 1)
    return self._pretend(work, task, half)


class Churner(adversary.Adversary):
  """Is away a third of the time, in spells, and comes back with nothing.

  As when another machine takes over: no moments, no error feedback.
  """

  honest, spell, away = True, 6, 1 / 3

  def _contribute(self, task: local_lib.Task) -> None:
    self.contribution = None
    if not self._is_here(task, task.round):
      return
    if task.round and not self._is_here(task, task.round - 1):
      self.private = self._fresh()
    super()._contribute(task)

  def _is_here(self, task: local_lib.Task, round_index: int) -> bool:
    spell = (round_index + task.uid) // self.spell  # not all at a time
    draw = np.random.default_rng([self.config.seed, task.uid, spell])
    return draw.random() >= self.away
