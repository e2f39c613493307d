"""The figures of studies: means and standard deviations over seeds."""

import pathlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib import axes
from matplotlib import axis as axis_lib
from matplotlib import figure
from matplotlib import ticker

from experiments import study

# Okabe and Ito's palette, which color-blind readers can tell apart; marks and
# dashes tell the lines apart in gray.
COLORS = (
  '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'
)  # fmt: skip
MARKERS = 'osD^vPX*'
DASHES = ('-', '--', ':', '-.')
GRAY = '#606060'
_HEADROOM = 1.25  # curves are shown up to this times the worst final loss
_CROWD = 4  # more lines have no bands: their ends have bars


def style(index: int) -> dict[str, Any]:
  """Returns the look of the line with a number, which no other line has."""
  return {
    'color': COLORS[index % len(COLORS)],
    'marker': MARKERS[index % len(MARKERS)],
    'linestyle': DASHES[index % len(DASHES)],
    'lw': 1.4,
    'ms': 4,
  }


def curves(
  runs: Sequence[study.Run],
  cells: Sequence[str],
  path: pathlib.Path,
  results: pathlib.Path | None = None,
  names: Mapping[str, str] | None = None,
  factors: Mapping[str, float] | None = None,
) -> None:
  """Draws held-out losses against tokens and bytes, and their ends.

  Args:
    runs: the runs of a study.
    cells: the cells to show, in their order; those that are not finished are
      left out.
    path: the PNG to write.
    results: the folder that has curves/; the folder of `path` if omitted.
    names: what cells are called in the figure, where not by their name.
    factors: the bytes of cells in units of those in their curves, where not 1.
  """
  folder, names = results or path.parent, names or {}
  shown = [c for c in cells if any(run.cell == c for run in runs)]
  fig = figure.Figure(figsize=(11, 4), dpi=150, layout='constrained')
  grid = fig.add_gridspec(1, 3, width_ratios=(4, 4, 3))
  left = fig.add_subplot(grid[0])
  middle = fig.add_subplot(grid[1], sharey=left)
  right = fig.add_subplot(grid[2])
  finals, lowest, seeds = [], [], set[int]()
  for i, cell in enumerate(shown):
    found = [study.curve(run, folder) for run in runs if run.cell == cell]
    factor = (factors or {}).get(cell, 1.0)
    n = min(map(len, found))
    losses = [[points[j].nats_per_byte for points in found] for j in range(n)]
    mean = [statistics.mean(of) for of in losses]
    spread = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in losses]
    finals.append(mean[-1])
    seeds.add(len(found))
    banded = len(shown) <= _CROWD
    lowest.append(mean[-1] - (spread[-1] if banded else 0))
    for ax, x in (
      (left, [found[0][j].tokens for j in range(n)]),
      (middle, [factor * found[0][j].bytes_up for j in range(n)]),
    ):
      first = 1 if ax is middle else 0  # nothing is sent yet: not on a log axis
      ax.plot(x[first:], mean[first:], **style(i), markevery=(i % 3, 3))
      if banded:
        low, high = zip(
          *[(m - s, m + s) for m, s in zip(mean, spread, strict=True)][first:],
          strict=True,
        )
        color = style(i)['color']
        ax.fill_between(x[first:], low, high, color=color, alpha=0.2, lw=0)
    looks = style(i) | {'linestyle': 'none', 'ms': 6}
    right.errorbar([mean[-1]], [i], xerr=[spread[-1]], capsize=3, **looks)
    right.annotate(
      names.get(cell, cell), (mean[-1], i), (0, 5), color=style(i)['color'],
      textcoords='offset points', ha='center', va='bottom', fontsize=8,
    )  # fmt: skip
  left.set(
    xlabel='tokens trained, all peers', ylabel='held-out loss (nats per byte)'
  )
  middle.set(xlabel='bytes that a peer sends', xscale='log')
  engineering(left.xaxis)
  engineering(middle.xaxis, 'B')
  many = _seeds(seeds)
  right.set_xlabel(f'at the end; bars: deviation of\n{many}', fontsize=9)
  right.set_yticks([])
  right.set_ylim(len(shown) - 0.4, -0.8)
  right.margins(x=0.5)
  if finals:
    left.set_ylim(0.98 * min(lowest), _HEADROOM * max(finals))
  if finals and len(shown) <= _CROWD:
    left.set_title(
      f'bands: standard deviation of {many}', fontsize=8, loc='left'
    )
  save(fig, left, middle, right, path=path)


def engineering(axis: axis_lib.Axis, unit: str = '') -> None:
  """Sets ticks that do not touch each other, as 20 k or 2 MB."""
  axis.set_major_formatter(ticker.EngFormatter(unit))
  if axis.get_scale() == 'log':
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_minor_formatter(ticker.NullFormatter())
  else:
    axis.set_major_locator(ticker.MaxNLocator(5))


