"""Honest miners that are worse off than others and must not be punished."""

import itertools

import numpy as np

from covenant import typing as ct
from covenant.adversaries import base
from covenant.adversaries import messages
from covenant.data import tokens as tokens_lib
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.protocol import round as round_lib
from covenant.train import island as island_lib
from covenant.train import local as local_lib

Batches = miner_lib.Batches
Future = node_lib.Future
Miner = miner_lib.Miner
Policy = miner_lib.MinerPolicy
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound


def slow(policy: Policy) -> Policy:
  """Is ready only for the last block of the put window."""

  def commit(miner: Miner, command: round_lib.Command, head: int) -> None:
    if head < miner.schedule.put_closes(command.round) - 1:
      raise node_lib.RetryLaterError
    policy.commit(miner, command, head)

  return policy._replace(commit=commit)


def joiner(policy: Policy, first: int = 10) -> Policy:
  """Begins to train in round `first`."""

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    if task.round < first:
      return Future.done(None)
    return policy.train(miner, task, params, batches)

  return policy._replace(train=train)


def missed_one(policy: Policy, missed: int = 7) -> Policy:
  """Trains in round `missed` but sends nothing."""

  def seal(
    miner: Miner, task: Task, work: TrainedRound
  ) -> local_lib.Contribution | None:
    return None if task.round == missed else policy.seal(miner, task, work)

  return policy._replace(seal=seal)


def small_batch(policy: Policy) -> Policy:
  """Trains on half of its sequences, in half the batches, and says so."""

  def batches(miner: Miner, task: Task) -> Batches:
    split, context = miner.role.slot.trainer.split, miner.config.data.context
    ids_HxB = local_lib.batch_ids(miner.config, task, split)
    ids_n = ids_HxB.reshape(-1)[: max(ids_HxB.size // 2, 1)]
    parts = np.array_split(ids_n, min(len(ids_HxB), len(ids_n)))
    return tokens_lib.prefetch(split, parts, context)

  return policy._replace(batches=batches)


def straggler(policy: Policy) -> Policy:
  """Runs out of time after some of its inner steps, a number by chance.

  A real one does when the put window opens before it is done.
  """

  def change(miner: Miner, task: Task, batches: Batches) -> Batches:
    steps = island_lib.of(miner.config, task.uid).steps
    done = int(messages.generator(miner, task).integers(1, steps + 1))
    return itertools.islice(batches, done)

  return base.rebatched(policy, change)


def little_data(policy: Policy) -> Policy:
  """Has fetched only half of its sequences; trains on each of them twice."""

  def batches(miner: Miner, task: Task) -> Batches:
    split, context = miner.role.slot.trainer.split, miner.config.data.context
    ids_HxB = local_lib.batch_ids(miner.config, task, split)
    half = ids_HxB.reshape(-1)[: max(ids_HxB.size // 2, 1)]
    again = np.resize(half, ids_HxB.shape)
    return tokens_lib.prefetch(split, again, context)

  def spoil(miner: Miner, task: Task, work: TrainedRound) -> TrainedRound:
    """The receipt is of each sequence once."""
    half = max(work.sequences // 2, 1)
    return base.pretended(miner, task, work, half)

  return base.spoiled(policy._replace(batches=batches), spoil)


def churner(policy: Policy, spell: int = 6, away: float = 1 / 3) -> Policy:
  """Is away for a share of the time, in spells, and returns with nothing.

  Another machine takes over, without moments or error feedback.

  Args:
    policy: the policy to change.
    spell: rounds.
    away: the share of spells in which it is away.
  """

  def is_here(miner: Miner, task: Task, round_index: int) -> bool:
    number = (round_index + task.uid) // spell  # not all at a time
    draw = np.random.default_rng([miner.config.seed, task.uid, number])
    return draw.random() >= away

  def train(
    miner: Miner, task: Task, params: ct.Params, batches: Batches
  ) -> Future[TrainedRound | None]:
    if not is_here(miner, task, task.round):
      return Future.done(None)
    if task.round and not is_here(miner, task, task.round - 1):
      fresh = miner.role.slot.init(params, task.round)
      miner.role.miner_state = Future.done(fresh)
    return policy.train(miner, task, params, batches)

  return policy._replace(train=train)
