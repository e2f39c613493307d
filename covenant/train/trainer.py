"""The training side of miners: compiled once, for all miners of a process.

A `Trainer` holds no state: a process runs one miner through it, the emulator
many, each with its own `MinerState`.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.data import assignment
from covenant.data import tokens as tokens_lib
from covenant.models import sharding
from covenant.optim import compressor as compressor_lib
from covenant.optim import sparseloco
from covenant.train import island as island_lib
from covenant.train import local as local_lib
from covenant.train import placement as placement_lib
from covenant.train import replica as replica_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train.pipeline import gpipe
from covenant.wire import payload


class Trainer:
  """Trains rounds from the shared parameters.

  Attributes:
    split: the data to train on.
    observe: called with each inner step, soon after it is done.
    payload_bytes: the most bytes of a payload.

  Args:
    config: the config of the run.
    shared_model: the shared model of the run.
    data: the data of the run.
    mesh: the mesh of the miner (covenant/models/sharding.py). Several processes
      may own it, if all make the same calls. Sums over several devices are
      rounded differently from those of one; a mesh of one device computes the
      same bits as None, which is the default device. On a mesh with the axis
      'stage' a pipeline has a device per stage, and any other island the first.

  Raises:
    ConfigError: the model or the batch cannot be sharded so.
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
    self.payload_bytes = shared_model.spec.payload_bytes
    self.observe: local_lib.Observe = lambda step: None
    self.split = data.train
    stages = None
    if mesh is not None and gpipe.AXIS in mesh.axis_names:
      mesh, stages = placement_lib.home(mesh), mesh
    self._placement = placement_lib.Placement(mesh, config.devices.offload)
    islands = (island_lib.of(config, uid) for uid in range(config.miners))
    self._replicas = replica_lib.make(
      config, islands, self._placement, self.split, stages
    )
    home, abstract = self._placement.home_mesh, shared_model.abstract_params
    specs = None if home is None else sharding.specs(abstract, home)
    method = shared_model.method
    self._compressor = compressor_lib.Compressor(
      abstract, method.compression, method.error_decay, home, specs
    )
    # One program, where no sharding has to follow that of the parameters.
    self._fresh = jax.jit(self._initial) if home is None else self._initial

  def init(
    self, params: ct.Params, round_index: int = 0
  ) -> local_lib.MinerState:
    """Returns the state of a miner that joins in a round."""
    place = self._placement
    params = place.to_home(place.host.load(params))
    inner, error, local = self._fresh(params)
    fresh = place.host.offload((place.to_home(inner), error, local))
    return local_lib.MinerState(np.int32(round_index), *fresh)

  def _initial(
    self, params: ct.Params
  ) -> tuple[ct.PyTree, ct.Params | None, ct.Params | None]:
    """Returns a new optimizer state, residual, and own parameters."""
    method = self._shared_model.method
    inner = method.inner.init(params) if method.inner else None
    error = local = None
    if method.error_decay is not None:
      error = sparseloco.init_error(params)
    if self._config.optim.overlap:
      local = jax.tree.map(jnp.copy, params)
    return inner, error, local

  def batches(
    self, task: local_lib.Task, late: Callable[[], bool] = lambda: False
  ) -> Iterator[np.ndarray]:
    """Yields the tokens of a task, in order of training: int32 [B, L + 1].

    Args:
      task: the assignment.
      late: asked before each step but the first, while at most one is under
        way; True ends the batches.
    """
    yield from local_lib.batches(self._config, task, self.split, late)

  def train(
    self,
    params: ct.Params,
    state: local_lib.MinerState,
    task: local_lib.Task,
    batches: Iterable[np.ndarray],
    begun: local_lib.RoundInProgress | None = None,
  ) -> tuple[local_lib.TrainedRound, local_lib.MinerState]:
    """Trains a round of a miner.

    Args:
      params: the shared parameters at the start of the round.
      state: the miner's own state; consumed.
      task: the assignment.
      batches: the tokens of each step, int32 [B, L + 1].
      begun: the round as `begin` began it; one of another round is ignored.

    Raises:
      DivergedError: the round is lost; names the uid, the round and the step.
    """
    replica = self._replica(task)
    if self._config.optim.overlap:
      if begun is None or begun.task.round != task.round:
        begun, state = self.begin(state, task, batches)
      run, replica = begun, replica_lib.overlapped(replica, self._placement)
    else:
      run = self._start(state, task, batches)
    return local_lib.train_round(
      replica, self._compress, params, state, run, self.observe
    )

  def begin(
    self,
    state: local_lib.MinerState,
    task: local_lib.Task,
    batches: Iterable[np.ndarray],
  ) -> tuple[local_lib.RoundInProgress, local_lib.MinerState]:
    """Begins a round before the last one is exchanged (`replica.overlapped`).

    Returns while the steps are under way; `train` completes the round.

    Args:
      state: the miner's own state; consumed.
      task: the assignment.
      batches: all batches of the task.
    """
    optim, run = self._config.optim, self._start(state, task, batches)
    # Slower and faster miners train early for the same time.
    steps = -(-optim.overlap * run.steps // optim.inner_steps)
    return replica_lib.train_early(self._replica(task), state, run, steps)

  def compress_round(
    self,
    params: ct.Params,
    state: local_lib.MinerState,
    local: ct.Params,
    ids_N: np.ndarray,
    loss: float,
  ) -> tuple[local_lib.TrainedRound, local_lib.MinerState]:
    """Makes a round of parameters that others trained, as a pool's workers do.

    Args:
      params: the shared parameters at the start of the round.
      state: the miner's own state; consumed.
      local: the parameters at the end of the round.
      ids_N: the sequences they were trained on, in the order of assignment.
      loss: the mean training loss, nats per token.
    """
    place = self._placement
    start = place.to_home(place.host.load(params))
    sent = self._compress(start, place.to_home(local), state.error)
    context = self._config.data.context
    receipt = assignment.receipt_of(self.split, ids_N, context)
    trained = local_lib.TrainedRound(
      sent.message, receipt, len(ids_N), loss, sent.error_norm
    )
    return trained, state._replace(error=sent.error)

  def seal(
    self,
    trained: local_lib.TrainedRound,
    task: local_lib.Task,
    sign: ct.Sign,
  ) -> local_lib.Contribution:
    """Encodes and signs a trained round as the miner's contribution."""
    shared_model = self._shared_model
    header = payload.Header(
      shared_model.run,
      task.round,
      task.uid,
      task.root[:16],
      trained.receipt,
      trained.sequences,
    )
    return local_lib.Contribution(
      payload.encode(
        header,
        trained.message,
        shared_model.abstract_params,
        shared_model.spec,
        sign,
      ),
      trained.loss,
      trained.sequences * self._config.data.context,
      trained.error_norm,
      task.round,
    )

  def _replica(self, task: local_lib.Task) -> local_lib.Replica:
    island = island_lib.of(self._config, task.uid)
    return self._replicas[replica_lib.kind(island)]

  def _start(
    self,
    state: local_lib.MinerState,
    task: local_lib.Task,
    batches: Iterable[np.ndarray],
  ) -> local_lib.RoundInProgress:
    """Returns the record of a round without steps."""
    schedule_steps = self._config.optim.inner_steps
    return local_lib.RoundInProgress.begin(
      task,
      iter(batches),
      joined=state.joined * np.int32(schedule_steps),
      steps=island_lib.of(self._config, task.uid).steps,
      schedule_steps=schedule_steps,
    )

  def _compress(
    self,
    start: ct.Params | None,
    end: ct.Params,
    error: ct.Params | None,
  ) -> compressor_lib.Compressed:
    """Compresses a delta with the error feedback that the miner keeps."""
    place = self._placement
    sent = self._compressor.compress(
      start, end, place.to_home(place.host.load(error))
    )
    return sent._replace(error=place.host.offload(sent.error))
