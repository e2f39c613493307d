"""The pay of each uid in a run of experiments/gauntlet.py, by two rules.

By our rule it is what the weights of the run gave. By the deployed rule it is
counted again from the same findings and evaluations: whom the run listens to
and what it evaluates stay ours, so both rules see the same messages.
"""

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant import typing as ct
from covenant.adversaries import registry
from covenant.gauntlet import checks
from covenant.gauntlet import deployed_update
from covenant.gauntlet import ratings
from covenant.gauntlet import scores
from covenant.node import validator as validator_lib
from experiments import study

Weights = dict[int, float]


class Row(NamedTuple):
  """The pay of one uid, relative to the mean honest miner with full work."""

  cell: str
  seed: int
  uid: int
  kind: str  # its name in the registry; 'honest' for the others
  paid: float
  deployed: float  # by the deployed rule
  code: str
  rule: str  # ours, see `study.rule`


def rows(
  cell: str,
  config: config_lib.Config,
  verdicts: Sequence[validator_lib.Verdict],
) -> list[Row]:
  """Returns a row per uid, from the weights of the second half of the rounds.

  Args:
    cell: the name of the run in the tables.
    config: its config.
    verdicts: all verdicts of its first validator, in order.
  """
  names = registry.names(config)
  usual = [uid for uid in range(config.miners) if uid not in names]
  first = config.rounds // 2
  ours = _mean([v.weights for v in verdicts][first:], config.miners)
  theirs = _mean(
    deployed_weights([v.decisions for v in verdicts], config.gauntlet)[first:],
    config.miners,
  )
  ours_M, theirs_M = (
    [paid / statistics.mean(paid_M[u] for u in usual) for paid in paid_M]
    for paid_M in (ours, theirs)
  )
  return [
    Row(
      cell,
      config.seed,
      uid,
      names.get(uid, 'honest'),
      round(ours_M[uid], 4),
      round(theirs_M[uid], 4),
      study.code(),
      study.rule(),
    )
    for uid in range(config.miners)
  ]


def deployed_weights(
  decisions: Iterable[Sequence[ct.Json]], config: config_lib.Gauntlet
) -> list[Weights]:
  """Returns the weights that the deployed rule sets after each round.

  Args:
    decisions: those of each round, in order.
    config: the section of the run's config.
  """
  state, found = ratings.Ratings(), list[Weights]()
  for of_round in decisions:
    report = checks.CheckReport(
      {
        d['uid']: checks.CheckResult(checks.CheckFinding[d['verdict']])
        for d in of_round
      },
      False,
    )
    evaluated = {
      d['uid']: scores.Score(**d['evaluation'])
      for d in of_round
      if d['evaluation']
    }
    identities = {d['uid']: ratings.Identity(d['hotkey'], 0) for d in of_round}
    state = deployed_update.update(
      state, state.round + 1, identities, report, evaluated, config
    ).ratings
    paid = any(s.evaluations for s in state.standings.values())
    found.append(deployed_update.weights(state) if paid else {})
  return found


def _mean(weights: Sequence[Weights], uids: int) -> list[float]:
  """Returns the mean weight of each uid."""
  return [
    statistics.mean(w.get(uid, 0.0) for w in weights) for uid in range(uids)
  ]


class Table:
  """The rows of a file, written whenever some are added."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.rows: list[Row] = study.read_csv(path, Row) if path.exists() else []

  def add(self, rows: Sequence[Row]) -> None:
    """Adds the rows of a run, in the place of earlier ones by its rule."""
    if not rows:
      return
    key = _run(rows[0])
    self.rows = [*(r for r in self.rows if _run(r) != key), *rows]
    study.write_csv(self._path, self.rows)


def _run(row: Row) -> tuple[str, int, str]:
  return row.cell, row.seed, row.rule
