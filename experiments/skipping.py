"""Pipelines that go on while an inner stage is away, against waiting for it.

  python -m experiments.skipping             about 8 core minutes
  python -m experiments.skipping --quick     seconds, a tiny model

Eight pipelines of four stages, which pass 5/16 as many numbers of four bits as
the model is wide, train as in experiments/study.py, for 24 rounds with 213,568
parameters. Each of the two inner stages fails in 1 % of
all steps, for the time of six, as in Crucible (178 million parameters, 8
replicas of 4 stages); failures are those of the seed and the pipeline, so that
both ways see the same.

  no failure
  bypassed    the others go on without the stage (`pool.bypass_steps`)
  waiting     nothing is trained meanwhile: the pipeline sends fewer steps

Either way the stage begins again with the shared parameters and the moments of
the round's start, and rounds begin when all stages are there. Messages weigh by
tokens. Unlike stages on machines of their own, these share a count of steps for
the bias of their moments, and one that is away at the end of a round sends what
its error feedback holds.

Criteria, written before the runs; n = 3 seeds, compared seed by seed; two
standard errors decide:
  S1  With bypassed stages the final held-out loss is at most 1 % above that of
      no failure (Crucible: "close to no failure").
  S2  It is at most that of waiting.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import metrics
from covenant import typing as ct
from covenant.data import assignment
from covenant.data import dataset
from covenant.data import tokens as tokens_lib
from covenant.node import evaluator as evaluator_lib
from covenant.optim import compressor as compressor_lib
from covenant.optim import sparseloco
from covenant.optim import weight
from covenant.train import island as island_lib
from covenant.train import local
from covenant.train import placement as placement_lib
from covenant.train import replica as replica_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import step as step_lib
from covenant.train.pipeline import subspace
from experiments import charts
from experiments import runner
from experiments import study

NONE, BYPASSED, WAITING = 'no failure', 'bypassed', 'waiting'
COMMON = (
  'model.layers=4',
  'model.scan_layers=false',
  'optim.aggregation.weight=tokens',
  'eval.every=8',
)
SIZES = {'0.2 M': ('islands=8x stages=4,rank=20,bits=4', 'rounds=24')}
TINY = (
  'islands=2x stages=4,rank=8,bits=4,steps=4',
  'miners=2',
  'model.width=32',
  'model.ffn_width=64',
  'data.context=16',
)


class Slot(NamedTuple):
  """An inner step of a pipeline."""

  away: frozenset[int]  # stages that have no part in it
  failed: frozenset[int]  # stages that have lost their progress since the last


@dataclasses.dataclass(frozen=True)
class Failing:
  """Trains pipelines whose inner stages fail; a `study.Program`."""

  policy: str
  rate: float = 0.01  # failures per step of an inner stage
  steps: int = 6  # of a failure

  def slots(self, config: config_lib.Config, uid: int) -> list[list[Slot]]:
    """Returns the steps that a pipeline trains in each round."""
    island = island_lib.of(config, uid)
    inner = range(1, island.stages - 1)
    draw = np.random.default_rng([config.seed, uid])
    left = dict.fromkeys(inner, 0)  # steps until a stage is back
    rounds: list[list[Slot]] = []
    for _ in range(config.rounds):
      found: list[Slot] = []
      failed: set[int] = set()
      for _ in range(island.steps):
        draws = draw.random(len(inner)) < self.rate
        new = [
          s for s, x in zip(inner, draws, strict=True) if x and not left[s]
        ]
        if self.policy != NONE:
          left |= dict.fromkeys(new, self.steps)
          failed.update(new)
        away = frozenset(s for s in inner if left[s])
        if not away or (self.policy == BYPASSED and found):
          found.append(Slot(away, frozenset(failed)))
          failed = set()
        left = {s: max(n - 1, 0) for s, n in left.items()}
      rounds.append(found)
    return rounds

  def run(self, config: config_lib.Config) -> list[metrics.Evaluation]:
    data = dataset.load(config)
    model = shared_state_lib.SharedModel(config)
    evaluator = evaluator_lib.Evaluator(config, data)
    pipelines = Pipelines(config, model, data.train)
    uids = range(config.miners)
    slots = [self.slots(config, uid) for uid in uids]
    shared = model.init()
    states = [pipelines.fresh(shared.params) for _ in uids]
    evaluations, tokens, sent = [], 0, 0
    for r in range(config.rounds + 1):
      if r % config.eval.every == 0 or r == config.rounds:
        found = evaluator.evaluate(shared.params)
        evaluations.append(
          metrics.Evaluation(
            round=r,
            tokens=tokens,
            bytes_up=sent,
            loss=found.nats_per_token,
            nats_per_byte=found.nats_per_byte,
            bits_per_byte=found.nats_per_byte / np.log(2),
            sequences=found.sequences,
            seconds=0.0,
          )
        )
      if r == config.rounds:
        break
      trained = {}
      for uid in uids:
        if slots[uid][r]:
          trained[uid], states[uid] = pipelines.train(
            shared.params, states[uid], uid, r, slots[uid][r]
          )
      most = assignment.per_miner(config)
      weights = {
        uid: weight.weigh(model.method.weight, of.sequences, most)
        for uid, of in trained.items()
      }
      messages = {uid: of.message for uid, of in trained.items()}
      shared, _ = model.apply_round(shared, messages, weights=weights)
      tokens += config.data.context * sum(x.sequences for x in trained.values())
      sent += len(trained) * model.spec.payload_bytes
    return evaluations


class Pipelines:
  """The compiled programs of pipelines whose stages are away at times.

  Args:
    config: the config of the run, with pipelines of one kind.
    model: the shared model of the run.
    split: the data to train on.
  """

  def __init__(
    self,
    config: config_lib.Config,
    model: shared_state_lib.SharedModel,
    split: tokens_lib.Split,
  ):
    self._config, self._method, self._split = config, model.method, split
    self._island = island_lib.of(config, 0)
    self._whole = replica_lib.pipeline(
      config, self._island, placement_lib.Placement(None), split
    )
    self._compressor = compressor_lib.Compressor(
      model.abstract_params, self._method.compression, self._method.error_decay
    )
    self._steps: dict[frozenset[int], Callable] = {
      frozenset(): self._whole.step
    }

  def fresh(self, params: ct.Params) -> local.MinerState:
    """Returns the state of a pipeline before the first round."""
    assert self._method.inner is not None
    inner, error = (
      self._method.inner.init(params),
      sparseloco.init_error(params),
    )
    return local.MinerState(np.int32(0), inner, error)

  def train(
    self,
    params: ct.Params,
    state: local.MinerState,
    uid: int,
    round_index: int,
    slots: Sequence[Slot],
  ) -> tuple[local.TrainedRound, local.MinerState]:
    """Trains the steps of a round."""
    config = self._config
    task = local.Task(uid, round_index, config.seed, b'')
    batches = local.batches(config, task, self._split)
    run = local.RoundInProgress.begin(
      task,
      (tokens for tokens, _ in zip(batches, slots, strict=False)),
      joined=np.int32(0),
      steps=self._island.steps,
      schedule_steps=config.optim.inner_steps,
    )
    replica = self._replica(slots)
    return local.train_round(
      replica, self._compressor.compress, params, state, run
    )

  def _replica(self, slots: Sequence[Slot]) -> local.Replica:
    """Returns the replica of a round with these steps."""
    whole, spans = self._whole, subspace.spans(self._config.model, self._island)
    coming = iter(slots)
    start: list[tuple[ct.Params, ct.OptState]] = []

    def begin_round(params, state, run):
      own, inner, constants = whole.begin_round(params, state, run)
      start.append(jax.tree.map(jnp.copy, (own, inner)))
      return own, inner, constants

    def step(params, inner, *rest):
      slot = next(coming)
      if slot.failed:
        lost = {f'layers_{i}' for s in slot.failed for i in spans[s]}
        again = jax.tree.map(jnp.copy, start[0])
        params, inner = step_lib.hold_layers(lost, (params, inner), again)
      return self._step(slot.away)(params, inner, *rest)

    return whole._replace(begin_round=begin_round, step=step)

  def _step(self, away: frozenset[int]) -> Callable:
    if away not in self._steps:
      self._steps[away] = step_lib.inner_step(
        self._config, None, self._island, away
      )
    return self._steps[away]


def _cell(size: str, policy: str) -> str:
  return f'{size}, {policy}'


def plan(
  runs: Sequence[study.Run],
  seeds: int,
  sizes: Mapping[str, tuple[str, ...]] = SIZES,
) -> Iterator[study.Cell]:
  del runs
  for seed in range(seeds):
    for size, sets in sizes.items():
      for policy in (NONE, BYPASSED, WAITING):
        name = _cell(size, policy)
        yield study.Cell(name, seed, (*COMMON, *sets), Failing(policy))


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  cells = {run.cell for run in runs}
  for size in SIZES:
    none, bypassed, waiting = (
      _cell(size, policy) for policy in (NONE, BYPASSED, WAITING)
    )
    if not {none, bypassed, waiting} <= cells:
      continue
    above, waited = (_above(runs, cell, none) for cell in (bypassed, waiting))
    yield study.Verdict(
      f'S1, {size}',
      'pipelines that bypass failed stages lose little',
      'Crucible',
      'loss at most 1 % above no failure',
      f'{_share(above)}; waiting {_share(waited)}',
      study.at_most(above, 0.01),
      (bypassed, none),
    )
    gap = study.gap(runs, bypassed, waiting)
    yield study.Verdict(
      f'S2, {size}',
      'bypassing failed stages is not worse than waiting for them',
      'ours',
      'loss minus that of waiting at most 0',
      str(gap),
      study.at_most(gap),
      (bypassed, waiting),
    )


def _above(runs: Sequence[study.Run], cell: str, other: str) -> study.Gap:
  """Returns the relative difference of two cells' losses, seed by seed."""
  here, there = study.losses(runs, cell), study.losses(runs, other)
  seeds = here.keys() & there.keys()
  return study.spread([here[seed] / there[seed] - 1 for seed in sorted(seeds)])


def _share(gap: study.Gap) -> str:
  return f'{gap.mean:+.2%} ± {gap.deviation:.2%} (n = {gap.n})'


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  sizes = dict.fromkeys(run.cell.partition(',')[0] for run in runs)
  rows = {
    _cell(size, policy): (_cell(size, policy), _cell(size, NONE))
    for size in sizes
    for policy in (BYPASSED, WAITING)
  }
  charts.differences(runs, rows, path, 'loss above no failure (nats per byte)')


STUDY = study.Study('skipping', plan, judge, draw)


def main() -> None:
  used = STUDY
  if runner.arguments(__doc__).quick:
    tiny = {'tiny': TINY}
    used = STUDY._replace(plan=lambda runs, seeds: plan(runs, seeds, tiny))
  runner.main(used, __doc__)


if __name__ == '__main__':
  main()
