"""Grids of learning rates: tuned on fewer tokens, extended at their ends.

A method is tuned with seed 0 on a quarter of the tokens, if not said otherwise,
with a quarter of the rounds and of the warm-up. Its grid is the product of its
axes, with as many candidates as any other method's. Then the neighbors of the
best candidate on each axis are tried, one ratio beyond the ends if it lies
there, until all of them are worse than it or `MOST` candidates are done. The
final runs, at the best candidate, have all tokens.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments import study

SHARE = 4  # a tuning run has one in so many of the tokens, by default
MOST = 16  # candidates of one method
INNER, OUTER = 'optim.inner.learning_rate', 'optim.outer.learning_rate'
Point = tuple[float, ...]  # a value for each axis


class Grid(NamedTuple):
  """A method and the values that are tried for some fields of its config.

  Attributes:
    name: the name of the method in tables.
    sets: its overrides.
    axes: for each field ascending values, in about equal ratios.
    program: what runs it; None for emulated nodes.
    share: a tuning run has one in so many of the tokens.
  """

  name: str
  sets: tuple[str, ...]
  axes: Mapping[str, Sequence[float]]
  program: study.Program | None = None
  share: int = SHARE

  def cell(self, point: Point, seed: int = 0) -> study.Cell:
    """Returns the final run at a point of the grid."""
    sets = [f'{f}={x:g}' for f, x in zip(self.axes, point, strict=True)]
    return study.Cell(self.name, seed, (*self.sets, *sets), self.program)

  def trial(self, point: Point) -> study.Cell:
    """Returns the tuning run at a point of the grid."""
    cell = self.cell(point)
    name = f'{self.name}, tuning, ' + ' and '.join(f'{x:g}' for x in point)
    return cell._replace(name=name, sets=(*cell.sets, *fewer(cell, self.share)))


def fewer(cell: study.Cell, share: int = SHARE) -> tuple[str, ...]:
  """Returns overrides that leave one in `share` of a cell's tokens."""
  config = study.make_config(cell)
  rounds = max(config.rounds // share, 1)
  return (
    f'rounds={rounds}',
    f'eval.every={rounds}',
    f'optim.inner.warmup_steps={config.optim.inner.warmup_steps // share}',
  )


def candidates(grid: Grid, runs: Sequence[study.Run]) -> list[Point]:
  """Returns the points to try, given the runs so far."""
  points = list(itertools.product(*grid.axes.values()))
  done = {r.cell: r.nats_per_byte for r in runs if r.seed == 0}
  while all(grid.trial(p).name in done for p in points):
    found = min(points, key=lambda p: done[grid.trial(p).name])
    more = [p for p in neighbors(found, points) if p not in points]
    if not more or len(points) + len(more) > MOST:
      break
    points += more
  return points


def neighbors(point: Point, points: Sequence[Point]) -> Iterator[Point]:
  """Yields the points next to one on each axis, or beyond the ends.

  >>> list(neighbors((2.0, 1.0), [(1.0, 1.0), (2.0, 1.0)]))
  [(1.0, 1.0), (4.0, 1.0)]
  """
  for axis, value in enumerate(point):
    values = sorted({p[axis] for p in points})
    if len(values) < 2:
      continue
    at = values.index(value)
    ratio = values[1] / values[0] if at == 0 else values[at] / values[at - 1]
    below = values[at - 1] if at else value / ratio
    above = values[at + 1] if at + 1 < len(values) else value * ratio
    for other in (below, above):
      yield (*point[:axis], float(f'{other:.2g}'), *point[axis + 1 :])


def best(grid: Grid, runs: Sequence[study.Run]) -> Point | None:
  """Returns the best point of a finished grid; None before."""
  points = candidates(grid, runs)
  done = {r.cell: r.nats_per_byte for r in runs if r.seed == 0}
  if not all(grid.trial(p).name in done for p in points):
    return None
  return min(points, key=lambda p: done[grid.trial(p).name])


def at_an_end(grid: Grid, runs: Sequence[study.Run]) -> bool:
  """Returns whether a neighbor of the best point was not tried."""
  points, found = candidates(grid, runs), best(grid, runs)
  return found is None or any(p not in points for p in neighbors(found, points))


def plan(
  grid: Grid, runs: Sequence[study.Run], seeds: int
) -> Iterator[study.Cell]:
  """Yields the tuning runs of a grid, and then the final ones."""
  for point in candidates(grid, runs):
    yield grid.trial(point)
  found = best(grid, runs)
  for seed in range(seeds if found is not None else 0):
    assert found is not None
    yield grid.cell(found, seed)
