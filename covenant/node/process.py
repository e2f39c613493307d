"""A miner or validator as a process: it follows real time.

Its workdir (workdir.py) also holds checkpoints/: its position and all that it
cannot get from other nodes. A node may be several processes, its ranks, which
share one workdir and write the checkpoints together, each its shards; all other
files of a rank but 0 are in rank-N/.
"""

import contextlib
import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from covenant import config as config_lib
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.data import dataset
from covenant.data import pretrained
from covenant.data import tokens as tokens_lib
from covenant.node import amended_data
from covenant.node import base as node_lib
from covenant.node import beside as beside_lib
from covenant.node import connect
from covenant.node import miner as miner_lib
from covenant.node import multihost as multihost_lib
from covenant.node import published_status
from covenant.node import publishing
from covenant.node import ranked
from covenant.node import ranked_publishing
from covenant.node import step_meter
from covenant.node import sync
from covenant.node import validator as validator_lib
from covenant.node import workdir as workdir_lib
from covenant.protocol import apply
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.store import interface as store_lib
from covenant.telemetry import telemetry as telemetry_lib
from covenant.train import local as local_lib
from covenant.train import placement
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from covenant.wire import manifest as manifest_lib

_POLL = 0.5  # blocks between two calls of `Chain.head`, at most
_UNREACHABLE = 1.0  # seconds until the chain is called again
_LEAVE_SECONDS = 20.0  # that a process waits for the store before it ends


# (context, start of the run, training data, devices of all processes) -> the
# node of a process.
Build = Callable[
  [
    node_lib.Context,
    apply.Position,
    tokens_lib.TokenData,
    jax.sharding.Mesh | None,
  ],
  node_lib.Node[Any],
]