def ends(
  runs: Sequence[study.Run],
  lines: Mapping[str, Mapping[float, str]],
  path: pathlib.Path,
  xlabel: str,
  log: bool = True,
  level: tuple[str, str] | None = None,
) -> None:
  """Draws final held-out losses against a parameter.

  Args:
    runs: the runs of a study.
    lines: for each label the cells by value of the parameter.
    path: the PNG to write.
    xlabel: the name of the parameter.
    log: True for a logarithmic axis.
    level: label and cell of a reference, drawn as a horizontal line.
  """
  fig = figure.Figure(figsize=(6.4, 4.2), dpi=150, layout='constrained')
  ax = fig.subplots()
  values = sorted({x for cells in lines.values() for x in cells})
  counts = set[int]()
  for i, (label, cells) in enumerate(lines.items()):
    found = {
      x: list(study.losses(runs, cell).values()) for x, cell in cells.items()
    }
    found = {x: losses for x, losses in found.items() if losses}
    counts |= {len(losses) for losses in found.values()}
    aside = (i - (len(lines) - 1) / 2) * 0.012  # so that bars do not overlap
    places = [
      x * (values[-1] / values[0]) ** aside
      if log
      else x + aside * (values[-1] - values[0])
      for x in found
    ]
    means = [statistics.mean(losses) for losses in found.values()]
    ax.plot(places, means, label=label, **style(i))
    several = [
      (x, mean, statistics.stdev(losses))
      for x, mean, losses in zip(places, means, found.values(), strict=True)
      if len(losses) > 1
    ]
    if several:
      ax.errorbar(
        *zip(*several, strict=True), color=style(i)['color'], fmt='none',
        capsize=3, lw=1,
      )  # fmt: skip
  if level:
    losses = list(study.losses(runs, level[1]).values())
    if losses:
      ax.axhline(statistics.mean(losses), color='#8C8C8C', lw=1, ls='--')
      ax.annotate(
        level[0],
        (0.99, statistics.mean(losses)),
        (0, 3),
        xycoords=('axes fraction', 'data'),
        textcoords='offset points',
        ha='right',
        va='bottom',
        color=GRAY,
        fontsize=8,
      )
  ax.set(xlabel=xlabel, ylabel='final held-out loss (nats per byte)')
  if log:
    ax.set_xscale('log')
    ax.set_xticks(values, [f'{x:.3g}' for x in values])
    ax.minorticks_off()
  note = f'bars: standard deviation of {_seeds(counts)}'
  if 1 in counts and len(counts) > 1:
    note += '; points without: one seed'
  ax.set_title(note, fontsize=8, loc='left', color=GRAY)
  ax.legend(frameon=False, fontsize=8, handlelength=3.5)
  save(fig, ax, path=path)


def differences(
  runs: Sequence[study.Run],
  rows: Mapping[str, tuple[str, str]],
  path: pathlib.Path,
  xlabel: str,
) -> None:
  """Draws differences of final losses, with standard deviations over seeds.

  Args:
    runs: the runs of a study.
    rows: for each label the two cells whose losses are compared.
    path: the PNG to write.
    xlabel: the meaning of a difference.
  """
  fig = figure.Figure(
    figsize=(7.2, 0.8 + 0.36 * len(rows)), dpi=150, layout='constrained'
  )
  ax = fig.subplots()
  for i, (cell, other) in enumerate(rows.values()):
    found = study.gap(runs, cell, other)
    ax.errorbar(
      found.mean, i, xerr=found.deviation if found.n > 1 else 0.0, fmt='o',
      color=COLORS[found.mean > 0], capsize=3, ms=5,
    )  # fmt: skip
  counts = {study.gap(runs, *cells).n for cells in rows.values()}
  note = f'bars: standard deviation of {_seeds(counts)}'
  ax.set_title(note, fontsize=8, loc='left', color=GRAY)
  ax.axvline(0, color='#8C8C8C', lw=1)
  ax.set_yticks(range(len(rows)), list(rows))
  ax.set_ylim(len(rows) - 0.5, -0.5)
  ax.set(xlabel=xlabel)
  save(fig, ax, path=path)


def _seeds(counts: Collection[int]) -> str:
  """Returns the numbers of seeds that bars are of, those of several."""
  several = {count for count in counts if count > 1} or {0}
  least, most = min(several), max(several)
  return f'{most} seeds' if least == most else f'{least} to {most} seeds'


def save(fig: figure.Figure, *panels: axes.Axes, path: pathlib.Path) -> None:
  """Writes a figure as a PNG, its panels with a grid and two sides."""
  for ax in panels:
    ax.grid(color='#E0E0E0', lw=0.6)
    ax.spines[['top', 'right']].set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path, metadata={'Software': None})
