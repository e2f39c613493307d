"""The gap of SparseLoCo to synchronous AdamW over five sizes, with a fit.

  python -m experiments.size             about 35 core minutes
  python -m experiments.size --quick     2 minutes

Two layers of width 32 to 128 are 33 to 427 thousand parameters. A run has 10
tokens a parameter, in steps of 24 sequences: all of one miner for AdamW, which
is equivalent to synchronous ones (experiments/methods.py), and 3 of each of
eight for SparseLoCo. It sends 64 of 4096 values of one bit after 15 steps, with
an error decay of 0.8 and an outer rate of 1, the best of three in
experiments/compression.py. The rate warms up over a twentieth of the steps. The
largest runs read the text four times.

Inner rates of both methods are tuned at widths 32 and 64, with seed 0 and all
tokens, on grids of three candidates that extend themselves until the best lies
inside (experiments/grids.py). Other widths have the rate of width 64, times 64
over the width, and are not tuned.

Two million parameters would take more than an hour a run on the two cores that
we have, and are not run.

Criterion, written before the runs; n = 2 seeds, and up to 7 of the three
smaller sizes while it is undecided. A gap is the share by which SparseLoCo's
final held-out loss is above AdamW's with the same seed. A line is fitted to all
gaps by least squares, against the logarithm of the number of parameters:
  Size, slope  The gap does not grow: the 90 % interval of the slope, by
      Student's t, ends at or below 0. It fails if the interval begins above.
"""

import functools
import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import figure
from scipy import stats

from experiments import charts
from experiments import equivalence
from experiments import grids
from experiments import methods
from experiments import recipe
from experiments import runner
from experiments import study

SPARSELOCO, ADAMW = 'SparseLoCo', 'AdamW'
SETS = {
  SPARSELOCO: ('optim.compression.error_decay=0.8',),
  ADAMW: methods.ALONE,
}
WIDTHS = (32, 48, 64, 96, 128)
MIDDLE = 64
# Width -> inner rates that are tried first.
TUNED = {32: (6e-3, 1.2e-2, 2.4e-2), MIDDLE: (3e-3, 6e-3, 1.2e-2)}
TOKENS = 10  # per parameter
ROUND = 24 * 64 * 15  # tokens of all miners
SEEDS = 2  # before any is added


def name(method: str, width: int) -> str:
  return f'{method}, width {width}'


def _model(width: int) -> tuple[str, ...]:
  return f'model.width={width}', f'model.ffn_width={3 * width}'


@functools.cache
def parameters(width: int) -> int:
  config = study.make_config(study.Cell('', 0, _model(width)))
  return recipe.parameters(config)


def grid(method: str, width: int) -> grids.Grid:
  """Returns the candidates of a method at a width, and what they have alike."""
  rounds = round(TOKENS * parameters(width) / ROUND)
  sets = (
    *SETS[method],
    *_model(width),
    f'rounds={rounds}',
    f'eval.every={rounds}',
    f'optim.inner.warmup_steps={rounds * 15 // 20}',
  )
  axes = {grids.INNER: TUNED.get(width, ())}
  return grids.Grid(name(method, width), sets, axes, share=1)


def plan(runs: Sequence[study.Run], seeds: int) -> Iterator[study.Cell]:
  seeds = min(seeds, SEEDS)
  for method in SETS:
    for width in TUNED:
      yield from grids.plan(grid(method, width), runs, seeds)
    found = grids.best(grid(method, MIDDLE), runs)
    for width in WIDTHS if found else ():
      if width in TUNED:
        continue
      assert found
      rate = found[0] * MIDDLE / width
      for seed in range(seeds):
        yield grid(method, width).cell((rate,), seed)


def gaps(runs: Sequence[study.Run], width: int) -> list[float]:
  """Returns the gap of each seed, as a share of AdamW's loss."""
  sparse = study.losses(runs, name(SPARSELOCO, width))
  adamw = study.losses(runs, name(ADAMW, width))
  return [sparse[s] / adamw[s] - 1 for s in sorted(sparse.keys() & adamw)]


class Line(NamedTuple):
  """Least squares through gaps, against log2 of the number of parameters."""

  intercept: float
  slope: float  # per doubling of the parameters
  error: float  # standard error of the slope
  residual: float  # standard deviation of the gaps around the line
  center: float  # mean of log2
  n: int

  @property
  def quantile(self) -> float:
    """Student's quantile of an interval of `equivalence.LEVEL`."""
    return float(stats.t.ppf((1 + equivalence.LEVEL) / 2, self.n - 2))

  @property
  def interval(self) -> equivalence.Interval:
    """The interval of the slope."""
    reach = self.quantile * self.error
    return equivalence.Interval(self.slope - reach, self.slope + reach)

  def at(self, count: float) -> tuple[float, float]:
    """Returns the gap at a number of parameters, and how far its interval is.

    The interval is that of the line, not of a single run.
    """
    x = math.log2(count)
    spread = self.error * (x - self.center)
    error = math.hypot(self.residual / math.sqrt(self.n), spread)
    return self.intercept + self.slope * x, self.quantile * error


