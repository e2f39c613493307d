"""What a miner computes in a round: train on its data, send what matters.

One `Trainer` holds compiled functions and no state: a process runs one miner
through it, the emulator runs many, each with its own `MinerState` state.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import errors
from covenant.data import assignment
from covenant.data import receipt as receipt_lib
from covenant.data import tokens as tokens_lib
from covenant.models import sharding
from covenant.optim import sender as sender_lib
from covenant.optim import sparseloco
from covenant.train import course as course_lib
from covenant.train import island as island_lib
from covenant.train import placement as placement_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import step as step_lib
from covenant.train.pipeline import gpipe
from covenant.train.pipeline import subspace
from covenant.wire import payload


class DivergedError(errors.CovenantError):
  """Training produced a number that is not one."""


class MinerState(NamedTuple):
  """What only one miner knows, and keeps between rounds."""

  joined: np.int32  # the first round it trained in
  inner: Any  # AdamW moments; None where the gradient is sent
  error: Any  # error feedback; None without
  # With `optim.overlap`: where its parameters have got to, from which it goes
  # on until the last round is exchanged.
  local: Any = None


Late = Callable[[], bool]  # whether no time is left for another step


class Task(NamedTuple):
  """Who trains in which round, on what."""

  uid: int
  round: int  # in which it begins, and whose data it trains on
  seed: int | bytes  # of the round's assignment: a block hash
  root: bytes  # of the history that led to the parameters
  ahead: int = 0  # rounds by which it is sent later

  @property
  def due(self) -> int:
    """The round in which it is sent."""
    return self.round + self.ahead


class RoundInProgress(NamedTuple):
  """A task under way."""

  task: Task
  batches: Iterator[np.ndarray]  # those that are left
  receipt: receipt_lib.Receipt
  losses: list[Any]  # of the steps so far
  origin: Any  # the parameters that it went out from; see `Trainer.begin`

  @classmethod
  def of(
    cls, task: Task, batches: Iterable[np.ndarray], origin: Any = None
  ) -> 'RoundInProgress':
    return cls(task, iter(batches), receipt_lib.Receipt(), [], origin)


class TrainedRound(NamedTuple):
  """What a round of training led to."""

  message: Any
  receipt: bytes  # of what it was trained on
  sequences: int
  loss: float  # mean training loss over the round, nats a token
  error_norm: float  # L2 norm of the error feedback left behind


class Contribution(NamedTuple):
  payload: bytes
  loss: float  # mean training loss over the round, nats a token
  tokens: int  # trained in this round
  error_norm: float  # L2 norm of the error feedback left behind
  round: int  # in which it is to be sent


def assigned_ids(
  config: config_lib.Config, task: Task, split: tokens_lib.Split
) -> np.ndarray:
  """The ids of the sequences that a task may train on, in order: int64 [n]."""
  return assignment.assign(
    task.seed,
    task.uid,
    task.round,
    assignment.per_miner(config),
    split.num_sequences(config.data.context),
  )


def batch_ids(
  config: config_lib.Config, task: Task, split: tokens_lib.Split
) -> np.ndarray:
  """Those of which an island has the time to train: int64 [H, B]."""
  island = island_lib.of(config, task.uid)
  ids_n = assigned_ids(config, task, split)[: island.sequences]
  return ids_n.reshape(-1, island.batch)


class Trainer:
  """Trains from the shared parameters, compiled once for all miners.

  Args:
    config: of the run.
    shared_model: of the run.
    data: to train on.
    mesh: of the miner (covenant/models/sharding.py). Several processes may own
      it, if all call alike. The sums of several devices are rounded otherwise
      than those of one; a mesh of one computes what None does, on its device.
      None: the default device alone. Of a mesh with the axis 'stage' a
      pipeline has a device a stage, and any other island the first.

  Raises:
    ConfigError: the model or the batch cannot be cut so.
  """

  def __init__(
    self,
    config: config_lib.Config,
    shared_model: shared_state_lib.SharedModel,
    data: tokens_lib.TokenData,
    mesh: jax.sharding.Mesh | None = None,
  ):
    self._config = config
    self._shared_model = shared_model
    self.split = data.train
    stages = None
    if mesh is not None and gpipe.AXIS in mesh.axis_names:
      mesh, stages = placement_lib.home(mesh), mesh
    self._placement = placement_lib.Placement(mesh, config.devices.offload)
    home = self._placement.home_mesh
    mesh = self._placement.mesh
    method = shared_model.method
    if method.inner is None:
      self._gradient = step_lib.gradient(config, mesh)
    else:
      islands = (island_lib.of(config, uid) for uid in range(config.miners))
      self._courses = {
        island: course_lib.make(config, method, self._placement, island, stages)
        for island in dict.fromkeys(map(_kind, islands))
      }
      if config.optim.overlap and any(i.rank for i in self._courses):
        raise config_lib.ConfigError(
          'islands: expected no rank with optim.overlap='
          f'{config.optim.overlap}: what passes between stages is told from '
          'the shared parameters, which are not there yet'
        )
      used = {course.place.mesh for course in self._courses.values()}
      if stages is not None and stages not in used:
        raise config_lib.ConfigError(
          f'devices.stage: expected an island with stages={stages.size} and a '
          'rank, which alone has a device a stage; there is none'
        )
    specs = (
      None
      if home is None
      else sharding.specs(shared_model.abstract_params, home)
    )
    self._inner_steps = config.optim.inner_steps
    self._shift = jax.jit(_shift, donate_argnames='local')
    self._sender = sender_lib.Sender(
      shared_model.abstract_params, method, home, specs
    )

  def init(self, params: Any, round_index: int = 0) -> MinerState:
    """The state of a miner that joins in a round."""
    method, place = self._shared_model.method, self._placement
    params = place.parking.fetch(params)
    inner = method.inner.init(place.home(params)) if method.inner else None
    error = None
    if method.error_decay is not None:
      error = sparseloco.init_error(place.home(params))
    local = None
    if self._config.optim.overlap:
      local = jax.tree.map(jnp.copy, place.home(params))
    parked = place.parking.park((place.home(inner), error, local))
    return MinerState(np.int32(round_index), *parked)

  def contribute(
    self,
    params: Any,
    private: MinerState,
    task: Task,
    sign: payload.Sign,
    late: Late = lambda: False,
    begun: RoundInProgress | None = None,
  ) -> tuple[Contribution, MinerState]:
    """One round of a miner; consumes `private`.

    Args:
      params: the shared parameters at the start of the round.
      private: the miner's own state.
      task: who it is, and what it trains on.
      sign: by its hotkey.
      late: see `batches`.
      begun: see `begin`.

    Raises:
      DivergedError: a loss is not finite; names the uid, the round and the step.
    """
    batches = self.batches(task, late)
    work, private = self.train(params, private, task, batches, begun)
    return self.seal(work, task, sign), private

  def batches(
    self, task: Task, late: Late = lambda: False
  ) -> Iterator[np.ndarray]:
    """The tokens of a task, in order of training: int32 [B, L + 1] each.

    Args:
      task: who trains on what.
      late: asked before each step but the first, while at most one is under
        way; once it says so there are no more.
    """
    ids_HxB = batch_ids(self._config, task, self.split)
    context = self._config.data.context
    for i, x_BxL1 in enumerate(
      tokens_lib.prefetch(self.split, ids_HxB, context)
    ):
      if i and late():
        return
      yield x_BxL1

  def train(
    self,
    params: Any,
    private: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: RoundInProgress | None = None,
  ) -> tuple[TrainedRound, MinerState]:
    """Trains on `batches`, one a step; otherwise as `contribute`."""
    place = self._placement
    parking = place.parking
    overlaps = private.local is not None
    if not overlaps:
      begun = RoundInProgress.of(task, batches)
    elif begun is None or begun.task.round != task.round:
      begun, private = self.begin(private, task, batches)
    if self._shared_model.method.inner is None:
      (tokens_BxL1,) = begun.batches
      begun.receipt.add(tokens_BxL1)
      nats, delta = self._gradient(
        place.spread(parking.fetch(params)), place.share(tokens_BxL1)
      )
      begun.losses.append(nats)
      delta = place.settle(delta)
      start = inner = None
    else:
      course = self._course(task)
      start = place.home(parking.fetch(params))
      fixed = self._fixed(course, start, task)
      if overlaps:
        # What the exchange led to takes the place of what it was begun from.
        local = self._shift(
          course.place.spread(start),
          course.place.spread(parking.fetch(begun.origin)),
          private.local,
        )
      else:
        # The first step donates its parameters: it must not take the shared.
        shared = not placement_lib.is_parked(params)
        local = course.place.spread(start, fresh=shared)
      del start  # made again: in training there is no room for it
      inner = course.place.spread(parking.fetch(private.inner))
      for tokens_BxL1 in begun.batches:
        local, inner = self._advance(
          begun, private.joined, tokens_BxL1, local, inner, *fixed
        )
        jax.block_until_ready(begun.losses[-2:-1])  # see `batches`
      delta = course.place.settle(local)
      inner = parking.park(course.place.settle(inner))
      start = place.home(parking.fetch(params))
      if course.leave is not None:
        delta = course.leave(start, delta, *fixed)
    sent = self._sender.compress(
      start, delta, place.home(parking.fetch(private.error))
    )
    losses = np.asarray(jax.device_get(begun.losses))
    if not np.isfinite(losses).all():
      bad = int(np.argmin(np.isfinite(losses)))
      raise DivergedError(
        f'miner {task.uid}, round {task.round}: the loss is {losses[bad]} at '
        f'inner step {bad}; lower optim.inner.learning_rate'
      )
    work = TrainedRound(
      sent.message,
      begun.receipt.digest(),
      begun.receipt.sequences,
      loss=float(losses.mean()),
      error_norm=sent.error_norm,
    )
    return work, MinerState(
      private.joined,
      inner,
      parking.park(sent.error),
      parking.park(delta) if overlaps else None,
    )

  def begin(
    self, private: MinerState, task: Task, batches: Iterable[np.ndarray]
  ) -> tuple[RoundInProgress, MinerState]:
    """Trains the first steps of a task, before the last round is exchanged.

    They go on from where this miner's own parameters have got to. When the
    shared ones are there, `train` takes the difference that the steps made over
    to these, and the delta of the round is measured against them: so every
    step is in one delta, and in one only. Returns while the steps are under
    way.

    Measured with the model of configs/shakespeare.py, 4 miners, 100 rounds of
    10 steps, in held-out nats a byte of two seeds: 1.720 and 1.733 where the
    exchange is waited for; 1.736 and 1.722 with one step before it (+0.1 %);
    1.740 and 1.742 with two (+0.8 %). Of the first seed also: 1.917 with five;
    1.922 with two that go out from the shared parameters before the exchange,
    and so repeat what these lack; and where a whole round is trained from
    these, 2.173, or 1.828 if the miner adds what its own message will do.

    Args:
      private: the miner's own state; consumed.
      task: who it is, and what it trains on.
      batches: all of the task.
    """
    optim, course = self._config.optim, self._course(task)
    steps = island_lib.of(self._config, task.uid).steps
    # In the time that others need for theirs.
    count = -(-optim.overlap * steps // optim.inner_steps)
    begun = RoundInProgress.of(task, batches, private.local)
    parked, fetch = placement_lib.is_parked, self._placement.parking.fetch
    local = course.place.spread(
      fetch(begun.origin), fresh=not parked(begun.origin)
    )
    inner = course.place.spread(fetch(private.inner))
    for tokens_BxL1 in itertools.islice(begun.batches, count):
      local, inner = self._advance(
        begun, private.joined, tokens_BxL1, local, inner
      )
    return begun, private._replace(inner=inner, local=local)

  def _advance(
    self,
    begun: RoundInProgress,
    joined: np.int32,
    tokens_BxL1: np.ndarray,
    local: Any,
    inner: Any,
    *fixed: Any,
  ) -> tuple[Any, Any]:
    """One inner step more of what is under way."""
    task, losses, steps = begun.task, begun.losses, self._inner_steps
    island, course = island_lib.of(self._config, task.uid), self._course(task)
    begun.receipt.add(tokens_BxL1)
    # Of the run's schedule: all islands anneal alike.
    step = task.round * steps + len(losses) * steps // island.steps
    local, inner, nats = course.step(
      local,
      inner,
      course.place.share(tokens_BxL1),
      np.int32(step),
      joined * np.int32(steps),
      *fixed,
    )
    losses.append(nats)
    return local, inner

  def _fixed(
    self, course: course_lib.Course, params: Any, task: Task
  ) -> tuple[Any, ...]:
    """What the steps of a round take besides; of its first sequences."""
    if course.enter is None:
      return ()
    ids_n = batch_ids(self._config, task, self.split).flat[: subspace.FITTED]
    tokens_nxL1 = self.split.read(ids_n, self._config.data.context)
    return (course.enter(params, tokens_nxL1),)

  def _course(self, task: Task) -> course_lib.Course:
    return self._courses[_kind(island_lib.of(self._config, task.uid))]

  def compress_round(
    self,
    params: Any,
    private: MinerState,
    local: Any,
    ids_N: np.ndarray,
    loss: float,
  ) -> tuple[TrainedRound, MinerState]:
    """What a round led to that others trained, as a pool's workers do.

    Args:
      params: the shared parameters at the start of the round.
      private: consumed.
      local: the parameters at its end.
      ids_N: the sequences that it was trained on, in the order assigned.
      loss: mean training loss, nats a token.
    """
    place, parking = self._placement, self._placement.parking
    sent = self._sender.compress(
      place.home(parking.fetch(params)),
      place.home(local),
      place.home(parking.fetch(private.error)),
    )
    context = self._config.data.context
    receipt = receipt_lib.of_sequences(self.split, ids_N, context)
    work = TrainedRound(
      sent.message, receipt, len(ids_N), loss, sent.error_norm
    )
    return work, private._replace(error=parking.park(sent.error))

  def seal(
    self, work: TrainedRound, task: Task, sign: payload.Sign
  ) -> Contribution:
    """What a miner sends of its work, signed."""
    header = payload.Header(
      self._shared_model.run,
      task.due,
      task.uid,
      task.root[:16],
      work.receipt,
      work.sequences,
      task.ahead,
    )
    shared_model = self._shared_model
    return Contribution(
      payload.encode(
        header,
        work.message,
        shared_model.abstract_params,
        shared_model.spec,
        sign,
      ),
      work.loss,
      work.sequences * self._config.data.context,
      work.error_norm,
      task.due,
    )


def _kind(island: island_lib.Island) -> island_lib.Island:
  """What islands that train by the same programs have in common."""
  stages = island.stages if island.rank else 1
  return dataclasses.replace(island, steps=0, stages=stages, rounds=1)


def _shift(params: Any, origin: Any, local: Any) -> Any:
  """`params`, moved as from `origin` to `local`."""
  return jax.tree.map(lambda p, o, x: p + (x - o), params, origin, local)
