"""A node that gets the shared state before it takes part in a run.

It needs no place in the subnet: it reads the chain and the buckets of
validators. A miner or validator that then starts with the same workdir begins
where this one ended, so that the time of joining is not spent registered. It
may be several processes, as the node to come: each keeps its shards.
"""

import functools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from covenant import config as config_lib
from covenant import startup
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.node import connect
from covenant.node import follow
from covenant.node import miner as miner_lib
from covenant.node import multihost as multihost_lib
from covenant.node import ranked
from covenant.node import workdir as workdir_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import catchup
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.protocol import rejoin
from covenant.store import interface as store_lib
from covenant.train import placement
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib

FOLDER = 'synced'  # of the state, in a workdir
JOINING = 'joining'  # of a checkpoint that is being loaded
_FAILURES = (
  apply.OutOfSyncError,
  chain_lib.ChainError,
  store_lib.StoreError,
  OSError,
)


def sync(config: config_lib.Config, workdir: str) -> None:
  """Gets the state of a run into the workdir before a node registers."""
  with (
    multihost_lib.start(config.network, config.devices) as process_group,
    startup.stoppable('stopping') as stop,
  ):
    Sync(config, workdir, process_group).run(stop)


class Sync:
  """Follows a run without a part in it.

  Args:
    config: the config of the run.
    workdir: the folder of the node to come, which all its processes see.
    process_group: the processes of that node; None is this one alone.

  Raises:
    ChainError, StoreError, ConfigError: it cannot start.
    FolderInUseError: another process has the workdir.
    MultihostError: another process of the group has ended.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: str | os.PathLike[str],
    process_group: multihost_lib.ProcessGroup | None = None,
  ):
    self._config = config
    self._process_group = group = process_group or multihost_lib.ProcessGroup()
    self._workdir = workdir_lib.Workdir(
      workdir, 'sync', config.network.hotkey, group.index
    )
    self._chain = ranked.chain(
      group, lambda: connect.chain(config, reads_only=True)
    )
    offload = config.devices.offload
    mesh = placement.Placement(group.mesh, offload).home_mesh
    self._shared_model = shared_state_lib.SharedModel(config, mesh, offload)
    run = self._shared_model.run
    opened = functools.partial(connect.objects, config, run, writes=False)
    self._objects = ranked.storage(group, run, opened)
    self._objects.folder = self._workdir.path / JOINING
    self._refused: set[catchup.Refused] = set()
    self._checkpoints = checkpoint_lib.Checkpoints(
      pathlib.Path(workdir, FOLDER), config.checkpoint
    )
    genesis = apply.Position(
      config.first_round,
      manifest_lib.genesis(run),
      self._shared_model.init(),
    )
    self._place = restored(self._checkpoints, genesis)

  @property
  def place(self) -> apply.Position:
    """The state it has."""
    return self._place

  def run(self, stop: Callable[[], bool]) -> None:
    """Follows the run until its last round, or until asked to stop."""
    seconds = min(self._chain.block_seconds, 12.0) / 2

    def is_stopping() -> bool:
      return self._process_group.broadcast_from(0, 'stop', stop)

    with self._workdir:
      while not is_stopping() and self._place.round < self._rounds:
        try:
          has_moved = self.step()
        except _FAILURES as e:
          self._workdir.status(error=f'{type(e).__name__}: {e}')
          has_moved = False
        if not has_moved:
          time.sleep(seconds)
      phase = 'stopped' if is_stopping() else 'finished'
      self._workdir.status(phase=phase)
      # Not after an error: it may wait for a rank that is gone.
      self._checkpoints.close()

  @property
  def _rounds(self) -> int:
    """The rounds of the run, as amended."""
    adopted = self._place.amendments
    return amendments_lib.last_config(self._config, adopted).rounds

  def step(self) -> bool:
    """Catches up once and saves the state; returns whether it moved."""
    head, adopted = self._chain.head(), self._place.amendments
    schedule = amendments_lib.schedule(self._config, adopted)
    before, target = self._place.round, schedule.round_at(head) - 1
    if schedule.finalized(head) < 0 or min(target, self._rounds) <= before:
      return False
    self._place, _ = rejoin.follow(
      self._chain,
      self._objects,
      self._shared_model,
      head,
      self._refused,
      self._place,
      adopted,
    )
    if self._place.round <= before:
      return False
    self._checkpoints.save_tree(self._place.round, _to_tree(self._place))
    here = f'round {self._place.round}, {self._place.round - before} more'
    self._workdir.status(phase='synced', round=self._place.round)
    if not self._process_group.index:
      print(f'synced: {here}', file=sys.stderr, flush=True)
    return True


def start(
  workdir: str | os.PathLike[str],
  config: config_lib.Config,
  genesis: apply.Position,
) -> apply.Position:
  """Returns where a node begins: the state that was synced, or the genesis."""
  folder = pathlib.Path(workdir, FOLDER)
  if not folder.is_dir():
    return genesis
  with checkpoint_lib.Checkpoints(folder, config.checkpoint) as checkpoints:
    return restored(checkpoints, genesis)


def enter(node: node_lib.Node[Any], place: apply.Position) -> None:
  """Makes a node that was restored go on from a synced state, if it is later.

  It is as if the node had caught up: it still owes its error feedback, and what
  it made for its own round is late.
  """
  if place.round > node.state.round:
    follow.jump(node, place)
    if isinstance(node.role, miner_lib.MinerRole):
      node.role.contribution = node_lib.Future.done(None)


def forget(workdir: str | os.PathLike[str]) -> None:
  """Deletes the state that was synced, once a node has one of its own."""
  shutil.rmtree(pathlib.Path(workdir, FOLDER), ignore_errors=True)


def restored(
  checkpoints: checkpoint_lib.Checkpoints, genesis: apply.Position
) -> apply.Position:
  """Returns the newest position that was saved, or the genesis."""
  tree = checkpoints.restore_tree(_to_tree(genesis))
  if tree is None:
    return genesis
  text = json.loads(tree['text'])
  root = bytes.fromhex(text['root'])
  adopted = amendment_lib.list_from_json(text.get('amendments', []))
  return apply.Position(text['round'], root, tree['shared'], adopted)


def _to_tree(place: apply.Position) -> dict[str, ct.PyTree]:
  text = {
    'round': place.round,
    'root': place.root.hex(),
    'amendments': amendment_lib.list_to_json(place.amendments),
  }
  return {'shared': place.shared, 'text': json.dumps(text)}
