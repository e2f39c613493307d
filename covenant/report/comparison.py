"""`compare.html`: several runs in the same charts and one table."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant.report import curves
from covenant.report import folder
from covenant.report import markup
from covenant.report import page
from covenant.report import plots
from covenant.report import progress

tag = markup.tag
_HEAD = (
  'run', 'held-out, nats per byte', 'round', 'tokens', 'bytes sent', 'payload',
  'measured time',
)  # fmt: skip
_POINTS = 200  # points of a curve, at most
_HEADROOM = 1.4  # losses are shown up to this multiple of the worst last one


class Comparison(NamedTuple):
  """The files of a comparison and its table."""

  page: pathlib.Path
  figures: list[pathlib.Path]
  table: str  # in plain text


def write(
  workdirs: Sequence[str | os.PathLike[str]], workdir: str | os.PathLike[str]
) -> Comparison:
  """Writes compare.html, compare_tokens.png and compare_bytes.png.

  Args:
    workdirs: folders of two or more emulated runs.
    workdir: folder to write to; it is created if missing.

  Raises:
    ConfigError: fewer than two folders, one given twice, or one without an
      evaluated run.
    MetricsError: a metrics.jsonl is malformed.
  """
  runs = _read(workdirs)
  rows = [_row(name, run) for name, run in runs.items()]
  table = markup.table(_HEAD, rows, 'The runs')
  sections = [
    ('Table', [tag('div', table, class_='wide')]),
    ('Loss', _figures(runs)),
    ('Config', _differences(runs)),
  ]
  lead = (
    'The last evaluation of each run. Losses per byte compare runs of '
    'different tokenizers.'
  )
  target = pathlib.Path(workdir)
  text = page.render(f'{len(runs)} runs', lead, sections)
  evaluations = {name: run.evaluations for name, run in runs.items()}
  made = page.save(target / 'compare.html', text)
  figures = [
    plots.compare(evaluations, target / 'compare_tokens.png', 'tokens'),
    plots.compare(evaluations, target / 'compare_bytes.png', 'bytes'),
  ]
  lines = progress.aligned([_HEAD, *rows], str.rjust)
  return Comparison(made, figures, '\n'.join(lines))


def _read(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, folder.Run]:
  """Returns runs by folder name, or by path if two folders share a name."""
  paths = [pathlib.Path(w) for w in workdirs]
  if len(paths) < 2:
    raise config_lib.ConfigError(
      '--workdirs: expected the folders of two runs or more, separated by '
      f'commas; got {len(paths)}'
    )
  found = [folder.read(path) for path in paths]
  for run in found:
    if not run.evaluations:
      raise config_lib.ConfigError(
        f'--workdirs: expected runs with an evaluation; {run.folder} has none'
      )
  names = [path.resolve().name for path in paths]
  if len(set(names)) < len(names):
    names = [str(path) for path in paths]
  if len(set(names)) < len(names):
    raise config_lib.ConfigError('--workdirs: a folder is named twice')
  return dict(zip(names, found, strict=True))


def _row(name: str, run: folder.Run) -> tuple[str, ...]:
  last = run.evaluations[-1]
  size = run.payload_bytes
  seconds = sum(r.seconds for r in [*run.rounds, *run.evaluations])
  return (
    name,
    f'{last.nats_per_byte:.4f}',
    f'{last.round:,}',
    progress.human_count(last.tokens),
    progress.human_bytes(last.bytes_up),
    '' if size is None else progress.human_bytes(size),
    progress.human_seconds(seconds),
  )


def _figures(runs: Mapping[str, folder.Run]) -> list[markup.Html]:
  """Returns charts of held-out loss on all axes, and of training loss."""
  figures = [
    _heldout('tokens', curves.TOKENS, runs, dict.fromkeys(runs, curves.tokens)),
    _heldout('bytes', curves.BYTES, runs, dict.fromkeys(runs, curves.bytes_up)),
  ]
  for kind, clock in (
    ('simulated', curves.simulated_seconds),
    ('links-simulated', curves.linked_seconds),
    ('measured', curves.measured_seconds),
  ):
    seconds = {n: at for n, r in runs.items() if (at := clock(r)) is not None}
    if len(seconds) == len(runs):
      most = max(seconds[n](r.evaluations[-1]) for n, r in runs.items())
      axis, unit = curves.time_axis(kind, most)
      figures.append(_heldout(f'{kind} time', axis, runs, seconds, unit))
  training = {
    name: [(r.tokens, r.loss) for r in markup.thin(run.rounds, _POINTS)]
    for name, run in runs.items()
  }
  note = 'Losses per token compare runs of one tokenizer only.'
  y = markup.Axis('mean of miners, nats per token')
  title = 'Training loss against tokens'
  return [*figures, _draw(title, note, curves.TOKENS, y, training)]


def _heldout(
  against: str,
  axis: markup.Axis,
  runs: Mapping[str, folder.Run],
  position: Mapping[str, curves.Position],
  unit: float = 1.0,
) -> markup.Html:
  points = {
    name: [
      (position[name](e) / unit, e.nats_per_byte)
      for e in markup.thin(run.evaluations, _POINTS)
    ]
    for name, run in runs.items()
  }
  y = markup.Axis('nats per byte')
  return _draw(f'Held-out loss against {against}', '', axis, y, points)


def _draw(
  title: str,
  note: str,
  x: markup.Axis,
  y: markup.Axis,
  points: Mapping[str, Sequence[tuple[float, float]]],
) -> markup.Html:
  if any(len(of_run) == _POINTS for of_run in points.values()):
    note += f' At most {_POINTS} points per run are drawn, evenly spaced.'
  last = [of_run[-1][1] for of_run in points.values() if of_run]
  series = [
    markup.Series(name, of_run, i)
    for i, (name, of_run) in enumerate(points.items())
  ]
  top = _HEADROOM * max(last, default=0.0)
  key = title.lower().replace(' ', '-')
  return markup.chart(key, title, note, x, y, series, top)


def _differences(runs: Mapping[str, folder.Run]) -> list[markup.Html]:
  """Returns a table of the fields in which the configs differ."""
  fields = [dict(page.leaves(run.config)) for run in runs.values()]
  paths = dict.fromkeys(path for of_run in fields for path in of_run)
  rows = []
  for path in paths:
    values = [
      page.show_value(of_run[path]) if path in of_run else 'missing'
      for of_run in fields
    ]
    if len(set(values)) > 1:
      rows.append((path, *values))
  if not rows:
    return [tag('p', 'All runs have the same config.')]
  title = 'Fields that differ'
  table = markup.table(('field', *runs), rows, title)
  return [tag('div', tag('h3', title), table, class_='wide')]