def fit(points: Sequence[tuple[float, float]]) -> Line:
  """Fits a line to three or more points (parameters, gap)."""
  x = np.log2([count for count, _ in points])
  y = np.array([gap for _, gap in points])
  n, center = len(x), float(x.mean())
  squares = float(((x - center) ** 2).sum())
  slope = float(((x - center) * (y - y.mean())).sum()) / squares
  intercept = float(y.mean()) - slope * center
  residual = math.sqrt(
    float(((y - intercept - slope * x) ** 2).sum()) / (n - 2)
  )
  error = residual / math.sqrt(squares)
  return Line(intercept, slope, error, residual, center, n)


def _points(runs: Sequence[study.Run]) -> list[tuple[float, float]]:
  return [(parameters(w), gap) for w in WIDTHS for gap in gaps(runs, w)]


def judge(
  runs: Sequence[study.Run], results: pathlib.Path
) -> Iterator[study.Verdict]:
  del results
  line = fit(_points(runs))
  low, high = line.interval
  least, most = (
    statistics.mean(gaps(runs, width)) for width in (WIDTHS[0], WIDTHS[-1])
  )
  yield study.Verdict(
    'Size, slope',
    'the gap to AdamW does not grow with the model, over five sizes',
    'DiLoCo’s scaling laws',
    '90 % interval of the slope ends at or below 0',
    f'{100 * line.slope:+.2f} points per doubling, 90 % [{100 * low:+.2f}, '
    f'{100 * high:+.2f}], of {line.n} gaps; {least:+.2%} at '
    f'{parameters(WIDTHS[0]):,} parameters, {most:+.2%} at '
    f'{parameters(WIDTHS[-1]):,}',
    'PASS' if high <= 0 else 'FAIL' if low > 0 else 'UNDECIDED',
    tuple(name(m, width) for width in WIDTHS[:3] for m in SETS),
  )


def table(runs: Sequence[study.Run]) -> str:
  """Returns Markdown: a row per size, with the mean losses and their gap."""
  lines = [
    '| parameters | tokens | seeds | AdamW | SparseLoCo | gap |',
    '| ---: | ---: | ---: | ---: | ---: | ---: |',
  ]
  for width in WIDTHS:
    found = study.spread(gaps(runs, width))
    adamw, sparse = (
      statistics.mean(study.losses(runs, name(method, width)).values())
      for method in (ADAMW, SPARSELOCO)
    )
    tokens = next(r.tokens for r in runs if r.cell == name(ADAMW, width))
    lines.append(
      f'| {parameters(width):,} | {tokens:,} | {found.n} | {adamw:.4f} | '
      f'{sparse:.4f} | {found.mean:+.2%} ± {found.deviation:.2%} |'
    )
  return '\n'.join(lines)


def draw(runs: Sequence[study.Run], path: pathlib.Path) -> None:
  """Draws the gaps in percent, and the line with its interval."""
  points = _points(runs)
  line = fit(points)
  counts = np.geomspace(parameters(WIDTHS[0]), parameters(WIDTHS[-1]), 50)
  middle, reach = 100 * np.array([line.at(count) for count in counts]).T
  fig = figure.Figure(figsize=(6.4, 4.2), dpi=150, layout='constrained')
  ax = fig.subplots()
  ax.plot(counts, middle, color=charts.COLORS[0], label='least squares')
  ax.fill_between(
    counts, middle - reach, middle + reach, color=charts.COLORS[0], alpha=0.2,
    lw=0, label='90 % interval of the line',
  )  # fmt: skip
  ax.plot(
    [count for count, _ in points], [100 * gap for _, gap in points], 'o',
    color=charts.COLORS[1], ms=5, mfc='none', label='a seed',
  )  # fmt: skip
  ax.axhline(0, color='#8C8C8C', lw=1)
  ax.set(xlabel='parameters', ylabel='loss of SparseLoCo over AdamW (%)')
  ax.set_xscale('log')
  ticks = [parameters(width) for width in WIDTHS]
  ax.set_xticks(ticks, [f'{count / 1000:.0f} k' for count in ticks])
  ax.minorticks_off()
  ax.legend(frameon=False, fontsize=8)
  charts.save(fig, ax, path=path)


STUDY = study.Study(
  'size',
  plan,
  judge,
  draw,
  table,
)


if __name__ == '__main__':
  runner.main(STUDY, __doc__)
