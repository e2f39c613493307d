"""The figures of studies: means and standard deviations over seeds."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib import axes
from matplotlib import figure

from experiments import study

# Okabe and Ito's palette, which color-blind readers can tell apart.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MARKERS = 'osD^vP'
_HEADROOM = 1.25  # curves are shown up to this times the worst final loss


def curves(
  runs: Sequence[study.Run],
  cells: Sequence[str],
  path: pathlib.Path,
  results: pathlib.Path | None = None,
) -> None:
  """Draws held-out losses against tokens, and against a peer's bytes sent.

  Args:
    runs: the runs of a study.
    cells: the cells to show, in the order of the legend; those that are not
      finished are left out.
    path: the PNG to write.
    results: the folder that has curves/; the folder of `path` if omitted.
  """
  fig = figure.Figure(figsize=(10, 4), dpi=150, layout='constrained')
  left, right = fig.subplots(1, 2, sharey=True)
  finals = []
  for i, cell in enumerate(cells):
    found = [
      study.curve(run, results or path.parent)
      for run in runs
      if run.cell == cell
    ]
    if not found:
      continue
    n = min(map(len, found))
    losses = [[points[j].nats_per_byte for points in found] for j in range(n)]
    mean = [statistics.mean(of) for of in losses]
    spread = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in losses]
    finals.append(mean[-1])
    for ax, x in (
      (left, [found[0][j].tokens for j in range(n)]),
      (right, [found[0][j].bytes_up for j in range(n)]),
    ):
      color = COLORS[i % len(COLORS)]
      first = 1 if ax is right else 0  # nothing is sent yet: not on a log axis
      ax.plot(
        x[first:], mean[first:], color=color, lw=1.4, label=cell,
        marker=MARKERS[i % len(MARKERS)], ms=4,
        linestyle=('-', '--')[i // len(COLORS) % 2],
      )  # fmt: skip
      bounds = [(m - s, m + s) for m, s in zip(mean, spread, strict=True)]
      low, high = zip(*bounds[first:], strict=True)
      ax.fill_between(x[first:], low, high, color=color, alpha=0.2, lw=0)
  left.set(
    xlabel='tokens trained, all peers', ylabel='held-out loss (nats per byte)'
  )
  right.set(xlabel='bytes that a peer sends', xscale='log')
  if finals:
    left.set_ylim(0.98 * min(finals), _HEADROOM * max(finals))
  fig.legend(
    *left.get_legend_handles_labels(), loc='outside lower center',
    ncols=min(max(len(finals), 1), 4), frameon=False, fontsize=8,
  )  # fmt: skip
  _save(fig, left, right, path=path)


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
  fig = figure.Figure(figsize=(6.4, 4), dpi=150, layout='constrained')
  ax = fig.subplots()
  for i, (label, cells) in enumerate(lines.items()):
    found = {
      x: list(study.losses(runs, cell).values()) for x, cell in cells.items()
    }
    found = {x: losses for x, losses in found.items() if losses}
    ax.errorbar(
      list(found),
      [statistics.mean(losses) for losses in found.values()],
      [
        statistics.stdev(losses) if len(losses) > 1 else 0.0
        for losses in found.values()
      ],
      color=COLORS[i % len(COLORS)],
      marker=MARKERS[i % len(MARKERS)],
      capsize=3,
      lw=1.4,
      ms=5,
      label=label,
    )
  if level:
    losses = list(study.losses(runs, level[1]).values())
    if losses:
      ax.axhline(statistics.mean(losses), color='#8C8C8C', lw=1, ls='--')
      ax.annotate(
        level[0],
        (0.99, statistics.mean(losses)),
        xycoords=('axes fraction', 'data'),
        ha='right',
        va='bottom',
        color='#606060',
        fontsize=8,
      )
  ax.set(xlabel=xlabel, ylabel='final held-out loss (nats per byte)')
  if log:
    ax.set_xscale('log')
    ticks = sorted({x for cells in lines.values() for x in cells})
    ax.set_xticks(ticks, [f'{x:.3g}' for x in ticks])
    ax.minorticks_off()
  ax.legend(frameon=False, fontsize=8)
  _save(fig, ax, path=path)


def _save(fig: figure.Figure, *panels: axes.Axes, path: pathlib.Path) -> None:
  for ax in panels:
    ax.grid(color='#E0E0E0', lw=0.6)
    ax.spines[['top', 'right']].set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path, metadata={'Software': None})
