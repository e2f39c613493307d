"""Static figures of runs, from the records that `metrics.read` returns.

They use matplotlib's object interface: no window and no global state.
"""

import math
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Literal

from covenant import extras
from covenant import metrics

with extras.needed('run'):
  from matplotlib import axes
  from matplotlib import figure
  from matplotlib import ticker

# The palette of Okabe and Ito, which color-blind readers can tell apart,
# without black (the axes) and yellow (too light on white).
BLUE, ORANGE, GREEN = '#0072B2', '#D55E00', '#009E73'
_COLORS = (BLUE, ORANGE, GREEN, '#CC79A7', '#E69F00', '#56B4E9')
_MARKERS = 'osD^vP'
_GREY = '#8C8C8C'

_SIZE = 6.4, 4.0  # inches
_DPI = 150
_HEADROOM = 1.4  # `compare` shows up to this multiple of the worst last loss

Axis = Literal['tokens', 'bytes']

_LABELS = {
  'tokens': 'tokens trained, all miners',
  'bytes': 'payload bytes sent, all miners',
}

_LONG_NAME = 22  # characters


def write_figures(
  records: Sequence[metrics.Record],
  directory: str | os.PathLike[str],
  adversaries: Mapping[int, str] = types.MappingProxyType({}),
) -> list[pathlib.Path]:
  """Writes the four figures of a run and returns their paths.

  `loss_tokens.png` and `loss_bytes.png` show the training and the held-out
  loss, `miner_losses.png` the training loss of every miner, `weights.png` the
  weight of every miner. Without records, the figures say so.

  Args:
    records: records of one run, in order.
    directory: folder to write to; it is created if missing.
    adversaries: uid -> kind, for the miners to mark as such.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  figures = {
    'loss_tokens.png': _loss(records, 'tokens'),
    'loss_bytes.png': _loss(records, 'bytes'),
    'miner_losses.png': _miner_losses(records),
    'weights.png': _weights(records, adversaries),
  }
  for name, fig in figures.items():
    _save(fig, directory / name)
  return [directory / name for name in figures]


def compare(
  runs: Mapping[str, Sequence[metrics.Record]],
  path: str | os.PathLike[str],
  axis: Axis = 'tokens',
) -> pathlib.Path:
  """Writes one figure with the held-out curves of several runs.

  The loss is in nats per byte of text, so that runs of different tokenizers
  compare. Losses far above the last ones are cut off.

  Args:
    runs: records by the name in the legend, in its order.
    path: the PNG to write; its folder is created if missing.
    axis: 'tokens' trained, or 'bytes' sent on a logarithmic axis.

  Returns:
    `path`.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  fig, ax = _figure(_LABELS[axis], 'held-out loss (nats per byte)')
  for i, (name, records) in enumerate(runs.items()):
    points = [
      (_position(record, axis), record.nats_per_byte)
      for record in metrics.evaluations(records)
    ]
    _curve(
      ax,
      points,
      axis,
      color=_COLORS[i % len(_COLORS)],
      marker=_MARKERS[i % len(_MARKERS)],
      # Dashes tell runs of the same color apart.
      linestyle=('-', '--', ':')[i // len(_COLORS) % 3],
      label=name,
    )
  _finish(ax, axis)
  curves = [
    [record.nats_per_byte for record in metrics.evaluations(records)]
    for records in runs.values()
  ]
  top = _HEADROOM * max((curve[-1] for curve in curves if curve), default=0.0)
  if 0 < top < ax.get_ylim()[1]:
    # With the first rounds, the last losses would be too close to compare.
    ax.set_ylim(0.97 * min(min(curve) for curve in curves if curve), top)
  _save(fig, path)
  return path


def _position(record: metrics.Record, axis: Axis) -> int:
  return record.tokens if axis == 'tokens' else record.bytes_up


def _loss(records: Sequence[metrics.Record], axis: Axis) -> figure.Figure:
  fig, ax = _figure(_LABELS[axis], 'loss (nats per token)')
  rounds, evaluations = metrics.rounds(records), metrics.evaluations(records)
  _curve(
    ax,
    [(_position(r, axis), r.loss) for r in rounds],
    axis,
    color=BLUE,
    linewidth=1.4,
    label='training, mean of miners',
  )
  label = 'held-out'
  if evaluations:
    label += f' (last: {evaluations[-1].loss:.3f})'
  _curve(
    ax,
    [(_position(e, axis), e.loss) for e in evaluations],
    axis,
    color=ORANGE,
    marker='o',
    linestyle='--',
    linewidth=1.0,
    label=label,
  )
  _finish(ax, axis)
  return fig


def _miner_losses(records: Sequence[metrics.Record]) -> figure.Figure:
  fig, ax = _figure('round', 'training loss (nats per token)')
  # Rounds in which nobody trained have no loss.
  rounds = [r for r in metrics.rounds(records) if r.uids]
  x = [r.round for r in rounds]
  losses = [dict(zip(r.uids, r.miner_losses, strict=True)) for r in rounds]
  uids = sorted({uid for of_round in losses for uid in of_round})
  alone = '.' if len(rounds) == 1 else ''
  for i, uid in enumerate(uids):
    # A gap where a miner was absent, not a line across it.
    y = [of_round.get(uid, math.nan) for of_round in losses]
    label = f'each of {len(uids)} miners' if not i else None
    ax.plot(x, y, color=_GREY, marker=alone, lw=0.5, alpha=0.5, label=label)
  if rounds:
    low = [min(of_round.values()) for of_round in losses]
    high = [max(of_round.values()) for of_round in losses]
    mean = [sum(of_round.values()) / len(of_round) for of_round in losses]
    ax.fill_between(
      x, low, high, color=BLUE, alpha=0.15, lw=0, label='lowest to highest'
    )
    ax.plot(x, mean, color=BLUE, marker=alone, lw=1.6, label='mean')
  _finish(ax, None)
  ax.xaxis.set_major_locator(
    ticker.MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
  )
  return fig


def _weights(
  records: Sequence[metrics.Record], adversaries: Mapping[int, str]
) -> figure.Figure:
  fig, ax = _figure('round', 'weight')
  rounds = [r for r in metrics.rounds(records) if r.weights]
  x = [r.round for r in rounds]
  uids = range(max((len(r.weights) for r in rounds), default=0))
  honest = [u for u in uids if u not in adversaries]
  colors = (ORANGE, '#CC79A7', '#E69F00', GREEN)
  for uid in [*honest, *sorted(set(uids) & set(adversaries))]:
    y = [dict(enumerate(r.weights)).get(uid, math.nan) for r in rounds]
    marker = '.' if len(rounds) == 1 else ''
    if uid in adversaries:
      i = sorted(adversaries).index(uid)
      color, label = colors[i % len(colors)], f'{uid}: {adversaries[uid]}'
      dash = ('-', '--', ':', '-.')[i % 4]  # those at zero lie on each other
      ax.plot(x, y, color=color, marker=marker, ls=dash, lw=1.8, label=label)
    else:
      others = 'honest' if adversaries else 'each miner'
      label = f'{others} ({len(honest)})' if uid == honest[0] else None
      ax.plot(x, y, color=_GREY, marker=marker, lw=0.7, label=label)
  _finish(ax, None)
  return fig


def _figure(xlabel: str, ylabel: str) -> tuple[figure.Figure, axes.Axes]:
  fig = figure.Figure(figsize=_SIZE, dpi=_DPI, layout='constrained')
  ax = fig.add_subplot()
  ax.set_xlabel(xlabel, fontsize=11)
  ax.set_ylabel(ylabel, fontsize=11)
  ax.tick_params(labelsize=10)
  ax.grid(color='#DDDDDD', linewidth=0.6)
  ax.set_axisbelow(True)
  ax.spines[['top', 'right']].set_visible(False)
  return fig, ax


def _curve(
  ax: axes.Axes,
  points: Sequence[tuple[float, float]],
  axis: Axis,
  *,
  color: str,
  label: str,
  marker: str = '',
  linestyle: str = '-',
  linewidth: float = 1.4,
) -> None:
  if axis == 'bytes':
    # Points before the first payload have no place on a logarithmic axis.
    points = [(x, y) for x, y in points if x > 0]
  if not points:
    return
  x, y = zip(*points, strict=True)
  ax.plot(
    x,
    y,
    color=color,
    label=label,
    marker=marker or ('o' if len(points) == 1 else ''),
    markersize=4,
    # A few markers are enough to tell the curves apart.
    markevery=max(1, len(points) // 30),
    linestyle=linestyle,
    linewidth=linewidth,
  )


def _finish(ax: axes.Axes, axis: Axis | None) -> None:
  """Adds scales, tick labels and legend after the curves."""
  if not ax.has_data():
    ax.text(0.5, 0.5, 'no records', ha='center', transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])
    return
  if axis == 'bytes':
    ax.set_xscale('log')
    low, high = ax.get_xlim()
    subs = (1, 2, 5) if high < 1000 * low else (1,)
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  if axis is not None:
    unit = 'B' if axis == 'bytes' else ''
    ax.xaxis.set_major_formatter(ticker.EngFormatter(unit))
  # Above the axes, where no curve crosses it. Three columns of long names would
  # be wider than the figure.
  longest = max(map(len, ax.get_legend_handles_labels()[1]), default=0)
  ax.figure.legend(
    loc='outside upper center',
    ncols=2 if longest > _LONG_NAME else 3,
    fontsize=10,
    frameon=False,
  )


def _save(fig: figure.Figure, path: pathlib.Path) -> None:
  # Without the version of matplotlib, equal runs make equal files.
  fig.savefig(path, metadata={'Software': None})
