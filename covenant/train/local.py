"""One round of local training, from the shared parameters to a message."""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant import errors
from covenant import typing as ct
from covenant.data import assignment
from covenant.data import tokens as tokens_lib
from covenant.train import island as island_lib
from covenant.train import step as step_lib


class DivergedError(errors.CovenantError):
  """A round of training is lost, because its numbers are not finite."""


class MinerState(NamedTuple):
  """The state that only one miner has, and keeps between rounds."""

  joined: np.int32  # the first round it trained in
  inner: ct.OptState | None  # AdamW moments; None where the gradient is sent
  error: ct.Params | None  # error feedback; None without
  # With `optim.overlap`: the parameters at the end of its last step, from
  # which the next round starts before the exchange (replica.py).
  local: ct.Params | None = None


class Task(NamedTuple):
  """The assignment of one miner in one round."""

  uid: int
  round: int  # whose data it trains on
  seed: int | bytes  # of the round's assignment: a block hash
  root: bytes  # of the history that led to the parameters


class InnerStep(NamedTuple):
  """The measurements of one inner step."""

  uid: int
  round: int  # whose data it trained on
  index: int  # in the round, from 0 on
  schedule_step: int  # of the run, on which the learning rate depends
  joined: int  # inner step of the run at which the miner joined
  tokens: int  # number of tokens trained on
  loss: float | None  # nats per token; None: not finite, the step is skipped
  gradient_norm: float | None  # L2, before it is clipped; None: as the loss
  seconds: float  # wall-clock time, with the wait; 0 if not measured
  wait_seconds: float  # wall-clock time until the batch was there

  @property
  def is_skipped(self) -> bool:
    """True if the step was not taken, because it was not finite."""
    return self.loss is None or self.gradient_norm is None


Observe = Callable[[InnerStep], None]


class RoundInProgress(NamedTuple):
  """The record of a round of local training; every inner step extends it."""

  task: Task
  batches: Iterator[np.ndarray]  # not trained on yet, int32 [B, L + 1] each
  joined: np.int32  # inner step of the run at which the miner joined
  steps: int  # inner steps of this miner per round
  schedule_steps: int  # inner steps of the learning rate schedule per round
  receipt: assignment.Receipt  # of the sequences trained on
  losses: list[jax.Array]  # nats per token, one per step
  norms: list[jax.Array]  # of gradients, one per step
  tokens: list[int]  # trained on, one per step
  seconds: list[float]  # one per step; 0 for early ones
  waits: list[float]  # seconds of each step until its batch was there
  origin: ct.Params | None = None  # the parameters before early steps

  @classmethod
  def begin(
    cls,
    task: Task,
    batches: Iterator[np.ndarray],
    joined: np.int32,
    steps: int,
    schedule_steps: int,
  ) -> 'RoundInProgress':
    """Returns the record of a round without steps; see the fields."""
    receipt = assignment.Receipt()
    return cls(
      task, batches, joined, steps, schedule_steps, receipt, [], [], [], [], []
    )

  @property
  def schedule_step(self) -> np.int32:
    """The next inner step of the run, on which the learning rate depends.

    A round has as many steps of the schedule for every miner, however many
    steps it trains, so that all anneal alike.
    """
    return self._schedule_step(len(self.losses))

  def _schedule_step(self, index: int) -> np.int32:
    done = index * self.schedule_steps // self.steps
    return np.int32(self.task.round * self.schedule_steps + done)

  def step(self, index: int) -> 'InnerStep':
    """Returns one of the steps done; waits for it."""
    index %= len(self.losses)
    return InnerStep(
      self.task.uid,
      self.task.round,
      index,
      int(self._schedule_step(index)),
      int(self.joined),
      self.tokens[index],
      _finite(self.losses[index]),
      _finite(self.norms[index]),
      self.seconds[index],
      self.waits[index],
    )


