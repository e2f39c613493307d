"""`compare.html`: several runs in the same charts and tables."""

import difflib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant import metrics
from covenant.report import curves
from covenant.report import folder
from covenant.report import markup
from covenant.report import page
from covenant.report import plots
from covenant.report import progress
from covenant.report import seeds

tag = markup.tag
_HEAD = (
  'run', 'held-out, nats per byte', 'difference', 'round', 'tokens',
  'bytes sent', 'payload', 'measured time',
)  # fmt: skip
_SEEDS_HEAD = (
  'group', 'seeds', 'mean, nats per byte', 'standard deviation', 'difference'
)  # fmt: skip
_POINTS = 200  # points of a curve, at most
_HEADROOM = 1.4  # losses are shown up to this multiple of the worst last one


class Comparison(NamedTuple):
  """The files of a comparison and its table."""

  page: pathlib.Path
  figures: list[pathlib.Path]
  table: str  # in plain text


def write(
  workdirs: Sequence[str | os.PathLike[str]],
  workdir: str | os.PathLike[str],
  baseline: str | None = None,
) -> Comparison:
  """Writes compare.html, compare_tokens.png and compare_bytes.png.

  Args:
    workdirs: folders of two or more emulated runs. Those that differ in their
      seed alone are drawn as one, as a mean and a band.
    workdir: folder to write to; it is created if missing.
    baseline: the name of the run that the others are compared with; the first
      one if omitted.

  Raises:
    ConfigError: fewer than two folders, one given twice, or one without an
      evaluated run, or no run of the baseline's name.
    MetricsError: a metrics.jsonl is malformed.
  """
  runs = _read(workdirs)
  groups = seeds.groups(runs)
  base = _baseline(groups, baseline)
  rows = [_row(name, run, base) for name, run in runs.items()]
  over_seeds = [_seeds_row(g, base) for g in groups if len(g.runs) > 1]
  tables = [markup.table(_HEAD, rows, 'The runs')]
  if over_seeds:
    tables.append(markup.table(_SEEDS_HEAD, over_seeds, 'Means over seeds'))
  sections = [
    (
      'Table',
      [_switches(groups), tag('div', *tables, class_='wide', id='runs')],
    ),
    ('Loss', _figures(groups, base)),
    ('Config', _differences(runs)),
  ]
  lead = (
    'The last evaluation of each run. Losses per byte compare runs of '
    f'different tokenizers. Differences are to {base.name}.'
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
  if over_seeds:
    lines += ['', *progress.aligned([_SEEDS_HEAD, *over_seeds], str.rjust)]
  return Comparison(made, figures, '\n'.join(lines))


def _baseline(groups: Sequence[seeds.Group], name: str | None) -> seeds.Group:
  """Returns the group that has the run of this name; the first without one."""
  if name is None:
    return groups[0]
  for group in groups:
    if name in group.runs:
      return group
  known = [run for group in groups for run in group.runs]
  near = difflib.get_close_matches(name, known, n=1)
  hint = f'did you mean {near[0]}? ' if near else ''
  raise config_lib.ConfigError(
    f'--baseline: there is no run {name!r}; {hint}expected one of: '
    f'{", ".join(known)}'
  )


def _switches(groups: Sequence[seeds.Group]) -> markup.Html:
  """Returns a box per curve, which hides it in all charts and tables."""
  boxes = (
    tag(
      'label',
      tag(
        'input',
        type='checkbox',
        value=group.name,
        checked=True,
        data_runs=json.dumps(list(group.runs)),
      ),
      f' {group.name}',
    )
    for group in groups
  )
  return tag(
    'fieldset', tag('legend', 'Shown'), *boxes, id='shown', class_='wide'
  )


def _seeds_row(group: seeds.Group, base: seeds.Group) -> tuple[str, ...]:
  return (
    group.name,
    f'{len(group.runs)}',
    f'{group.mean:.4f}',
    f'{group.deviation:.4f}',
    '' if group is base else f'{group.mean - base.mean:+.4f}',
  )


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


def _row(name: str, run: folder.Run, base: seeds.Group) -> tuple[str, ...]:
  last = run.evaluations[-1]
  size = run.payload_bytes
  seconds = sum(r.seconds for r in [*run.rounds, *run.evaluations])
  is_base = len(base.runs) == 1 and name in base.runs
  return (
    name,
    f'{last.nats_per_byte:.4f}',
    '' if is_base else f'{last.nats_per_byte - base.mean:+.4f}',
    f'{last.round:,}',
    progress.human_count(last.tokens),
    progress.human_bytes(last.bytes_up),
    '' if size is None else progress.human_bytes(size),
    progress.human_seconds(seconds),
  )


def _figures(
  groups: Sequence[seeds.Group], base: seeds.Group
) -> list[markup.Html]:
  """Returns charts of held-out loss, its differences, and training loss."""
  note = ''
  if any(len(group.runs) > 1 for group in groups):
    note = 'Bands reach from the lowest to the highest seed.'
  heldout = [
    _view(against, note, axis, groups, position, _evaluations, _per_byte)
    for against, axis, position in _axes(groups)
  ]
  y = markup.Axis('nats per byte')
  figures = [_chart('held-out-loss', 'Held-out loss', y, heldout)]
  if difference := _difference_view(groups, base):
    title = f'Held-out loss minus that of {base.name}'
    signed = markup.Axis('nats per byte', '{:+.4f}'.format)
    figures.append(markup.views('difference', title, signed, [difference]))
  note = 'Losses per token compare runs of one tokenizer only. ' + note
  training = [
    _view(against, note, axis, groups, position, _rounds, _per_token)
    for against, axis, position in _axes(groups)
  ]
  y = markup.Axis('mean of miners, nats per token')
  return [*figures, _chart('training-loss', 'Training loss', y, training)]


def _axes(
  groups: Sequence[seeds.Group],
) -> Iterator[tuple[str, markup.Axis, Mapping[str, curves.Position]]]:
  """Yields the horizontal axes that all runs have."""
  runs = {name: run for group in groups for name, run in group.runs.items()}
  yield 'tokens', curves.TOKENS, dict.fromkeys(runs, curves.tokens)
  yield 'rounds', curves.ROUNDS, dict.fromkeys(runs, curves.rounds_completed)
  yield 'bytes', curves.BYTES, dict.fromkeys(runs, curves.bytes_up)
  for kind, (clock, _) in curves.CLOCKS.items():
    seconds = {n: at for n, r in runs.items() if (at := clock(r)) is not None}
    if len(seconds) == len(runs):
      most = max(seconds[n](r.evaluations[-1]) for n, r in runs.items())
      axis, unit = curves.time_axis(kind, most)
      scaled = {
        name: lambda r, at=at, unit=unit: at(r) / unit
        for name, at in seconds.items()
      }
      yield f'{kind} time', axis, scaled


def _evaluations(run: folder.Run) -> Sequence[metrics.Evaluation]:
  return run.evaluations


def _rounds(run: folder.Run) -> Sequence[metrics.Round]:
  return run.rounds


def _per_byte(record: metrics.Record) -> float:
  assert isinstance(record, metrics.Evaluation)
  return record.nats_per_byte


def _per_token(record: metrics.Record) -> float:
  return record.loss


def _view(
  against: str,
  note: str,
  axis: markup.Axis,
  groups: Sequence[seeds.Group],
  position: Mapping[str, curves.Position],
  records: Callable[[folder.Run], Sequence[metrics.Record]],
  value: seeds.Value,
) -> markup.View:
  """Returns the curves of all groups; of several seeds with a band."""
  means, edges = [], []
  for look, group in enumerate(groups):
    found = seeds.points(group, records, position, value)
    found = markup.thin(found, _POINTS)
    mean = [(p.x, p.mean) for p in found]
    means.append(markup.Series(group.name, mean, look))
    if len(group.runs) > 1:
      for name in 'high', 'low':
        edge = [(p.x, getattr(p, name)) for p in found]
        label = f'{group.name}, {name}est'.replace('lowest', 'lowest seed')
        edges.append(
          markup.Series(label.replace('highest', 'highest seed'), edge, look)
        )
  first = len(means)
  bands = [(first + i, first + i + 1) for i in range(0, len(edges), 2)]
  if any(len(series.points) == _POINTS for series in means):
    note += f' At most {_POINTS} points per run are drawn, evenly spaced.'
  return markup.View(against, note, axis, [*means, *edges], bands)


def _chart(
  key: str, title: str, y: markup.Axis, found: Sequence[markup.View]
) -> markup.Html:
  last = [s.points[-1][1] for s in found[0].series if s.points]
  top = _HEADROOM * max((v for v in last if v is not None), default=0.0)
  return markup.views(key, title, y, found, top)


def _difference_view(
  groups: Sequence[seeds.Group], base: seeds.Group
) -> markup.View | None:
  """Returns the differences to a group, which is interpolated by tokens."""
  _, axis, position = next(_axes(groups))
  curve = seeds.points(base, _evaluations, position, _per_byte)
  xs, ys = [p.x for p in curve], [p.mean for p in curve]
  series = []
  for look, group in enumerate(groups):
    found = seeds.points(group, _evaluations, position, _per_byte)
    found = markup.thin(found, _POINTS)
    if group is not base:
      points = [
        (p.x, p.mean - float(np.interp(p.x, xs, ys)))
        for p in found
        if xs[0] <= p.x <= xs[-1]
      ]
      series.append(markup.Series(group.name, points, look))
  if not series:
    return None
  note = 'At the same number of tokens; below zero is better.'
  return markup.View('', note, axis, series)


def _differences(runs: Mapping[str, folder.Run]) -> list[markup.Html]:
  """Returns a table of the fields in which the configs differ."""
  fields = [dict(folder.leaves(run.config)) for run in runs.values()]
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
