"""A miner or validator as a process: it follows real time.

It keeps in its workdir, beside its journal, checkpoints/: where it stands,
with all that only it knows. A miner may be several processes, its ranks, with
one workdir that all can see: each has a journal of its own there, in rank-N/
but for rank 0, and all write the checkpoints together.
"""

import itertools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.data import dataset
from covenant.data import tokens as tokens_lib
from covenant.gauntlet import checks
from covenant.gauntlet import scores
from covenant.node import connect
from covenant.node import journal as journal_lib
from covenant.node import miner as miner_lib
from covenant.node import multihost as multihost_lib
from covenant.node import profile as profile_lib
from covenant.node import validator as validator_lib
from covenant.optim import sparseloco
from covenant.protocol import apply
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.train import local as local_lib
from covenant.train import placement
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib

_POLL = 0.5  # of a block, at most, between two looks at the chain
_UNREACHABLE = 1.0  # seconds until the chain is asked again


class Process:
  """One node, its checkpoints and its journal.

  Args:
    config: the run's, with its own `network` section.
    role: 'miner' or 'validator'; 'pool' of a subclass.
    workdir: its folder.
    process_group: the processes that are this node together; this one if omitted.
    profile: a round to trace, see `covenant/node/profile.py`.

  Raises:
    ChainError, StoreError, ConfigError: the node cannot start; says why.
  """

  def __init__(
    self,
    config: config_lib.Config,
    role: str,
    workdir: str | os.PathLike[str],
    process_group: multihost_lib.ProcessGroup | None = None,
    profile: int | None = None,
  ):
    self._config = config
    self._process_group = process_group = (
      process_group or multihost_lib.ProcessGroup()
    )
    workdir = pathlib.Path(workdir)
    hotkey = config.network.hotkey
    own = (
      workdir / f'rank-{process_group.index}'
      if process_group.index
      else workdir
    )
    self._journal = journal_lib.Journal(own, role, hotkey)
    self._profile = profile_lib.Profile(own, profile)
    self._chain = process_group.chain(lambda: connect.chain(config))
    mesh = placement.Placement(process_group.mesh).home_mesh
    offload = role == 'miner' and config.devices.offload
    shared_model = shared_state_lib.SharedModel(config, mesh, offload)
    run = shared_model.run
    objects = process_group.objects(run, lambda: connect.objects(config, run))
    data = dataset.load(config)
    self._checkpoints = checkpoint_lib.Checkpoints(
      workdir / 'checkpoints', config.checkpoint
    )
    start = apply.Position(0, manifest_lib.genesis(run), shared_model.init())
    common = (config, self._chain, objects, shared_model, start)
    if role == 'validator':
      self._node = self._validator(common, data)
    else:
      self._node = self._miner(common, data)
    saved = self._checkpoints.restore_tree(self._node.save())
    if saved is not None:
      self._node.load(saved)
    self._saved = self._node.state.round if saved is not None else None
    here = self._node.state.round, self._node.root, self._node.fingerprint()
    process_group.ask(here, lambda: None)
    self._show('ready')

  def _miner(
    self, common: tuple[Any, ...], data: tokens_lib.TokenData
  ) -> miner_lib.Miner:
    config, _, _, shared_model, start = common
    trainer = local_lib.Trainer(
      config, shared_model, data, self._process_group.mesh
    )
    # Compiled before the first round begins, not in it: one step of it.
    params, task = start.shared.params, local_lib.Task(0, 0, b'', bytes(32))
    batches = itertools.islice(trainer.batches(task), 1)
    trainer.train(params, trainer.init(params), task, batches)
    return miner_lib.Miner(
      *common, trainer=trainer, observe=self._journal.event, sole=True
    )

  def _validator(
    self, common: tuple[Any, ...], data: tokens_lib.TokenData
  ) -> validator_lib.Validator:
    config, _, _, shared_model, start = common
    judge = validator_lib.Judge(
      checks.Checker(
        shared_model.abstract_params, shared_model.method.compression
      ),
      scores.Scorer(config, shared_model.method, shared_model.abstract_params),
      data.train,
    )
    self._warm_up(judge, shared_model, start.shared)
    return validator_lib.Validator(
      *common,
      judge=judge,
      observe=self._journal.event,
      announce=self._journal.verdict,
    )

  def _warm_up(
    self,
    judge: validator_lib.Judge,
    shared_model: shared_state_lib.SharedModel,
    shared: shared_state_lib.SharedState,
  ) -> None:
    """Compiles what scoring needs, on an empty message."""
    nothing = jax.tree.map(
      lambda x: jnp.zeros(x.shape), shared_model.abstract_params
    )
    compression = shared_model.method.compression
    message, _ = sparseloco.compress(nothing, None, compression, None)
    shared_model.apply_round(shared, {0: message})
    ids = np.arange(self._config.gauntlet.sequences)
    tokens_NxL1 = judge.split.read(ids, self._config.data.context)
    evaluation = judge.scorer.open(shared.params, {0: message}, tokens_NxL1)
    judge.scorer.score(evaluation, message, tokens_NxL1)

  def run(self, stop: Callable[[], bool]) -> None:
    """Follows the run until its last round, or until asked to stop."""
    node, rounds = self._node, self._config.rounds
    while not self._process_group.ask('stop', stop) and not self._over(rounds):
      try:
        head = self._chain.head()
      except chain_lib.ChainError as e:
        self._journal.status(error=f'{type(e).__name__}: {e}')
        time.sleep(_UNREACHABLE)
        continue
      self._profile.at(node.state.round)
      wake = node.poll(head)
      if wake > head:
        self._show('waiting', head)
        blocks = min(wake - head, 1) * _POLL
        time.sleep(blocks * self._chain.block_seconds)
      elif node.savable and self._due(node.state.round):
        self._save()
    self._profile.__exit__()
    self._show('finished' if self._over(rounds) else 'stopped')
    try:
      self._checkpoints.__exit__()
    except checkpoint_lib.CheckpointError as e:
      self._journal.status(error=str(e))

  def _save(self) -> None:
    """A full disk costs what a restart then loses, not the process."""
    self._saved = self._node.state.round
    try:
      self._checkpoints.save_tree(self._saved, self._node.save())
    except checkpoint_lib.CheckpointError as e:
      self._journal.status(error=str(e))

  def _over(self, rounds: int) -> bool:
    state = self._node.state
    return state.round >= rounds and state.previous_round_done(self._node.can)

  def _due(self, completed: int) -> bool:
    return self._checkpoints.due(completed) and completed != self._saved

  def _show(self, phase: str, head: int | None = None) -> None:
    """What there is to know of this node, for status.json."""
    node = self._node
    fields: dict[str, Any] = {
      'phase': phase,
      'head': head,
      'round': node.state.round,
      'root': node.root.hex(),
      'fingerprint': node.fingerprint(),
    }
    if isinstance(node, miner_lib.Miner) and node.contribution is not None:
      fields['loss'] = node.contribution.loss
    self._journal.status(**fields)