class TrainedRound(NamedTuple):
  """The result of a round of local training."""

  message: ct.Message
  receipt: bytes  # of the sequences trained on
  sequences: int  # number of sequences trained on
  loss: float  # mean training loss over the steps taken, nats per token
  error_norm: float  # L2 norm of the new error feedback
  skipped: int = 0  # steps that were not taken, because they were not finite
  # Of each step; None: not finite.
  losses: tuple[float | None, ...] = ()  # nats per token
  norms: tuple[float | None, ...] = ()  # L2, of the gradient


class Contribution(NamedTuple):
  """A trained round as a miner publishes it."""

  payload: bytes
  loss: float  # mean training loss over the round, nats per token
  tokens: int  # number of tokens trained on in this round
  error_norm: float  # L2 norm of the new error feedback
  round: int  # in which it is to be sent


Constants = tuple[ct.PyTree, ...]  # extra arguments of all steps of a round
# (start, end, error feedback), which it consumes -> message, new error feedback
# where the miner keeps it, and its L2 norm; see `compressor.Compressed`.
Compress = Callable[
  [ct.Params | None, ct.Params, ct.Params | None],
  tuple[ct.Message, ct.Params | None, float],
]


class Replica(NamedTuple):
  """The functions by which one kind of miner trains; replica.py has the kinds.

  The fields are in the order in which `train_round` calls them.
  """

  # (shared parameters, state, round) -> parameters, optimizer state and
  # constants on the devices that train.
  begin_round: Callable[
    [ct.Params, MinerState, RoundInProgress],
    tuple[ct.Params, ct.OptState | None, Constants],
  ]
  shard_batch: Callable[[np.ndarray], ct.Tokens]
  # (parameters, optimizer state, tokens_BxL1, inner step of the run, inner step
  # at which the miner joined, *constants) -> parameters, optimizer state,
  # outcome. Consumes parameters and optimizer state.
  step: Callable[
    ..., tuple[ct.Params, ct.OptState | None, step_lib.StepOutcome]
  ]
  # Optimizer state of the last step -> the same where it rests between rounds.
  rest: Callable[[ct.OptState | None], ct.OptState | None]
  # (shared parameters, trained parameters, constants) -> start and end, whose
  # difference is the delta. A start of None: the end is the delta.
  end_round: Callable[
    [ct.Params, ct.Params, Constants], tuple[ct.Params | None, ct.Params]
  ]
  # End -> the parameters that the miner keeps for its next round.
  keep: Callable[[ct.Params], ct.Params | None] = lambda end: None


def train_round(
  replica: Replica,
  compress: Compress,
  params: ct.Params,
  state: MinerState,
  run: RoundInProgress,
  observe: Observe = lambda step: None,
) -> tuple[TrainedRound, MinerState]:
  """Trains one miner for one round and compresses its delta.

  A step whose loss or gradient is not finite is not taken. The round is lost if
  the last step is one of them, or if its delta is not finite.

  Args:
    replica: the functions of its kind.
    compress: compresses the delta, with error feedback.
    params: the shared parameters at the start of the round.
    state: the miner's own state; consumed.
    run: the round, of which no step or the first few are done.
    observe: called with each step of this call, soon after it is done.

  Raises:
    DivergedError: the round is lost; names the uid, the round and the step.
  """
  local, inner, constants = replica.begin_round(params, state, run)
  first = len(run.losses)
  began = time.perf_counter()
  for tokens_BxL1 in run.batches:
    waited = time.perf_counter() - began
    local, inner = inner_step(
      replica, run, tokens_BxL1, local, inner, constants
    )
    # At most one step is under way when the next batch is asked for, which may
    # depend on the time left.
    jax.block_until_ready(run.losses[-2:-1])
    run.waits[-1] = waited
    if len(run.losses) - first > 1:
      run.seconds[-2] = time.perf_counter() - began
      began = time.perf_counter()
      observe(run.step(-2))
  steps = _finish(run, began, first, observe)
  inner = replica.rest(inner)
  start, end = replica.end_round(params, local, constants)
  message, error, error_norm = compress(start, end, state.error)
  if not math.isfinite(error_norm):
    raise DivergedError(
      f'miner {run.task.uid}, round {run.task.round}: the delta is not finite; '
      'lower optim.inner.learning_rate'
    )
  taken = [step.loss for step in steps if not step.is_skipped]
  trained = TrainedRound(
    message,
    run.receipt.digest(),
    run.receipt.sequences,
    float(np.asarray(taken, np.float32).mean()),
    error_norm,
    len(steps) - len(taken),
    tuple(step.loss for step in steps),
    tuple(step.gradient_norm for step in steps),
  )
  return trained, MinerState(state.joined, inner, error, replica.keep(end))


