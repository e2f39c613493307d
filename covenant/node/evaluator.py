"""The evaluator: losses on held-out text, and exports for Hugging Face.

With lm-eval installed it exports the checkpoints that it evaluates, for
transformers and lm-eval.
"""

import csv
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant import files
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.data import assignment
from covenant.data import dataset
from covenant.data import pretrained
from covenant.data import tokens as tokens_lib
from covenant.models import evaluation
from covenant.node import connect
from covenant.node import export as export_lib
from covenant.node import samples
from covenant.node import workdir as workdir_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import catchup
from covenant.protocol import published_rules
from covenant.protocol import rejoin
from covenant.store import interface as store_lib
from covenant.train import placement as placement_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib

# The message of an evaluator that does not export.
WITHOUT = (
  'checkpoints are not exported for lm-eval, which is not installed: '
  "pip install 'covenant[lm-eval]'"
)
_COLUMNS = (
  'round',
  'nats_per_token',
  'nats_per_byte',
  'bits_per_byte',
  'sequences',
  'fingerprint',
)


class HeldOut(NamedTuple):
  """The loss on the held-out split."""

  nats_per_token: float
  nats_per_byte: float
  sequences: int


class Evaluator:
  """Compiled evaluation of one run's model on its held-out split.

  Args:
    config: the config of the run.
    data: the data of the run.
    placement: the devices of the node, which hold the parameters and share the
      sequences; None is one device.
  """

  def __init__(
    self,
    config: config_lib.Config,
    data: tokens_lib.TokenData,
    placement: placement_lib.Placement | None = None,
  ):
    self._placement = placement or placement_lib.Placement(None)
    context = config.data.context
    self._split = data.heldout
    self._context = context
    ids = assignment.evaluation(
      data.heldout.num_sequences(context), config.eval.sequences
    )
    # Full batches of one shape: one compilation, equal weights of sequences.
    batch = min(config.optim.inner.batch_size, len(ids))
    self._ids_NxB = ids[: len(ids) // batch * batch].reshape(-1, batch)
    self._nats = evaluation.BatchLoss(config, self._placement.mesh)

  def evaluate(self, params: ct.Params) -> HeldOut:
    """Returns the mean held-out loss of `params`."""
    batches = tokens_lib.prefetch(self._split, self._ids_NxB, self._context)
    if self._placement.mesh is not None:
      params = self._placement.replicate(self._placement.host.load(params))
    # One at a time: where programs with collectives queue, XLA's CPU devices
    # may wait for each other until it ends the process.
    nats = np.mean([jax.device_get(self._nats(params, b)) for b in batches])
    return HeldOut(
      nats_per_token=float(nats),
      nats_per_byte=float(nats) / self._split.bytes_per_token,
      sequences=self._ids_NxB.size,
    )


class EvaluatorProcess:
  """Evaluates published checkpoints, newest first, until the run is over.

  Writes evaluations.csv and one line per evaluation to evaluations.jsonl; with
  `eval.samples` a text of each to samples.jsonl, and if lm-eval is installed
  the exports hf/ROUND for it.

  Args:
    config: the config of the run.
    workdir: the folder of this node.
    mesh: the devices of this node; None is one device.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: str | os.PathLike[str],
    mesh: jax.sharding.Mesh | None = None,
  ):
    self._config = config
    hotkey = config.network.hotkey
    self._workdir = workdir_lib.Workdir(workdir, 'evaluator', hotkey)
    self._workdir.measure(config)
    self._chain = connect.chain(config)
    self._amendments: tuple[amendment_lib.Amendment, ...] = ()
    place = placement_lib.Placement(mesh, config.devices.offload)
    self._shared_model = shared_state_lib.SharedModel(
      config, place.home_mesh, config.devices.offload
    )
    self._objects = connect.objects(
      config, self._shared_model.run, writes=False
    )
    data = dataset.load(config)
    self._evaluator = Evaluator(config, data, place)
    self._exporter = None
    if wanted():
      self._exporter = export_lib.Exporter(config, self._workdir.path)
    else:
      print(WITHOUT, file=sys.stderr)
    self._refused: set[catchup.Refused] = set()  # see `CatchUp`
    pretrained.keep(self._workdir.path, config, data)
    self._sampler = samples.Sampler(config, self._workdir.path)
    self._path = self._workdir.path / 'evaluations.jsonl'
    self._rows = self._read()
    self._workdir.status(phase='ready')

  def run(self, stop: Callable[[], bool]) -> None:
    """Runs until the last round is evaluated, or `stop` returns True."""
    measured, seconds = self._workdir.telemetry, self._chain.block_seconds
    every = self._config.checkpoint.publish  # rounds from one to the next
    while not stop() and self._rounds not in self._rows:
      measured.pulse(max(self._rows, default=0), seconds, every)
      try:
        found = self._look()
      except (
        apply.OutOfSyncError,
        chain_lib.ChainError,
        store_lib.StoreError,
        OSError,
      ) as e:
        self._workdir.status(error=f'{type(e).__name__}: {e}')
        found = False
      if not found:
        time.sleep(min(seconds, 12.0) / 2)
        measured.waited(min(seconds, 12.0) / 2)
    measured.pulse(max(self._rows, default=0), seconds, every)
    measured.close()
    over = self._rounds in self._rows
    self._workdir.status(phase='finished' if over else 'stopped')

  @property
  def _rounds(self) -> int:
    """The rounds of the run, as amended."""
    return amendments_lib.last_config(self._config, self._amendments).rounds

  def _look(self) -> bool:
    """Evaluates the newest new checkpoint; returns True if there was one.

    It is one whose fingerprint a later manifest of the chain's history names.
    The state after the last round, which no manifest follows, is replayed from
    a checkpoint before it.
    """
    head, genesis = self._chain.head(), self._config
    schedule = amendments_lib.schedule(genesis, self._amendments)
    if schedule.finalized(head) < 0:
      return False
    around = self._chain, self._objects, self._shared_model, head
    self._amendments = published_rules.read(*around, self._amendments)
    attempt = rejoin.attempt_with(*around, self._refused, self._amendments)
    if attempt.target == self._rounds:
      self._evaluate(attempt.run(None))
      return True
    for r in reversed(attempt.published()):
      if r not in self._rows:
        place = attempt.checkpoint(r)
        if place is not None:
          self._evaluate(place)
          return True
    return False

  def _evaluate(self, place: apply.Position) -> None:
    heldout = self._evaluator.evaluate(place.shared.params)
    fingerprint = apply.fingerprint(self._shared_model, place)
    # Before the row is written: a restart skips rounds that have a row.
    self._export(place)
    if self._sampler.is_due(place.round, last=True):
      self._sampler.add(place.round, place.shared.params)
    row = {
      'round': place.round,
      'nats_per_token': heldout.nats_per_token,
      'nats_per_byte': heldout.nats_per_byte,
      'bits_per_byte': heldout.nats_per_byte / math.log(2),
      'sequences': heldout.sequences,
      'fingerprint': fingerprint,
    }
    self._rows[place.round] = row
    rows = [json.dumps(self._rows[r]) for r in sorted(self._rows)]
    files.write_lines(self._path, rows)
    table = io.StringIO(newline='')
    writer = csv.DictWriter(table, _COLUMNS)
    writer.writeheader()
    writer.writerows(self._rows[r] for r in sorted(self._rows))
    files.write(self._workdir.path / 'evaluations.csv', table.getvalue())
    self._workdir.status(
      phase='evaluating',
      round=place.round,
      root=place.root.hex(),
      fingerprint=fingerprint,
      loss=heldout.nats_per_token,
    )

  def _export(self, place: apply.Position) -> None:
    if self._exporter is None:
      return
    try:
      self._exporter.write(place.round, place.shared.params)
      self._exporter.prune()
    except config_lib.ConfigError as e:  # such as a full disk
      self._workdir.status(error=f'export: {e}')

  def _read(self) -> dict[int, dict[str, ct.Json]]:
    """Returns the evaluations of before a restart, by round."""
    rows = files.read_records(self._path, *_COLUMNS).objects
    return {row['round']: row for row in rows}


def wanted() -> bool:
  """Returns True if lm-eval is installed."""
  return importlib.util.find_spec('lm_eval') is not None
