"""Miners that harm nobody, and want more pay than their work is worth.

A `Strategy` is a point in the space that `experiments.best_response` searches.
Each trains on its assigned data, and deviates from the protocol in what it
keeps, how much it does, and what it sends. The registry names some; any other
runs as `--config.adversaries=strategy:error=0+norm=1+work=0.5`.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.adversaries import base
from covenant.adversaries import messages
from covenant.data import tokens as tokens_lib
from covenant.node import miner as miner_lib
from covenant.train import local as local_lib
from covenant.train import trainer as trainer_lib

Batches = miner_lib.Batches
Future = base.Future
Miner = miner_lib.Miner
Policy = miner_lib.MinerPolicy
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound


_SLOT = 'trainer'  # the name of the note that it has a trainer of its own


class Strategy(NamedTuple):
  """A way to deviate; the defaults are those of an honest miner.

  Attributes:
    error: the fraction of the error feedback that it keeps.
    norm: the norm of its message, in those of the median one of the round
      before; 0: as it comes.
    mask: the fraction of elements, its own choice, that it ever sends.
    work: the fraction of its inner steps that it does; it claims all.
    repeats: how often it trains on each sequence, a whole number.
    mix: weight of the others' mean message of the round before.
    period: it trains in one of so many rounds, a whole number, and sends noise
      in the others.
    batch: its sequences per inner step, relative to the protocol's; it does as
      many fewer steps.
    rate: its inner learning rate, relative to the protocol's.
    pieces: the number of equal pieces into which it cuts each sequence; it
      trains on each as on a sequence of its own.
    length: the fraction of each piece that it trains on.
    start: where this part begins, relative to the piece; below 0: at the start
      or at the end of the piece, by lot.
  """

  error: float = 1.0
  norm: float = 0.0
  mask: float = 1.0
  work: float = 1.0
  repeats: float = 1
  mix: float = 0.0
  period: float = 1
  batch: float = 1.0
  rate: float = 1.0
  pieces: float = 1
  length: float = 1.0
  start: float = 0.0

  def __str__(self) -> str:
    """The fields that are not honest ones, as `parse` reads them."""
    pairs = zip(self._asdict().items(), Strategy(), strict=True)
    return '+'.join(f'{k}={v:g}' for (k, v), usual in pairs if v != usual)

  @classmethod
  def parse(cls, text: str) -> 'Strategy':
    """Parses fields such as 'error=0+work=0.5'.

    Raises:
      ConfigError: a field does not exist, or has no such value.
    """
    usual, found = cls()._asdict(), dict[str, float]()
    for part in filter(None, text.split('+')):
      name, _, value = part.partition('=')
      try:
        found[name] = type(usual[name])(value)
      except (KeyError, ValueError):
        raise config_lib.ConfigError(
          f'adversaries: expected fields of a strategy, such as error=0 or '
          f'work=0.5, joined by +, got {part!r}; there are {", ".join(usual)}'
        ) from None
    made = cls(**found)
    parts = (made.work, made.length)
    whole = (made.repeats, made.period, made.pieces)
    if not (
      all(0 < x <= 1 for x in parts)
      and all(x >= 1 for x in whole)
      and min(made.batch, made.rate) > 0
      and made.start + made.length <= 1
    ):
      raise config_lib.ConfigError(
        'adversaries: expected work and length above 0 and at most 1, start '
        'and length together at most 1, repeats, period and pieces of at least '
        f'1, batch and rate above 0, got {text!r}'
      )
    return made

  @property
  def cost(self) -> float:
    """The tokens it trains on, relative to those of an honest miner."""
    return self.work * self.repeats * self.length / self.period


# The fields that do not change the tokens that are trained on.
_OTHER = {
  name: value
  for name, value in Strategy()._asdict().items()
  if name not in ('work', 'repeats', 'batch', 'pieces', 'length', 'start')
}


def strategist(policy: Policy, strategy: Strategy) -> Policy:
  """Follows a strategy."""

  def batches(miner: Miner, task: Task) -> Batches:
    if strategy._replace(**_OTHER) == Strategy():
      return policy.batches(miner, task)
    split, context = miner.role.slot.trainer.split, miner.config.data.context
    ids_HxB = local_lib.batch_ids(miner.config, task, split)
    steps = max(round(len(ids_HxB) * strategy.work), 1)
    ids_N = np.tile(ids_HxB[:steps], (int(strategy.repeats), 1)).reshape(-1)
    size = max(round(ids_HxB.shape[1] * strategy.batch), 1)
    ids_HxB = ids_N[: len(ids_N) // size * size].reshape(-1, size)
    pieces = int(strategy.pieces)
    span = context // pieces
    width = max(round(span * strategy.length), 1) + 1
    draw = np.random.default_rng([miner.config.seed, task.uid, task.round])

    def part(tokens_BxL1: np.ndarray) -> np.ndarray:
      first_BxP = np.tile(np.arange(pieces) * span, (len(tokens_BxL1), 1))
      if strategy.start < 0:
        first_BxP += draw.integers(2, size=first_BxP.shape) * (span + 1 - width)
      else:
        first_BxP += min(round(span * strategy.start), span + 1 - width)
      columns_BxPW = (first_BxP[:, :, None] + np.arange(width)).reshape(
        len(tokens_BxL1), -1
      )
      chosen_BxPW = np.take_along_axis(tokens_BxL1, columns_BxPW, axis=1)
      return chosen_BxPW.reshape(-1, width)

    return map(part, tokens_lib.prefetch(split, ids_HxB, context))

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    if task.round % strategy.period:
      work = base.untrained(miner, task, messages.noise(miner, task))
      return Future.done(work)
    _keep_error(miner, strategy.error)
    _learn_at(miner, strategy.rate)
    done = policy.train(miner, task, params, batches)
    return done.then(lambda work: work and _disguise(miner, task, work))

  def _disguise(miner: Miner, task: Task, work: TrainedRound) -> TrainedRound:
    message = _message(miner, task, work.message, strategy)
    return base.pretended(miner, task, work._replace(message=message))

  return policy._replace(batches=batches, train=train)


def _learn_at(miner: Miner, rate: float) -> None:
  """Has the miner train with devices of its own, at another learning rate."""
  if rate == 1 or _SLOT in miner.role.notes:
    return
  optim, split = miner.config.optim, miner.role.slot.trainer.split
  inner = dataclasses.replace(
    optim.inner, learning_rate=optim.inner.learning_rate * rate
  )
  config = dataclasses.replace(
    miner.config, optim=dataclasses.replace(optim, inner=inner)
  )
  model = config.model
  data = tokens_lib.TokenData(split, split, model.vocab_size, 0)
  trainer = trainer_lib.Trainer(config, miner.shared_model, data)
  miner.role.slot = miner_lib.LocalSlot(trainer)
  miner.role.notes[_SLOT] = trainer


def _keep_error(miner: Miner, part: float) -> None:
  state = miner.role.miner_state.result()
  if part != 1 and state.error is not None:
    error = jax.tree.map(lambda x: x * np.float32(part), state.error)
    miner.role.miner_state = Future.done(state._replace(error=error))


def _message(
  miner: Miner, task: Task, message: ct.Message, strategy: Strategy
) -> ct.Message:
  """Returns what is sent instead of an honest message."""
  if (strategy.norm, strategy.mask, strategy.mix) == (0, 1, 0):
    return message
  delta = messages.dense(miner, message)
  error = miner.role.miner_state.result().error
  if strategy.mask < 1 and error is not None:
    # All that it learned, of which it sends the largest of its elements.
    whole = jax.tree.map(lambda x, e: x + e, delta, jax.device_get(error))
    draw = np.random.default_rng([miner.config.seed, task.uid])
    delta = jax.tree.map(
      lambda x: np.where(draw.random(x.shape) < strategy.mask, x, 0), whole
    )
  if strategy.mix and miner.messages:
    others = [messages.dense(miner, m) for m in miner.messages.values()]
    part = np.float32(strategy.mix / len(others))
    delta = jax.tree.map(lambda x, *o: x + part * sum(o), delta, *others)
  if strategy.norm and miner.messages:
    delta = messages.fit(miner, delta, miner.messages)
    delta = jax.tree.map(lambda x: x * np.float32(strategy.norm), delta)
  delta = jax.tree.map(lambda x: np.asarray(x, np.float32), delta)
  return messages.sparse(miner, delta)


def shadow(policy: Policy, first: int = 10) -> Policy:
  """Repeats another's training to have its message blamed as a copy.

  It trains on the data of the miner with the lowest uid from the start, so that
  its state is the other's, and sends from round `first` on.
  """

  def batches(miner: Miner, task: Task) -> Batches:
    gang = base.accomplices(miner).names
    victim = min(u for u in range(miner.config.miners) if u not in gang)
    return policy.batches(miner, task._replace(uid=victim))

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    done = policy.train(miner, task, params, batches)
    return done.then(
      lambda work: (
        None
        if work is None or task.round < first
        else base.pretended(miner, task, work)
      )
    )

  return base.untrusted(policy)._replace(batches=batches, train=train)