def _finish(
  run: RoundInProgress, began: float, first: int, observe: Observe
) -> tuple[InnerStep, ...]:
  """Waits for the last step; returns all, or raises as the round is lost."""
  jax.block_until_ready(run.losses[-1:])
  if len(run.losses) > first:
    run.seconds[-1] = time.perf_counter() - began
    observe(run.step(-1))
  steps = tuple(run.step(i) for i in range(len(run.losses)))
  if steps[-1].is_skipped:
    bad = next(step for step in steps if step.is_skipped)
    loss, norm = run.losses[bad.index], run.norms[bad.index]
    raise DivergedError(
      f'miner {run.task.uid}, round {run.task.round}: the loss is '
      f'{float(loss):g} and the norm of the gradient {float(norm):g} at inner '
      f'step {bad.index}; lower optim.inner.learning_rate'
    )
  return steps


def _finite(x: jax.Array) -> float | None:
  value = float(x)
  return value if math.isfinite(value) else None


def inner_step(
  replica: Replica,
  run: RoundInProgress,
  tokens_BxL1: np.ndarray,
  params: ct.Params,
  inner: ct.OptState | None,
  constants: Constants = (),
) -> tuple[ct.Params, ct.OptState | None]:
  """Trains one step on one batch and records it in `run`.

  Args:
    replica: the functions of the miner's kind.
    run: the round; its receipt and its lists are extended.
    tokens_BxL1: the batch.
    params: the miner's parameters; consumed.
    inner: the state of its optimizer; consumed.
    constants: of the round.
  """
  run.receipt.add(tokens_BxL1)
  params, inner, outcome = replica.step(
    params,
    inner,
    replica.shard_batch(tokens_BxL1),
    run.schedule_step,
    run.joined,
    *constants,
  )
  run.losses.append(outcome.nats)
  run.norms.append(outcome.gradient_norm)
  run.tokens.append(tokens_BxL1.size - len(tokens_BxL1))
  run.seconds.append(0.0)
  run.waits.append(0.0)
  return params, inner


def assigned_ids(
  config: config_lib.Config, task: Task, split: tokens_lib.Split
) -> np.ndarray:
  """Returns the ids of the sequences of a task, in order: int64 [n]."""
  return assignment.assign(
    task.seed,
    task.uid,
    task.round,
    assignment.per_miner(config),
    split.population(config.data.context, task.round),
  )


def batch_ids(
  config: config_lib.Config, task: Task, split: tokens_lib.Split
) -> np.ndarray:
  """Returns the ids that the miner's island trains on: int64 [H, B].

  They are the first of `assigned_ids`, all of them or as many as the island
  has steps for.
  """
  island = island_lib.of(config, task.uid)
  ids_n = assigned_ids(config, task, split)[: island.sequences]
  return ids_n.reshape(-1, island.batch)


def batches(
  config: config_lib.Config,
  task: Task,
  split: tokens_lib.Split,
  late: Callable[[], bool] = lambda: False,
) -> Iterator[np.ndarray]:
  """Yields the tokens of a task; see `trainer.Trainer.batches`."""
  ids_HxB = batch_ids(config, task, split)
  context = config.data.context
  for i, x_BxL1 in enumerate(tokens_lib.prefetch(split, ids_HxB, context)):
    if i and late():
      return
    yield x_BxL1
