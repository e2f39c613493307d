"""The training of a head: its stages' rounds, audits and pay."""

import math
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.config import amend
from covenant.data import tokens as tokens_lib
from covenant.node import base as node_lib
from covenant.node import miner as miner_lib
from covenant.pool import ledger as ledger_lib
from covenant.pool import messages
from covenant.pool import miner as pool_miner
from covenant.pool import orders as orders_lib
from covenant.pool import seats as seats_lib
from covenant.pool import stage_audit
from covenant.pool import stage_round
from covenant.pool import stage_tensors
from covenant.pool import stage_work
from covenant.store import interface as store_lib
from covenant.train import local as local_lib
from covenant.train.pipeline import subspace
from covenant.wire import payload


class StageTrainer:
  """The trainer that a node sees of a miner whose stages train."""

  def __init__(self, spec: payload.Spec, data: tokens_lib.TokenData):
    self.payload_bytes = spec.payload_bytes
    self.split = data.train
    self.observe: local_lib.Observe = lambda step: None


class StageSlot:
  """The devices of a head: those of its stages."""

  def __init__(self, trainer: StageTrainer):
    self.trainer = trainer

  def init(self, params: ct.Params, round_index: int) -> local_lib.MinerState:
    """Returns the state of a miner whose moments its stages have."""
    del params
    return local_lib.MinerState(np.int32(round_index), None, None)


