"""`compare.html`: several runs in the same figures and one table."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from covenant import config as config_lib
from covenant.report import chart
from covenant.report import curves
from covenant.report import folder
from covenant.report import markup
from covenant.report import page
from covenant.report import plots
from covenant.report import progress
from covenant.report import scale
from covenant.report import settings

tag = markup.tag
_HEAD = (
  'run', 'held-out, nats a byte', 'round', 'tokens', 'bytes sent', 'a payload',
  'measured time',
)  # fmt: skip
_POINTS = 200  # of a curve, at most
_HEADROOM = 1.4  # losses are shown up to this times the worst last one


class Comparison(NamedTuple):
  """What was made."""

  page: pathlib.Path
  figures: list[pathlib.Path]
  table: str  # plain text


def write(
  workdirs: Sequence[str | os.PathLike[str]], workdir: str | os.PathLike[str]
) -> Comparison:
  """Writes compare.html, compare_tokens.png and compare_bytes.png.

  Args:
    workdirs: folders of emulated runs, two or more.
    workdir: where to write; made when missing.

  Raises:
    ConfigError: fewer than two, one twice, or a folder without such a run.
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
  lead = 'The last evaluation of each run; losses a byte of text compare runs '
  lead += 'of different tokenizers.'
  target = pathlib.Path(workdir)
  text = page.render(f'{len(runs)} runs', lead, sections)
  evaluations = {name: run.evaluations for name, run in runs.items()}
  made = page.save(target / 'compare.html', text)
  figures = [
    plots.compare(evaluations, target / 'compare_tokens.png', 'tokens'),
    plots.compare(evaluations, target / 'compare_bytes.png', 'bytes'),
  ]
  return Comparison(made, figures, _text([_HEAD, *rows]))


def _read(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, folder.Run]:
  """Runs by name: that of the folder, or the path where two have one name."""
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


def _text(rows: Sequence[tuple[str, ...]]) -> str:
  """Rows in aligned columns; numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(
      [
        row[0].ljust(widths[0]),
        *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
      ]
    )
    for row in rows
  )


def _figures(runs: Mapping[str, folder.Run]) -> list[markup.Html]:
  """Held-out loss on four axes, and the training loss."""
  tokens = {name: curves.tokens for name in runs}
  simulated = {name: curves.simulated_seconds(r) for name, r in runs.items()}
  measured = {name: curves.measured_seconds(r) for name, r in runs.items()}
  linked = {
    name: position
    for name, r in runs.items()
    if (position := curves.linked_seconds(r)) is not None
  }
  by_links = []
  if len(linked) == len(runs):
    axis = _time('links-simulated', runs, linked)
    by_links = [_heldout('links-simulated time', *axis)]
  return [
    _heldout('tokens', curves.TOKENS, runs, tokens),
    _heldout('bytes', curves.BYTES, runs, {n: curves.bytes_up for n in runs}),
    _heldout('simulated time', *_time('simulated', runs, simulated)),
    *by_links,
    _heldout('measured time', *_time('measured', runs, measured)),
    _draw(
      'Training loss against tokens',
      'Losses a token compare runs of one tokenizer only.',
      curves.TOKENS,
      chart.Axis('mean of miners, nats a token'),
      {
        name: [(r.tokens, r.loss) for r in scale.thin(run.rounds, _POINTS)]
        for name, run in runs.items()
      },
    ),
  ]


def _time(
  word: str,
  runs: Mapping[str, folder.Run],
  seconds: Mapping[str, curves.Position],
) -> tuple[chart.Axis, Mapping[str, folder.Run], Mapping[str, curves.Position]]:
  """An axis of time that all runs share, and where they are on it."""
  most = max(seconds[n](run.evaluations[-1]) for n, run in runs.items())
  axis, unit = curves.time_axis(word, most)

  def scaled(position: curves.Position) -> curves.Position:
    return lambda record: position(record) / unit

  return axis, runs, {name: scaled(p) for name, p in seconds.items()}


def _heldout(
  against: str,
  axis: chart.Axis,
  runs: Mapping[str, folder.Run],
  position: Mapping[str, curves.Position],
) -> markup.Html:
  return _draw(
    f'Held-out loss against {against}',
    '',
    axis,
    chart.Axis('nats a byte'),
    {
      name: [
        (position[name](e), e.nats_per_byte)
        for e in scale.thin(run.evaluations, _POINTS)
      ]
      for name, run in runs.items()
    },
  )


def _draw(
  title: str,
  note: str,
  x: chart.Axis,
  y: chart.Axis,
  points: Mapping[str, Sequence[tuple[float, float]]],
) -> markup.Html:
  if any(len(of_run) == _POINTS for of_run in points.values()):
    note += f' Of each run {_POINTS} points at most are drawn, evenly spaced.'
  last = [of_run[-1][1] for of_run in points.values() if of_run]
  series = [
    chart.Series(name, of_run, i)
    for i, (name, of_run) in enumerate(points.items())
  ]
  top = _HEADROOM * max(last, default=0.0)
  key = title.lower().replace(' ', '-')
  return chart.draw(key, title, note.strip(), x, y, series, top)


def _differences(runs: Mapping[str, folder.Run]) -> list[markup.Html]:
  """The fields in which the configs differ."""
  fields = [dict(settings.leaves(run.config)) for run in runs.values()]
  paths = dict.fromkeys(path for of_run in fields for path in of_run)
  rows = []
  for path in paths:
    values = [
      settings.show(of_run[path]) if path in of_run else 'not there'
      for of_run in fields
    ]
    if len(set(values)) > 1:
      rows.append((path, *values))
  if not rows:
    return [tag('p', 'All of them have one config.')]
  title = 'Fields that differ'
  table = markup.table(('field', *runs), rows, title)
  return [tag('div', tag('h3', title), table, class_='wide')]
