"""Who trains where: the miners of an emulation, on many devices and hosts.

The devices are a mesh with an outer axis, `peers`, whose rows are the meshes of
one miner each (covenant/models/sharding.py). A row trains one miner after
another, all rows train at the same time. The program of a row is the one that
a miner alone would run, so it computes the same bits; one program over all
rows, with the miners as a mapped axis, would not.

Several processes with rows of their own emulate one run side by side: all do
everything, but each trains only in its own rows. What that led to is sent to
the others (covenant/node/multihost.py); what is private stays where it is,
until a checkpoint asks for it.
"""

import concurrent.futures
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.data import tokens as tokens_lib
from covenant.models import sharding
from covenant.node import future as future_lib
from covenant.node import multihost as multihost_lib
from covenant.optim import sparseloco
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib

Future = future_lib.Future
MinerState = local_lib.MinerState
State = checkpoint_lib.RunState
Task = local_lib.Task
TrainedRound = local_lib.TrainedRound


class Place(NamedTuple):
  """The devices of one row, and the process that they belong to."""

  rank: int
  mesh: jax.sharding.Mesh


def places(config: config_lib.Config) -> tuple[Place, ...]:
  """The rows of `config.devices` on which miners train, at most one a miner.

  They are of each process in turn.

  Raises:
    ConfigError: the devices are too few, or a process has no row.
  """
  rows: dict[int, list[Place]] = {r: [] for r in range(jax.process_count())}
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  for mesh in sharding.rows(config.devices, devices):
    rank, *others = {device.process_index for device in mesh.devices.flat}
    if others:
      raise config_lib.ConfigError(
        f'devices: expected the {mesh.size} devices of an emulated miner to be '
        f'of one process, got some of the processes {sorted([rank, *others])}; '
        'lower devices.data, devices.fsdp or devices.tensor'
      )
    rows[rank].append(Place(rank, mesh))
  turns = itertools.zip_longest(*rows.values())
  found = [place for turn in turns for place in turn if place is not None]
  found = found[: config.miners]
  if idle := sorted(rows.keys() - {place.rank for place in found}):
    raise config_lib.ConfigError(
      f'devices.peers: {len(found)} miners that train at the same time leave '
      f'nothing for the processes {idle}; set it to 0, which is all devices, '
      f'and start at most as many processes as miners ({config.miners})'
    )
  return tuple(found)


def describe(config: config_lib.Config) -> str:
  """Where the miners train, for people; nothing if one device trains all.

  Raises:
    ConfigError: as `places`.
  """
  found = places(config)
  devices = sum(place.mesh.size for place in found)
  if devices == 1:
    return ''
  kind = found[0].mesh.devices.flat[0].device_kind
  hosts = max(place.rank for place in found) + 1
  return (
    f'{len(found)} of {config.miners} miners train at the same time, on '
    f'{devices} devices ({kind}) of {hosts} process{"es" * (hosts > 1)}'
  )


