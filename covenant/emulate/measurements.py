"""The record of an emulated round: losses, bytes, and where time went."""

import collections
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from covenant import config as config_lib
from covenant import metrics
from covenant.gauntlet import incentives
from covenant.node import base as node_lib
from covenant.node import evaluator as evaluator_lib
from covenant.node import miner as miner_lib
from covenant.node import validator as validator_lib
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.protocol import round as round_lib
from covenant.train import island as island_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train.pipeline import boundary_bytes

Phase = round_lib.Phase
# Phase -> the field of `metrics.Round` that counts it.
_FIELDS = {
  Phase.BEGIN: 'train_seconds',
  Phase.TRAIN: 'train_seconds',
  Phase.COMMIT: 'exchange_seconds',
  Phase.UPLOAD: 'exchange_seconds',
  Phase.COLLECT: 'exchange_seconds',
  Phase.VOTE: 'exchange_seconds',
  Phase.DECIDE: 'exchange_seconds',
  Phase.APPLY: 'outer_seconds',
  Phase.KEEP: 'outer_seconds',
  Phase.CATCH_UP: 'outer_seconds',
  Phase.SCORE: 'score_seconds',
}


class Stopwatch:
  """Sums the seconds of all nodes of a host, which act one at a time.

  Attributes:
    note: called with the name of a node and each event that is no phase.
  """

  def __init__(self):
    self._spent = collections.defaultdict[str, float](float)
    self._lost: list[str] = []
    self.note: Callable[[str, node_lib.Event], None] = lambda *_: None

  def observe(self, event: node_lib.Event, name: str = '') -> None:
    """Adds the time of one phase of the node of a name, or passes on a note."""
    if event.what not in node_lib.NOTES:
      self._spent[_FIELDS[Phase(event.what)]] += event.seconds
      return
    self.note(name, event)
    if event.what == node_lib.LOST_ROUND:
      self._lost.append(event.error)

  def check(self, sent: Mapping[int, local_lib.Contribution]) -> None:
    """Raises DivergedError if nobody trained, because all rounds are lost."""
    lost, self._lost = self._lost, []
    if lost and not any(made.tokens for made in sent.values()):
      raise local_lib.DivergedError(lost[0].partition('; it sits out')[0])

  def train(self, wait: Callable[[], None]) -> None:
    """Waits for training that is under way, and adds the time."""
    began = time.perf_counter()
    wait()
    self._spent['train_seconds'] += time.perf_counter() - began

  def lap(self) -> dict[str, float]:
    """Returns the seconds since the last lap, by field."""
    spent = {field: self._spent[field] for field in _FIELDS.values()}
    self._spent.clear()
    return spent


def round_record(
  config: config_lib.Config,
  counters: checkpoint_lib.RunCounters,
  sent: Mapping[int, local_lib.Contribution],
  witness: validator_lib.Validator,
  shared_model: shared_state_lib.SharedModel,
  seconds: float,
  spent: Mapping[str, float],
) -> metrics.Round:
  """Returns the metrics of a round.

  Args:
    config: of the run.
    counters: after the round.
    sent: the contributions of the round, by uid.
    witness: the validator whose view is recorded.
    shared_model: of the run.
    seconds: the duration of the round.
    spent: the seconds of its parts; see `Stopwatch.lap`.
  """
  # A contribution without training has no loss.
  trained = {uid: c for uid, c in sent.items() if c.tokens}
  bytes_round = sum(len(c.payload) for c in sent.values())
  dense_bytes = shared_model.spec.dense_bytes * len(sent)
  return metrics.Round(
    round=counters.round,
    tokens=counters.tokens,
    loss=float(np.mean([c.loss for c in trained.values()])),
    miner_losses=tuple(c.loss for c in trained.values()),
    uids=tuple(trained),
    learning_rate=float(_rates(config, counters.round, shared_model)[-1]),
    bytes_up=counters.bytes_up,
    bytes_round=bytes_round,
    dense_bytes_round=dense_bytes,
    compression_ratio=dense_bytes / bytes_round,
    delta_norm=witness.delta_norm,
    error_norm=float(np.mean([c.error_norm for c in trained.values()])),
    payloads=len(witness.messages),
    seconds=seconds,
    tokens_per_second=sum(c.tokens for c in trained.values()) / seconds,
    **spent,
    stage_bytes=sum(
      boundary_bytes.round_bytes(
        config.model,
        island_lib.of(config, uid),
        contribution.tokens // config.data.context,
        config.data.context,
      )
      for uid, contribution in trained.items()
    ),
    weights=_weights(config, witness),
  )


def step_records(
  config: config_lib.Config,
  completed: int,
  miners: Sequence[miner_lib.Miner],
  shared_model: shared_state_lib.SharedModel,
) -> list[metrics.Step]:
  """Returns the inner steps of a round, each the mean of the miners.

  Args:
    config: of the run.
    completed: rounds completed, this one included.
    miners: in the order of uids.
    shared_model: of the run.
  """
  length = config.optim.inner_steps
  # Slower and faster miners take their steps in the time of a round.
  at: dict[int, list[tuple[float | None, float | None, int]]] = {}
  for uid, miner in enumerate(miners):
    trained, losses, norms = miner.role.trained
    if trained != completed - 1:
      continue
    batch = island_lib.of(config, uid).batch * config.data.context
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
      step = i * length // len(losses)
      at.setdefault(step, []).append((loss, norm, batch))
  first = (completed - 1) * length
  rates = _rates(config, completed, shared_model)
  return [
    metrics.Step(
      round=completed,
      step=first + step,
      tokens=sum(tokens for *_, tokens in each),
      loss=_mean([loss for loss, *_ in each]),
      gradient_norm=_mean([norm for _, norm, _ in each]),
      learning_rate=float(rates[step]),
      skipped=sum(None in numbers for numbers in each),
    )
    for step, each in sorted(at.items())
  ]


def _rates(
  config: config_lib.Config,
  completed: int,
  shared_model: shared_state_lib.SharedModel,
) -> np.ndarray:
  """Returns the learning rate of each inner step of a round."""
  length = config.optim.inner_steps
  steps = (completed - 1) * length + np.arange(length, dtype=np.int32)
  # One program, where a dozen small ones would be compiled.
  return np.asarray(jax.jit(shared_model.method.schedule)(steps))


def _mean(numbers: list[float | None]) -> float | None:
  known = [x for x in numbers if x is not None]
  return sum(known) / len(known) if known else None


def evaluation_record(
  counters: checkpoint_lib.RunCounters,
  heldout: evaluator_lib.HeldOut,
  seconds: float,
) -> metrics.Evaluation:
  """Returns the metrics of an evaluation that took some seconds."""
  return metrics.Evaluation(
    round=counters.round,
    tokens=counters.tokens,
    bytes_up=counters.bytes_up,
    loss=heldout.nats_per_token,
    nats_per_byte=heldout.nats_per_byte,
    bits_per_byte=heldout.nats_per_byte / np.log(2),
    sequences=heldout.sequences,
    seconds=seconds,
  )


def _weights(
  config: config_lib.Config, witness: validator_lib.Validator
) -> tuple[float, ...]:
  """Returns the weight that a validator would give each miner."""
  shares = incentives.weights(witness.role.standings, config.gauntlet)
  if not shares:
    return ()
  return tuple(shares.get(u, 0.0) for u in range(config.miners))
