"""The miners of an emulation, spread over cores, devices and hosts.

A row of the devices (places.py) trains one miner after another, all rows train
at the same time. A row runs the program that a single miner would run, so it
computes the same bits; one program over all rows, with the miners as a mapped
axis, would not.

Several processes, each with rows of its own, can emulate one run: every
process emulates all nodes, but trains only in its own rows. It sends the
trained rounds to the others (covenant/node/multihost.py). The private state of
a miner stays in its process until a checkpoint needs it.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.data import tokens as tokens_lib
from covenant.emulate import places as places_lib
from covenant.node import base as node_lib
from covenant.node import multihost as multihost_lib
from covenant.optim import sparseloco
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib

Future = node_lib.Future
MinerState = local_lib.MinerState
State = checkpoint_lib.RunState
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound


class PausedError(Exception):
  """The training of a miner was ended within its round, without a result."""


class DevicePool:
  """The rows of an emulation, as one of its processes sees them.

  Args:
    config: of the run.
    shared_model: of the run.
    data: to train on.
    process_group: the processes.
    pausing: returns True if the miners that train are to stop with the inner
      step under way, by a PausedError; None: they never are.

  Raises:
    ConfigError: see `places.places` and `trainer.Trainer`.
  """

  def __init__(
    self,
    config: config_lib.Config,
    shared_model: shared_state_lib.SharedModel,
    data: tokens_lib.TokenData,
    process_group: multihost_lib.ProcessGroup,
    pausing: Callable[[], bool] | None = None,
  ):
    self._process_group = process_group
    self.places = places_lib.places(config)
    own = [place for place in self.places if place.rank == process_group.index]
    trainers = {
      mesh: _Trainer(trainer_lib.Trainer(config, shared_model, data, mesh))
      for mesh in {place.mesh: None for place in own}
    }
    self._rows = {
      index: _Row(trainers[place.mesh], pausing)
      for index, place in enumerate(self.places)
      if place.rank == process_group.index
    }
    # The shapes of a message, which other processes send as bytes.
    compression = shared_model.method.compression
    self.message = sparseloco.abstract_message(
      shared_model.abstract_params, compression
    )

  def slot(self, name: str) -> 'Slot':
    """Returns the slot of the miner of a name; uids take the rows in turn."""
    index = self._index(int(name)) if name.isdecimal() else 0
    first = next(iter(self._rows.values()))
    return Slot(self, index, self._rows.get(index), first.trainer)

  def train(
    self,
    index: int,
    params: ct.Params,
    state: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
    keep: Callable[[MinerState | None], None] = lambda state: None,
  ) -> Future[tuple[TrainedRound, MinerState]]:
    """Starts to train a miner in a row, in the process that owns the row.

    All processes must call this, and then wait for each training in one order;
    the others get the work, and keep `state`.

    Args:
      index: of the row.
      params: the parameters to start from.
      state: of the miner; consumed.
      task: of the miner.
      batches: one per step.
      begun: see `Trainer.begin`.
      keep: called with a copy of `state` as the training begins, and with None
        when it is done.
    """
    row, work = self._rows.get(index), (params, state, task, batches, begun)
    if row is not None and len(self.places) == 1:
      return Future.run(lambda: row.train(*work, keep=keep))
    future = None
    if row is not None:
      future = row.pool.submit(row.train, *work, keep=keep)
      if self._process_group.is_single:
        return Future(future.result)

    def answer() -> TrainedRound:
      nonlocal state
      assert future is not None
      trained, state = future.result()
      leaves = jax.tree.leaves(trained.message)
      return trained._replace(message=[x.tobytes() for x in leaves])

    def wait() -> tuple[TrainedRound, MinerState]:
      rank = self.places[index].rank
      told = self._process_group.broadcast_from(rank, ('train', task), answer)
      leaves, structure = jax.tree.flatten(self.message)
      message = [
        np.frombuffer(data, x.dtype).reshape(x.shape)
        for data, x in zip(told[0], leaves, strict=True)
      ]
      return TrainedRound(structure.unflatten(message), *told[1:]), state

    return Future(wait)

  def close(self) -> None:
    """Stops all training; its results are lost."""
    for row in self._rows.values():
      row.close()

  def whole(self, state: State) -> State:
    """Returns a state with the private state of all miners, for rank 0 to save.

    All processes must call this. On the others the private state has shapes
    only.
    """
    if self._process_group.is_single:
      return state
    like = self._example(state)
    miners = {}
    for uid, private in state.miners.items():
      rank = self._rank(uid)
      if rank and rank == self._process_group.index:
        for x in jax.tree.leaves(private):
          self._process_group.gather(rank, np.asarray(x).tobytes)
      elif rank and not self._process_group.index:
        private = jax.tree.map(
          lambda x, rank=rank: np.frombuffer(
            self._process_group.gather(rank, bytes), x.dtype
          ).reshape(x.shape),
          like,
        )
      miners[uid] = private
    if self._process_group.index:
      miners = dict.fromkeys(miners, jax.tree.map(_hollow, like))
    return state._replace(miners=miners)

  def wanted(self, state: State) -> State:
    """Returns a state with `...` for all that this process must not load."""
    if self._process_group.is_single:
      return state
    like = self._example(state)
    absent = jax.tree.map(lambda x: ..., like)
    miners = {
      uid: private
      if self._index(uid) in self._rows
      else absent._replace(joined=private.joined)
      for uid, private in state.miners.items()
    }
    return state._replace(miners=miners)

  def loaded(self, state: State) -> State:
    """Returns a loaded `wanted` state with None for what was not loaded."""
    miners = {
      uid: private
      if self._index(uid) in self._rows
      else MinerState(private.joined, None, None)
      for uid, private in state.miners.items()
    }
    return state._replace(miners=miners)

  def _index(self, uid: int) -> int:
    return uid % len(self.places)

  def _rank(self, uid: int) -> int:
    return self.places[self._index(uid)].rank

  def _example(self, state: State) -> MinerState:
    """Returns the private state of a miner of this process.

    That of miners elsewhere has the same shapes.
    """
    return next(
      private
      for uid, private in state.miners.items()
      if self._index(uid) in self._rows
    )


class Slot:
  """The row of one miner.

  Attributes:
    trainer: a trainer of this process, for everything but the training.
    kept: the last round that the miner began to train and did not complete,
      with its state before; None without any, or where nothing is ever paused.
  """

  kept: tuple[int, MinerState] | None = None

  def __init__(
    self,
    device_pool: DevicePool,
    index: int,
    row: '_Row | None',
    trainer: trainer_lib.Trainer,
  ):
    self._device_pool = device_pool
    self._index = index
    self._row = row
    self.trainer = trainer

  def init(self, params: ct.Params, round_index: int) -> MinerState:
    """Returns the state of a joiner, without arrays in other processes."""
    if self._row is None:
      return MinerState(np.int32(round_index), None, None)
    return self._row.trainer.init(params, round_index)

  def train(
    self,
    params: ct.Params,
    state: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
  ) -> Future[tuple[TrainedRound, MinerState]]:
    """Starts to train; see `DevicePool.train`."""

    def keep(before: MinerState | None) -> None:
      self.kept = (task.round, before) if before is not None else None

    keep(state)
    return self._device_pool.train(
      self._index, params, state, task, batches, begun, keep
    )


class _Trainer:
  """The trainer of all rows on one mesh.

  Attributes:
    trainer: what they share.
  """

  def __init__(self, trainer: trainer_lib.Trainer):
    self.trainer = trainer
    self._first = threading.Lock()
    self._is_compiled = False

  def train(self, *args: Any) -> tuple[TrainedRound, MinerState]:
    """Trains; the first call compiles, and others wait for it."""
    with contextlib.nullcontext() if self._is_compiled else self._first:
      made = self.trainer.train(*args)
      self._is_compiled = True
      return made


class _Row:
  """A thread of this process, which trains one miner at a time."""

  def __init__(self, trainer: _Trainer, pausing: Callable[[], bool] | None):
    self._shared = trainer
    self.trainer = trainer.trainer
    self._pausing = pausing
    self.pool = concurrent.futures.ThreadPoolExecutor(1, 'row')
    self._closed = False

  def train(
    self,
    params: ct.Params,
    state: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
    *,
    keep: Callable[[MinerState | None], None],
  ) -> tuple[TrainedRound, MinerState]:
    """Trains until the row is closed or paused; see `Trainer.train`."""
    # Training consumes the optimizer's state, and its own parameters.
    if self._pausing is None:
      keep(None)
    else:
      inner, local = _copied(state.inner), _copied(state.local)
      keep(state._replace(inner=inner, local=local))
    batches = self._open(batches)
    trained = self._shared.train(params, state, task, batches, begun)
    keep(None)
    return trained

  def close(self) -> None:
    self._closed = True
    self.pool.shutdown(wait=False, cancel_futures=True)

  def _open(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the batches until the row is closed or paused."""
    for tokens_BxL1 in batches:
      if self._closed:
        raise concurrent.futures.CancelledError
      if self._pausing is not None and self._pausing():
        raise PausedError
      yield tokens_BxL1


def _copied(tree: ct.PyTree) -> ct.PyTree:
  return jax.tree.map(lambda x: x.copy(), tree)


def _hollow(x: ct.AbstractArray) -> np.ndarray:
  """Returns an array of the shape of `x` that takes no memory."""
  return np.broadcast_to(np.zeros((), x.dtype), x.shape)