def most(config: config_lib.Config) -> int:
  """The miners that one memory holds, on the first device or beside it.

  Raises:
    ConfigError: as `places`.
  """
  here = [place for place in places(config) if not place.rank]
  host = here[0].mesh.devices.flat[0].platform == 'cpu'
  rows = len(places(config))
  return -(-config.miners // rows) * (len(here) if host else 1)


class DevicePool:
  """The rows of an emulation, as one of its processes sees them.

  Args:
    config: of the run.
    shared_model: of the run.
    data: to train on.
    process_group: the processes.

  Raises:
    ConfigError: as `places`, and as `trainer.Trainer`.
  """

  def __init__(
    self,
    config: config_lib.Config,
    shared_model: shared_state_lib.SharedModel,
    data: tokens_lib.TokenData,
    process_group: multihost_lib.ProcessGroup,
  ):
    self._process_group = process_group
    self.places = places(config)
    self._rows = {
      index: _Row(trainer_lib.Trainer(config, shared_model, data, place.mesh))
      for index, place in enumerate(self.places)
      if place.rank == process_group.index
    }
    # What a message looks like, for what comes of it as bare bytes.
    compression = shared_model.method.compression
    self.message = jax.eval_shape(
      lambda like: sparseloco.compress(like, None, compression, None)[0],
      shared_model.abstract_params,
    )

  def slot(self, name: str) -> 'Slot':
    """Where the miner of a name trains; uids take the rows in turn."""
    index = self._index(int(name)) if name.isdecimal() else 0
    first = next(iter(self._rows.values()))
    return Slot(self, index, self._rows.get(index), first.trainer)

  def train(
    self,
    index: int,
    params: ct.Params,
    private: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
  ) -> Future[tuple[TrainedRound, MinerState]]:
    """Starts to train a miner in a row, in the process that owns the row.

    All processes must call this, and then wait for each training in one order;
    the others get the work, and keep `private`.

    Args:
      index: of the row.
      params: the parameters to start from.
      private: of the miner; consumed.
      task: of the miner.
      batches: one per step.
      begun: see `Trainer.begin`.
    """
    row = self._rows.get(index)
    if row is not None and len(self.places) == 1:
      return Future.done(row.train(params, private, task, batches, begun))
    future = None
    if row is not None:
      future = row.pool.submit(row.train, params, private, task, batches, begun)
      if self._process_group.alone:
        return Future(future.result)

    def answer() -> Any:
      nonlocal private
      assert future is not None
      work, private = future.result()
      leaves = jax.tree.leaves(work.message)
      return work._replace(message=[x.tobytes() for x in leaves])

    def wait() -> tuple[TrainedRound, MinerState]:
      rank = self.places[index].rank
      told = self._process_group.ask(('train', task), answer, rank)
      leaves, structure = jax.tree.flatten(self.message)
      message = [
        np.frombuffer(data, x.dtype).reshape(x.shape)
        for data, x in zip(told[0], leaves, strict=True)
      ]
      return TrainedRound(structure.unflatten(message), *told[1:]), private

    return Future(wait)

  def close(self) -> None:
    """Ends what is still under way, without its results."""
    for row in self._rows.values():
      row.close()

  def whole(self, state: State) -> State:
    """A state with what all miners know, for rank 0 to save.

    All processes must call this. On the others all of it is hollow.
    """
    if self._process_group.alone:
      return state
    like = self._example(state)
    miners = {}
    for uid, private in state.miners.items():
      rank = self._rank(uid)
      if rank and rank == self._process_group.index:
        for x in jax.tree.leaves(private):
          self._process_group.collect(rank, np.asarray(x).tobytes)
      elif rank and not self._process_group.index:
        private = jax.tree.map(
          lambda x, rank=rank: np.frombuffer(
            self._process_group.collect(rank, bytes), x.dtype
          ).reshape(x.shape),
          like,
        )
      miners[uid] = private
    if self._process_group.index:
      miners = dict.fromkeys(miners, jax.tree.map(_hollow, like))
    return state._replace(miners=miners)

  def wanted(self, state: State) -> State:
    """What of a state this process is to load; `...` is left out."""
    if self._process_group.alone:
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
    """A state as `wanted`, once it is loaded, without what is left out."""
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
    """What a miner of this process knows; those of others are alike."""
    return next(
      private
      for uid, private in state.miners.items()
      if self._index(uid) in self._rows
    )


class Slot:
  """Where one miner trains.

  Attributes:
    trainer: for all but training itself.
  """

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

  def init(self, params: Any, round_index: int) -> MinerState:
    """As `trainer.Trainer.init`; of another process only what all know."""
    if self._row is None:
      return MinerState(np.int32(round_index), None, None)
    return self._row.trainer.init(params, round_index)

  def train(
    self,
    params: ct.Params,
    private: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
  ) -> Future[tuple[TrainedRound, MinerState]]:
    """Starts to train; see `DevicePool.train`."""
    return self._device_pool.train(
      self._index, params, private, task, batches, begun
    )


class _Row:
  """Devices of this process, which train one miner at a time."""

  def __init__(self, trainer: trainer_lib.Trainer):
    self.trainer = trainer
    self.pool = concurrent.futures.ThreadPoolExecutor(1, 'row')
    self._closed = False

  def train(
    self,
    params: ct.Params,
    private: MinerState,
    task: Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
  ) -> tuple[TrainedRound, MinerState]:
    """Trains until the row is closed; see `trainer.Trainer.train`."""
    batches = self._open(batches)
    return self.trainer.train(params, private, task, batches, begun)

  def close(self) -> None:
    self._closed = True
    self.pool.shutdown(wait=False, cancel_futures=True)

  def _open(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches until the row is closed."""
    for tokens_BxL1 in batches:
      if self._closed:
        raise concurrent.futures.CancelledError
      yield tokens_BxL1


def _hollow(x: Any) -> np.ndarray:
  """Of the shape of `x`, without the memory."""
  return np.broadcast_to(np.zeros((), x.dtype), x.shape)
