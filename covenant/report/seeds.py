"""Runs of one config and several seeds, as one: their mean, and its spread."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from covenant import metrics
from covenant import typing as ct
from covenant.report import curves
from covenant.report import folder

# Sections in which runs of one group may differ, as their machines do.
_PLACES = (
  'checkpoint.', 'devices.', 'network.', 'pool.', 'plan.', 'telemetry.',
  'alerts.',
)  # fmt: skip
# The value of a curve, of an evaluation or of a round.
Value = Callable[[metrics.Record], float]


class Group(NamedTuple):
  """Runs that differ in their seed alone; often one."""

  name: str
  runs: Mapping[str, folder.Run]

  @property
  def losses(self) -> list[float]:
    """The last held-out losses, in nats per byte."""
    return [run.evaluations[-1].nats_per_byte for run in self.runs.values()]

  @property
  def mean(self) -> float:
    return statistics.fmean(self.losses)

  @property
  def deviation(self) -> float:
    """The standard deviation over seeds; 0 for one."""
    return statistics.stdev(self.losses) if len(self.runs) > 1 else 0.0


class Point(NamedTuple):
  """A point of the curve of a group."""

  x: float
  mean: float
  low: float
  high: float


def groups(runs: Mapping[str, folder.Run]) -> list[Group]:
  """Returns the runs by config, in their order; a seed is in a group once."""
  found: dict[tuple[str, int], dict[str, folder.Run]] = {}
  times: dict[tuple[str, ct.Json], int] = {}
  for name, run in runs.items():
    key = _key(name, run)
    again = times[key, run.get('seed')] = (
      times.get((key, run.get('seed')), -1) + 1
    )
    found.setdefault((key, again), {})[name] = run
  return [
    Group(
      next(iter(members))
      if len(members) == 1
      else f'{next(iter(members))} (mean of {len(members)} seeds)',
      members,
    )
    for members in found.values()
  ]


def _key(name: str, run: folder.Run) -> str:
  """Returns what the runs of a group have in common."""
  if not run.config:
    return name
  fields = folder.leaves(run.config)
  kept = {
    path: value
    for path, value in fields
    if path != 'seed' and not path.startswith(_PLACES)
  }
  return json.dumps(kept, sort_keys=True)


def points(
  group: Group,
  records: Callable[[folder.Run], Sequence[metrics.Record]],
  position: Mapping[str, curves.Position],
  value: Value,
) -> list[Point]:
  """Returns the curve of a group, at the rounds that all of its runs have.

  Args:
    group: the runs.
    records: returns the records of a run.
    position: the horizontal position of a record, by the name of its run.
    value: the vertical one.
  """
  by_round: dict[int, list[tuple[float, float]]] = {}
  for name, run in group.runs.items():
    for record in records(run):
      place = position[name](record), value(record)
      by_round.setdefault(record.round, []).append(place)
  made = []
  for _, places in sorted(by_round.items()):
    if len(places) == len(group.runs):
      xs, ys = zip(*places, strict=True)
      mean = statistics.fmean(ys)
      made.append(Point(statistics.fmean(xs), mean, min(ys), max(ys)))
  return made
