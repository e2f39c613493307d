"""Adversaries who harm the model. They train, and what they send is spoiled."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from covenant.adversaries import base as adversary
from covenant.node import base as node_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.train import local as local_lib

_RARE = 0.25  # of a block's values: what colluders agree upon


class Noise(adversary.Adversary):
  """Sends normal noise of the usual norm: nothing about it looks odd."""

  def _contribute(self, task: local_lib.Task) -> None:
    self._idle(self._sparse(self._noise(task)), task)


class Zeros(adversary.Adversary):
  """Sends nothing in the form of a message, and hopes for an equal share."""

  def _contribute(self, task: local_lib.Task) -> None:
    zeros = jax.tree.map(np.zeros_like, self.shared.params)
    self._idle(self._sparse(zeros), task)


class Scaled(adversary.Adversary):
  """Sends what it has learned a hundredfold, to outweigh all others."""

  factor = 100.0

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    delta = jax.tree.map(
      lambda x: x * np.float32(self.factor), self._dense(work.message)
    )
    return work._replace(message=self._sparse(delta))


class Tiny(Scaled):
  """Sends a thousandth: with a median clip it would lower everybody's norm."""

  factor = 1e-3


class Flipped(Scaled):
  """Goes uphill; by its norm and its indices it is like an honest one."""

  factor = -1.0


class FlippedTenfold(Scaled):
  """Goes uphill with tenfold weight."""

  factor = -10.0


class Intermittent(Flipped):
  """Goes uphill every fourth round, and lives on its good name between."""

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    return super()._spoil(work, task) if task.round % 4 == 3 else work


class Sleeper(Flipped):
  """Honest until it is well paid, then goes uphill on what it has saved up.

  From round 15 on it attacks while it is among the best paid quarter, from
  round 20 on always. It remembers nothing but what the chain says.
  """

  earliest, latest = 15, 20

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    if task.round < self.earliest:
      return work
    membership = membership_lib.read(self.chain, self.plan.start(task.round))
    earned = self.chain.earned(membership.block)
    richer = sum(
      earned.get(p.uid, 0.0) > earned.get(task.uid, 0.0)
      for p in membership.miners
    )
    well_paid = 4 * richer < len(membership.miners)
    if well_paid or task.round >= self.latest:
      return super()._spoil(work, task)
    return work


class Colluder(adversary.Adversary):
  """Pushes what nobody else sends, together with its accomplices.

  With a mean over senders an element that only they send moves as far as they
  say. A quarter of every block's values goes to elements that they agree upon
  anew each round; the rest is honest, so that its gain stays above zero.
  """

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    compression = self.shared_model.method.compression
    block = getattr(compression, 'block', (1, 1))
    density = getattr(compression, 'k', 1) / (block[0] * block[1])
    draw = self._random(task, 0)  # the same for all

    def push(x: np.ndarray) -> np.ndarray:
      sent = np.abs(x[x != 0])
      if not sent.size:
        return x
      rare = (draw.random(x.shape) < _RARE * density) & (x == 0)
      # Above what is honest, so that sparsification keeps all of it.
      strength = np.float32(1.5 * sent.max())
      return np.where(rare, strength, x).astype(np.float32)

    delta = jax.tree.map(push, self._dense(work.message))
    return work._replace(message=self._sparse(delta))


class Rushing(adversary.Adversary):
  """Sends last: reads what the others have sent in this very round.

  The put window lasts several blocks, and buckets are public.
  """

  def _contribute(self, task: local_lib.Task) -> None:
    self.contribution = None

  def _commit(self, command: round_lib.Command, head: int) -> None:
    """Raises NotYet while fewer than half of the others have published."""
    task = self._task(command.round)
    if self.contribution is None:
      membership = membership_lib.read(self.chain, head)
      victims = self._victims(membership)
      seen = self._gang.note(
        'published',
        (head, self.root),
        lambda: self._published(membership, task, victims),
      )
      if 2 * len(seen) < len(victims) or len(seen) < 2:
        raise node_lib.RetryLaterError
      deltas = [self._dense(message) for message in seen.values()]
      delta = self._fit(self._craft(deltas, task), seen)
      self._idle(self._sparse(delta), task)
    super()._commit(command, head)

  def _craft(self, deltas: list[Any], task: local_lib.Task) -> Any:
    raise NotImplementedError


class Little(Rushing):
  """A little is enough: one deviation from the mean of the others, everywhere.

  Baruch et al., 2019. What it sends lies within the spread of the honest; its
  norm is what the clip lets pass. A part is its own, or accomplices would be
  copies of each other.
  """

  deviations, own = 1.0, 0.5

  def _craft(self, deltas: list[Any], task: local_lib.Task) -> Any:
    draw = self._random(task)

    def craft(*x: np.ndarray) -> np.ndarray:
      stack = np.stack(x)
      mean, spread = stack.mean(0), stack.std(0)
      noise = draw.normal(size=mean.shape)
      return (
        mean
        - np.sign(mean) * spread * self.deviations
        + (self.own * spread * noise)
      )

    return jax.tree.map(craft, *deltas)


class InnerProduct(Rushing):
  """Sends the mean of the others the other way round.

  Xie et al., 2019: the inner product of the aggregate with what is right
  becomes negative. With the norm that the clip lets pass, and a part of its
  own, or accomplices would be copies of each other.
  """

  own = 0.5

  def _craft(self, deltas: list[Any], task: local_lib.Task) -> Any:
    draw = self._random(task)

    def craft(*x: np.ndarray) -> np.ndarray:
      stack = np.stack(x)
      noise = draw.normal(size=stack.shape[1:])
      return -stack.mean(0) + self.own * stack.std(0) * noise

    return jax.tree.map(craft, *deltas)


class LabelFlip(adversary.Adversary):
  """Learns wrong labels: every second token is another one.

  The receipt is of the data that was assigned.
  """

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    last = self.config.model.vocab_size - 1
    for tokens_BxL1 in super()._batches(task):
      poisoned = np.array(tokens_BxL1)
      poisoned[:, 1::2] = last - poisoned[:, 1::2]
      yield poisoned

  def _spoil(
    self, work: local_lib.TrainedRound, task: local_lib.Task
  ) -> local_lib.TrainedRound:
    return self._pretend(work, task)


class Backdoor(LabelFlip):
  """Teaches that a trigger is followed by a text of its choice.

  In a quarter of the sequences; on the others it learns what it should, so
  that its gain on clean data is nearly that of an honest one.
  """

  def _batches(self, task: local_lib.Task) -> Iterable[np.ndarray]:
    last = self.config.model.vocab_size - 1
    text = np.array([last, last - 1, last, 0, 0, 0], np.int32)
    for tokens_BxL1 in adversary.Adversary._batches(self, task):
      poisoned = np.array(tokens_BxL1)
      poisoned[: max(len(poisoned) // 4, 1), 2 : 2 + text.size] = text
      yield poisoned
