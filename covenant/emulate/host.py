"""A whole run on one host: every miner in turn, then one shared step.

Nothing is simplified: each miner's contribution becomes payload bytes, which
are parsed, checked and aggregated like those of a stranger. One compiled
inner step serves all miners, one after another, so a miner trains bit for bit
as it would alone. Between rounds a miner holds its private state only; the
parameters are held once.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant.data import dataset
from covenant.data import tokens
from covenant.emulate import needs
from covenant.node import checkpoint as checkpoint_lib
from covenant.node import evaluator as evaluator_lib
from covenant.node import miner as miner_lib
from covenant.node import replica as replica_lib
from covenant.report import metrics

Private = miner_lib.Private
State = checkpoint_lib.State
_CONFIG = 'config.json'


class Outcome(NamedTuple):
  """What a run ended with."""

  state: State
  finished: bool  # False: interrupted, to be resumed


class Host:
  """The miners of one run and the state they share."""

  def __init__(self, config: config_lib.Config, data: tokens.TokenData):
    self._config = config
    needs.check_sequences(config, data.train.num_sequences(config.data.context))
    self.replica = replica_lib.Replica(config)
    self.miner = miner_lib.Miner(config, self.replica, data)
    self.evaluator = evaluator_lib.Evaluator(config, data)
    self._pool = concurrent.futures.ThreadPoolExecutor(needs.workers(config))

  def init(self) -> State:
    shared = self.replica.init()
    return State(
      checkpoint_lib.Position(0, self._config.seed, tokens=0, bytes_up=0),
      shared,
      {u: self.miner.init(shared.params) for u in range(self._config.miners)},
    )

  def round(self, state: State) -> tuple[State, metrics.Round]:
    """One round of all miners. Consumes `state`."""
    began = time.perf_counter()
    position, shared, miners = state
    private, sent = {}, {}
    for uid in sorted(miners):
      sent[uid], private[uid] = self.miner.contribute(
        shared.params, miners.pop(uid), uid, position.round
      )
    payloads = {uid: c.payload for uid, c in sent.items()}
    shared, advance = self.replica.advance(shared, payloads, position.round)
    bytes_round = sum(map(len, payloads.values()))
    dense_bytes = self.replica.spec.dense_bytes * len(payloads)
    trained = sum(c.tokens for c in sent.values())
    position = position._replace(
      round=position.round + 1,
      tokens=position.tokens + trained,
      bytes_up=position.bytes_up + bytes_round,
    )
    last_step = position.round * self._config.optim.inner_steps - 1
    seconds = time.perf_counter() - began
    record = metrics.Round(
      round=position.round,
      tokens=position.tokens,
      loss=np.mean([c.loss for c in sent.values()]),
      miner_losses=tuple(c.loss for c in sent.values()),
      uids=tuple(sent),
      learning_rate=float(np.asarray(self.replica.method.schedule(last_step))),
      bytes_up=position.bytes_up,
      bytes_round=bytes_round,
      dense_bytes_round=dense_bytes,
      compression_ratio=dense_bytes / bytes_round,
      delta_norm=advance.delta_norm,
      error_norm=np.mean([c.error_norm for c in sent.values()]),
      payloads=len(payloads) - len(advance.refused),
      seconds=seconds,
      tokens_per_second=trained / seconds,
    )
    return State(position, shared, private), record

  def evaluate(self, state: State) -> metrics.Evaluation:
    began = time.perf_counter()
    heldout = self.evaluator.evaluate(state.shared.params)
    return metrics.Evaluation(
      round=state.position.round,
      tokens=state.position.tokens,
      bytes_up=state.position.bytes_up,
      loss=heldout.nats_per_token,
      nats_per_byte=heldout.nats_per_byte,
      bits_per_byte=heldout.nats_per_byte / np.log(2),
      sequences=heldout.sequences,
      seconds=time.perf_counter() - began,
    )


def run(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  observe: Callable[[metrics.Record], None] = lambda record: None,
  stop: Callable[[], bool] = lambda: False,
) -> Outcome:
  """Runs `config` in `workdir`, from its newest checkpoint if it has one.

  Writes config.json, metrics.jsonl, tensorboard/ and checkpoints/.

  Args:
    config: the experiment.
    workdir: a folder; made when missing.
    observe: called with every record, those of earlier starts included.
    stop: asked after every round; True ends the run with a checkpoint, from
      which it can be resumed.

  Raises:
    ConfigError: the config cannot run here, or `workdir` has another one's.
    Diverged: training produced a number that is not one.
  """
  workdir = pathlib.Path(workdir)
  needs.check(config)
  check_owner(workdir, config)
  host = Host(config, dataset.load(config))
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / _CONFIG).write_text(config_lib.to_json(config))
  state = host.init()
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      checkpoint_lib.Checkpoints(workdir / 'checkpoints', config.checkpoint)
    )
    restored = checkpoints.restore(state)
    state = restored or state
    path = workdir / 'metrics.jsonl'
    writer = stack.enter_context(
      metrics.MetricsWriter(
        path,
        workdir / 'tensorboard',
        resume=state.position.round if restored else None,
      )
    )
    for record in metrics.read(path):
      observe(record)

    def log(record: metrics.Record) -> None:
      writer.write(record)
      observe(record)

    if restored is None:
      log(host.evaluate(state))
    while state.position.round < config.rounds:
      state, record = host.round(state)
      log(record)
      completed = state.position.round
      last, stopped = completed == config.rounds, stop()
      if last or completed % config.eval.every == 0:
        log(host.evaluate(state))
      if last or stopped or checkpoints.due(completed):
        writer.sync()  # a checkpoint never knows of rounds that are not logged
        checkpoints.save(state)
      if stopped:
        break
  return Outcome(state, finished=state.position.round == config.rounds)


def check_owner(workdir: pathlib.Path, config: config_lib.Config) -> None:
  """Refuses a workdir that holds a run with another config.

  Raises:
    ConfigError: naming the fields that differ.
  """
  path = workdir / _CONFIG
  if not path.exists():
    return
  there = config_lib.from_json(path.read_text())
  if differ := config_lib.differences(there, config):
    raise config_lib.ConfigError(
      f'{workdir} holds a run with another config. Choose another --workdir, '
      'or set back: ' + '; '.join(differ)
    )