class Process:
  """One node, its checkpoints and its workdir.

  Args:
    config: the config of the run, with the `network` section of this node.
    role: 'miner', 'validator' or another name for status.json.
    workdir: the folder of this node.
    process_group: the processes of this node; None is this one alone.
    profile: the round to trace, see `workdir.Workdir`.
    build: makes the node; None makes a miner or a validator, by `role`.
    make_model: makes the shared model; None: `SharedModel`.

  Attributes:
    node: the node.
    workdir: the files that it writes.

  Raises:
    ChainError, StoreError, ConfigError: the node cannot start.
    FolderInUseError: another process has the workdir.
  """

  def __init__(
    self,
    config: config_lib.Config,
    role: str,
    workdir: str | os.PathLike[str],
    process_group: multihost_lib.ProcessGroup | None = None,
    profile: int | None = None,
    build: Build | None = None,
    make_model: Callable[..., shared_state_lib.SharedModel] | None = None,
  ):
    self._config = config
    self._role = role
    self._has_uid = False
    self._told = -1  # the round of the last published status
    self._stop: Callable[[], bool] = lambda: False
    self._process_group = process_group = (
      process_group or multihost_lib.ProcessGroup()
    )
    self.workdir = workdir_lib.Workdir(
      workdir, role, config.network.hotkey, process_group.index, profile
    )
    self.workdir.measure(config)
    self._chain = ranked.chain(process_group, lambda: connect.chain(config))
    self._place = placement.Placement(
      process_group.mesh, config.devices.offload
    )
    shared_model = (make_model or shared_state_lib.SharedModel)(
      config, self._place.home_mesh, config.devices.offload
    )
    run = shared_model.run
    opened = functools.partial(connect.objects, config, run)
    objects = ranked.storage(process_group, run, opened)
    objects.folder = self.workdir.path / sync.JOINING
    self._status_thread = beside_lib.Beside('status', tries=1)
    self._publisher = beside_lib.Beside('publish')
    self._in_ranks = ranked_publishing.publisher(process_group, objects)
    self._checkpoints = checkpoint_lib.Checkpoints(
      pathlib.Path(workdir, 'checkpoints'), config.checkpoint, self._damaged
    )
    root, first = manifest_lib.genesis(run), config.first_round
    start = apply.Position(first, root, shared_model.init())
    start = sync.start(workdir, config, start)
    context = node_lib.Context(
      config,
      self._chain,
      objects,
      shared_model,
      observe=self.workdir.event,
      sole=True,
      stopping=self._is_stopping,
      publisher=None if self._in_ranks else self._publisher,
      publish_in_ranks=self._in_ranks.start if self._in_ranks else None,
      retool=self._retool,
      adopted=functools.partial(amended_data.adopted, self.workdir, config),
    )
    build = build or (build_miner if role == 'miner' else self._validator)
    self._data, self._data_config = dataset.load(config), config.data
    if not process_group.index:
      pretrained.keep(self.workdir.path, config, self._data)
    self.node = build(context, start, self._data, process_group.mesh)
    if isinstance(self.node.role, miner_lib.MinerRole):
      self._meter_steps(self.node)
    self._restore(start)
    here = self.node.state.round, self.node.root, self.node.fingerprint()
    process_group.broadcast_from(0, here, lambda: None)
    self._show('ready')

  def _restore(self, synced: apply.Position) -> None:
    """Goes on from the own checkpoint, or from what was synced if later."""
    saved = self._checkpoints.restore_tree(self.node.save(), ['payload'])
    if saved is not None:
      self.node.load(saved)
    self._saved = self.node.state.round if saved is not None else None
    self._is_saved = False  # whether a checkpoint was begun without a failure
    sync.enter(self.node, synced)
    self._saved_trained = self.node.state.trained

  def _validator(
    self,
    context: node_lib.Context,
    start: apply.Position,
    data: tokens_lib.TokenData,
    mesh: jax.sharding.Mesh | None,
  ) -> validator_lib.Validator:
    del mesh
    config, shared_model = context.config, context.shared_model
    judge = validator_lib.judge(config, shared_model, data, self._place)
    validator_lib.warm_up(config, judge, shared_model, start.shared)
    role = validator_lib.ValidatorRole(judge, announce=self.workdir.verdict)
    return node_lib.Node(context, start, role, validator_lib.handlers())

  def _retool(self, node: node_lib.Node) -> None:
    """Gives a node the programs and the data of an amended config."""
    config, role = node.config, node.role
    if config.data != self._data_config:
      data = amended_data.load(config, self._config)
      self._data, self._data_config = data, config.data
    self.workdir.telemetry.follow(config)
    if isinstance(role, miner_lib.MinerRole):
      if isinstance(role.slot, miner_lib.LocalSlot):  # stages train elsewhere
        made = config, node.shared_model, self._data, self._process_group.mesh
        role.slot = miner_lib.LocalSlot(trainer_lib.Trainer(*made))
      role.slot.trainer.split = self._data.train
      self._meter_steps(node)
    elif isinstance(role, validator_lib.ValidatorRole):
      role.judge = validator_lib.judge(
        config, node.shared_model, self._data, self._place
      )

  def _meter_steps(self, node: node_lib.Node[Any]) -> None:
    flops = None if isinstance(node.role.slot, miner_lib.LocalSlot) else 0.0
    self._meter = step_meter.StepMeter(
      node.config, node.shared_model.method, self.workdir.telemetry, flops
    )
    node.role.slot.trainer.observe = self._inner_step

  def run(self, stop: Callable[[], bool]) -> None:
    """Follows the run until its last round, or until asked to stop.

    A miner that is asked to stop while it trains ends with the inner step under
    way and seals what it has done. Its private state is saved before it leaves.
    """
    node, self._stop = self.node, stop
    measured = self.workdir.telemetry
    while not self._is_stopping() and not self._over():
      measured.pulse(node.state.round, self._chain.block_seconds)
      try:
        head = self._chain.head()
        self._tell_uid(head)
      except chain_lib.ChainError as e:
        self.workdir.status(error=f'{type(e).__name__}: {e}')
        time.sleep(_UNREACHABLE)
        measured.waited(_UNREACHABLE)
        continue
      self.workdir.begin_round(node.state.round)
      if node.state.round != self._told:
        self._told = node.state.round
        self._publish_status('running')
      wake = node.poll(head)
      if wake > head:
        self._show('waiting', head)
        seconds = min(wake - head, 1) * _POLL * self._chain.block_seconds
        (self._in_ranks.work if self._in_ranks else time.sleep)(seconds)
        measured.waited(seconds)
      elif node.savable and self._due(node.state.round):
        self._save()
    measured.pulse(node.state.round, self._chain.block_seconds)
    if not self._over():
      self._save_to_leave()
    self._publish_status('finished' if self._over() else 'stopped')
    with self.workdir:
      self._show('finished' if self._over() else 'stopped')
      try:
        self._checkpoints.__exit__()
        self._forget_synced()
      except checkpoint_lib.CheckpointError as e:
        self.workdir.status(error=str(e))
      # A finished run leaves its last state to others; a node that is stopped
      # goes on with the pieces that are missing when it starts again.
      if self._in_ranks is not None:
        self._in_ranks.finish(self._over(), self._is_stopping, _UNREACHABLE)
      elif self._over():
        publishing.finish(self._publisher, stop, _UNREACHABLE)
      self._publisher.close(_LEAVE_SECONDS, cancel=True)
      self._status_thread.close(_LEAVE_SECONDS)
      self._note_failures()

  def _tell_uid(self, head: int) -> None:
    """Writes the uid of this hotkey to status.json, once."""
    if head >= 0 and not self._has_uid:
      uids = {peer.hotkey: peer.uid for peer in self._chain.peers(head)}
      self.workdir.status(uid=uids.get(self._chain.hotkey))
      self._has_uid = True

  def _inner_step(self, step: local_lib.InnerStep) -> None:
    """Measures an inner step of this miner."""
    measured = telemetry_lib.Measured(
      step.round + 1,
      step.schedule_step,
      step.tokens,
      step.loss,
      step.gradient_norm,
      step.seconds,
      step.wait_seconds,
    )
    self._meter.add(measured, step.joined)

  def _is_stopping(self) -> bool:
    """Returns on all ranks whether rank 0 was asked to stop."""
    return self._process_group.broadcast_from(0, 'stop', self._stop)

  def _save_to_leave(self) -> None:
    """Saves what a stop would lose, in place of a checkpoint of this round."""
    node = self.node
    if isinstance(node.role, miner_lib.MinerRole):
      # Between two polls no training is under way, but for early steps.
      lasting = node.role.begun is None
    else:
      lasting = node.savable
    here = node.state.round, node.state.trained
    if lasting and here != (self._saved, self._saved_trained):
      self._save(overwrite=True)

  def _damaged(self, line: str) -> None:
    """Reports a damaged checkpoint: in the log, the status and the events."""
    print(line, file=sys.stderr, flush=True)
    self.workdir.event(node_lib.Event(-1, -1, 'restore', line))

  def _save(self, overwrite: bool = False) -> None:
    """Saves a checkpoint; a full disk is an error in the status only."""
    state = self.node.state
    self._saved, self._saved_trained = state.round, state.trained
    try:
      self._checkpoints.save_tree(
        state.round, self.node.save(), overwrite=overwrite
      )
      self._forget_synced()
      self._is_saved = True
    except checkpoint_lib.CheckpointError as e:
      self._is_saved = False
      self.workdir.status(error=str(e))

  def _forget_synced(self) -> None:
    """Deletes what was synced if the last own checkpoint is written."""
    if self._is_saved and not self._process_group.index:
      sync.forget(self.workdir.path)

  def _over(self) -> bool:
    state, rounds = self.node.state, self.node.config.rounds
    return state.round >= rounds and state.previous_round_done(self.node.phases)

  def _due(self, completed: int) -> bool:
    return self._checkpoints.due(completed) and completed != self._saved

  def _publish_status(self, phase: str) -> None:
    """Tells everybody where this node stands; a failure changes nothing."""
    node, run = self.node, self.node.shared_model.run
    made = None
    if isinstance(node.role, miner_lib.MinerRole):
      made = node.role.contribution.result()

    def compute() -> published_status.Status:
      return published_status.make(
        self._role,
        phase,
        node.state.round,
        made.loss if made is not None else None,
        self.workdir.last_error,
      )

    status = self._process_group.broadcast_from(0, 'status', compute)
    try:
      data = published_status.encode(
        published_status.Status(*status), run, self._chain.sign
      )
      if self._process_group.is_single:
        self._status_thread.submit(
          lambda: published_status.publish(node.objects, data)
        )
      else:
        published_status.publish(node.objects, data)
    except (chain_lib.ChainError, store_lib.StoreError, OSError) as e:
      self.workdir.status(error=f'status: {type(e).__name__}: {e}')
    self._note_failures()
    self.workdir.last_error = ''

  def _note_failures(self) -> None:
    """Reports what failed beside the rounds."""
    if error := self._status_thread.take_error():
      self.workdir.status(error=f'status: {error}')
    publisher = self._in_ranks or self._publisher
    if error := publisher.take_error():
      text = f'{error} ({publisher.failures} failures so far)'
      event = node_lib.Event(-1, self.node.state.round, 'publish', text)
      self.workdir.event(event)

  def _show(self, phase: str, head: int | None = None) -> None:
    """Writes the state of this node to status.json."""
    node = self.node
    fields: dict[str, ct.Json] = {
      'phase': phase,
      'head': head,
      'round': node.state.round,
      'root': node.root.hex(),
      'fingerprint': node.fingerprint(),
    }
    if isinstance(node.role, miner_lib.MinerRole):
      made = node.role.contribution.result()
      fields |= {} if made is None else {'loss': made.loss}
    self.workdir.status(**fields)


def build_miner(
  context: node_lib.Context,
  start: apply.Position,
  data: tokens_lib.TokenData,
  mesh: jax.sharding.Mesh | None,
  policy: miner_lib.MinerPolicy = miner_lib.HONEST,
) -> miner_lib.Miner:
  """Returns a miner that acts by a policy, with its programs compiled."""
  config = context.config
  trainer = trainer_lib.Trainer(config, context.shared_model, data, mesh)
  # One step compiles the programs before the first round begins.
  params, task = start.shared.params, local_lib.Task(0, 0, b'', bytes(32))
  batches = itertools.islice(trainer.batches(task), 1)
  with contextlib.suppress(local_lib.DivergedError):  # not a round of the run
    trainer.train(params, trainer.init(params), task, batches)
  role = miner_lib.role(miner_lib.LocalSlot(trainer), start)
  overlap = bool(config.optim.overlap)
  handlers = miner_lib.handlers(policy, overlap)
  return node_lib.Node(context, start, role, handlers)