class StageTraining:
  """Trains the rounds of a head by its stages, and pays them.

  Args:
    config: the config of the run.
    island: the pipeline.
    seats: the stages.
    tensors: their tensors.
    auditor: computes microbatches again.
    ledger: the accounts of the pool.
    run: the id of the run.
    workdir: the folder of the head.
    record: takes the record of a round.
    stop: returns True if the head is asked to stop.
    draw: the generator that selects samples, unknown to workers.

  Attributes:
    patience: seconds that a stage may take for an answer.
  """

  def __init__(
    self,
    config: config_lib.Config,
    island: config_lib.Island,
    seats: seats_lib.Seats,
    tensors: stage_tensors.StageTensors,
    auditor: stage_audit.Auditor,
    ledger: ledger_lib.Ledger,
    run: bytes,
    workdir: pathlib.Path,
    record: Callable[[dict[str, ct.Json]], None],
    stop: Callable[[], bool],
    draw: np.random.Generator,
  ):
    self._genesis = self._config = config
    self._island = island
    self.patience = config.pool.patience
    self._seats, self._tensors, self._auditor = seats, tensors, auditor
    self._ledger, self._run, self._workdir = ledger, run, workdir
    self._record, self._stop, self._draw = record, stop, draw
    self._refused: dict[str, str] = {}  # workers of this round, with reasons
    self._accused: dict[str, str] = {}  # caught since the last settlement
    self._missed = -1  # the last round without a step

  def train(
    self,
    node: miner_lib.Miner,
    task: local_lib.Task,
    params: ct.Params,
    batches: miner_lib.Batches,
  ) -> node_lib.Future[local_lib.TrainedRound | None]:
    """Trains a round; see `miner.MinerPolicy`.

    Raises:
      RetryLaterError: no stage has trained, or the head is asked to stop.
    """
    del params, batches
    self._config = node.config  # by the amendments up to this round
    if task.round >= node.config.rounds:
      return node_lib.Future.done(None)

    def late() -> bool:
      if self._stop():
        return True
      try:
        return node.chain.head() >= node.schedule.put_opens(task.round)
      except chain_lib.ChainError:
        return False

    pay = pool_miner.network_pay(self._ledger, node, task.uid)
    trainer, state = node.role.slot.trainer, node.role.miner_state.result()
    joined = int(state.joined) * node.config.optim.inner_steps

    def observe(step: local_lib.InnerStep) -> None:
      trainer.observe(step._replace(uid=task.uid, joined=joined))

    trained = self.train_round(task, trainer.split, late, pay, observe)
    if trained is None and not self._stop():
      self._say_missed(task.round)
    if trained is None or self._stop():
      raise node_lib.RetryLaterError
    node.role.trained = task.round, trained.losses, trained.norms
    if not math.isfinite(trained.loss):
      return node_lib.Future.done(None)
    return node_lib.Future.done(trained)

  def _say_missed(self, round_index: int) -> None:
    """Says once that a round has no step, and which stages were not there."""
    if round_index == self._missed:
      return
    self._missed = round_index
    names = (
      f'{s} ({self._seats.worker(s) or "no worker"})'
      for s in sorted(self._seats.missing())
    )
    absent = ', '.join(names) or 'none, but one is slow'
    _say(
      f'round {round_index} is missed: no step was taken in time; stages that '
      f'are not there: {absent}'
    )

  def train_round(
    self,
    task: local_lib.Task,
    split: tokens_lib.Split,
    late: Callable[[], bool],
    pay: int,
    observe: local_lib.Observe = lambda step: None,
  ) -> local_lib.TrainedRound | None:
    """Trains a round and settles its work; None without a whole step.

    The message of the result is the sections of all tensors. Its loss is not
    finite if the last step was not taken, and then the round is lost.

    Args:
      task: the assignment.
      split: the data.
      late: returns True when there is no time left.
      pay: the network's total pay to the uid, rao.
      observe: called with each step, once it is done; its uid and the step at
        which its miner joined are 0.
    """
    config = self._config
    first = task.round - config.pool.ban_rounds
    self._seats.banned = self._ledger.banned(first) | self._accused.keys()
    self._seats.spread()
    ids_n = local_lib.batch_ids(config, task, split).flat[: subspace.FITTED]
    fitted = split.read(ids_n, config.data.context)
    work = stage_round.StageRound(
      config,
      self._island,
      self._seats,
      task.round,
      late,
      self.patience,
      self._draw,
      observe,
      amend.for_stages(self._genesis, config),
    )
    result = work.train(local_lib.batches(config, task, split, late), fitted)
    if result is None:
      return None
    self._refused = dict(result.refused)
    sections, norm = self._sections(work)
    proven, caught = self._audit(result, fitted)
    self._settle(task.round, pay, result, proven, caught)
    taken = [
      loss
      for loss, of in zip(result.losses, result.norms, strict=True)
      if math.isfinite(loss + of)
    ]
    is_lost = not math.isfinite(result.losses[-1] + result.norms[-1])
    mean = float(np.asarray(taken, np.float32).mean()) if taken else math.nan
    return local_lib.TrainedRound(
      sections,
      result.receipt,
      result.sequences,
      math.nan if is_lost else mean,
      norm,
      len(result.losses) - len(taken),
      result.losses,
      result.norms,
    )

  def accuse(self, liars: dict[str, str]) -> None:
    """Takes the pay of liars, by reason, when a round is settled next."""
    self._accused |= liars

  def _settle(
    self,
    round_index: int,
    pay: int,
    result: stage_work.StagesResult,
    proven: set[str],
    caught: dict[str, str],
  ) -> None:
    """Enters the work of a round: layers x microbatches, but of liars."""
    caught = {**self._accused, **caught}
    paid = {
      worker: count
      for worker, count in result.work.items()
      if worker not in self._refused and worker not in caught
    }
    self._ledger.settle(
      round_index, pay, paid, proven & paid.keys(), set(caught)
    )
    self._report(round_index, result, paid, caught)
    self._accused = {}

  def _sections(
    self, work: stage_round.StageRound
  ) -> tuple[tuple[bytes, ...], float]:
    """Returns the sections of all tensors, and the norm of the errors.

    The tensors of a stage that did not answer, or whose sections are malformed,
    stay as they are.
    """
    found: dict[int, bytes] = {}
    square = 0.0
    for stage, sealed in enumerate(work.seal()):
      if sealed is None:
        continue
      try:
        norm = float(sealed.text['norm'])
        if not math.isfinite(norm):
          continue
        sizes = [int(size) for size in sealed.text['sizes']]
        sections = self._tensors.sections(stage, sizes, sealed.data)
        squared = norm**2
        found |= dict(zip(self._tensors.own[stage], sections, strict=True))
        square += squared
      except (*messages.MALFORMED, payload.PayloadError) as e:
        self._refused[sealed.worker] = f'stage {stage}, sections: {e}'
    places = range(len(self._tensors.spec.tensors))
    whole = tuple(
      found[i] if i in found else self._tensors.unchanged(i) for i in places
    )
    return whole, math.sqrt(square)

  def _audit(
    self, result: stage_work.StagesResult, fitted: np.ndarray
  ) -> tuple[set[str], dict[str, str]]:
    """Computes samples again; returns honest workers, and the lies of others.

    After a lie all stages learn from it, so later steps show nothing of them.
    """
    proven: set[str] = set()
    caught: dict[str, str] = {}
    samples = [s for s in result.samples if s.worker]
    drawn = self._draw.permutation(len(samples))[: self._config.pool.audits]
    last = math.inf  # the step of the first lie
    for sample in sorted((samples[i] for i in drawn), key=lambda s: s.step):
      if sample.worker in caught or sample.step > last:
        continue
      try:
        honest = self._auditor.is_honest(sample, fitted, result.fits)
      except (orders_lib.OrderError, store_lib.StoreError) as e:
        _say(f'no audit of stage {sample.stage}: {e}')
        continue
      if honest:
        proven.add(sample.worker)
        continue
      last = sample.step
      caught[sample.worker] = (
        f'stage {sample.stage}, step {sample.step}: its activations, computed '
        'again, are others'
      )
      self._seats.ban(sample.worker)
    return proven - caught.keys(), caught

  def seal(
    self,
    node: miner_lib.Miner,
    task: local_lib.Task,
    work: local_lib.TrainedRound,
  ) -> local_lib.Contribution:
    """Puts the sections of a round together to a signed payload."""
    header = payload.Header(
      self._run,
      task.round,
      task.uid,
      task.root[:16],
      work.receipt,
      work.sequences,
    )
    data = payload.assemble(
      header, work.message, self._tensors.spec, node.chain.sign
    )
    tokens = work.sequences * node.config.data.context
    return local_lib.Contribution(
      data, work.loss, tokens, work.error_norm, task.round
    )

  def _report(
    self,
    round_index: int,
    result: stage_work.StagesResult,
    paid: dict[str, int],
    caught: dict[str, str],
  ) -> None:
    totals = self._ledger.totals()
    record = {
      'round': round_index,
      'sequences': result.sequences,
      'steps': len(result.losses),
      'loss': result.losses[-1],
      'work': paid,
      'idle': [round(x, 4) for x in result.idle],
      'replays': result.replays,
      'bypassed': list(result.bypassed),
      'replaced': self._seats.replaced,
      'stage_bytes': result.passed_bytes,
      'holders': [self._seats.worker(s) for s in range(self._island.stages)],
      'caught': caught,
      'refused': self._refused,
      'rao': totals,
    }
    self._record(record)
    pool_miner.write_payouts(self._ledger, self._workdir / 'payouts.jsonl')
    idle = ', '.join(f'{x:.0%}' for x in result.idle)
    _say(
      f'round {round_index}: {len(result.losses)} steps, loss '
      f'{result.losses[-1]:.3f}; stages idle {idle}; earned '
      f'{totals["earned"] / ledger_lib.RAO:.9f} TAO in all'
    )
    for worker, why in {**caught, **self._refused}.items():
      _say(f'  {worker}: {why}')


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
