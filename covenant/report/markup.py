"""HTML built by Python calls, and line charts with their numbers as tables.

Only `tag` makes markup and escapes every string, so text from a peer or a
config cannot become part of the page.

Python writes the table of a chart; page.js draws the chart from it with uPlot,
which gives axes, zoom, cursor and legend. So a chart never shows other numbers
than its table, and text from peers reaches the browser as text only.

`uplot/` is uPlot 1.6.32 (MIT), unchanged. Of the libraries compared in
docs/operating.md it is the smallest by far, and it keeps the strict policy of
the page: no inline style, no `eval`, no HTML from labels.
"""

import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

LOOKS = 5  # colors of page.css; dashes tell the curves apart without them
_T = TypeVar('_T')
_VOID = frozenset({'input', 'link', 'meta'})  # those used here
_LONG = 36  # characters of a cell; longer ones are wrapped


class Html(str):
  """Markup: the only kind of string that is not escaped."""

  __slots__ = ()


def text(value: str) -> Html:
  """Returns any string as markup that shows it.

  >>> text('a < b')
  'a &lt; b'
  """
  return value if isinstance(value, Html) else Html(html.escape(value))


def join(*children: str) -> Html:
  """Returns the children one after another."""
  return Html(''.join(map(text, children)))


def tag(
  name: str, /, *children: str, **attributes: str | float | bool | None
) -> Html:
  """Returns an element.

  Args:
    name: name of the element.
    *children: content; strings are escaped, `Html` is not.
    **attributes: `class_` is class, `data_x` is data-x. True is an attribute
      without a value; None and False leave it out.

  >>> tag('td', '<b>', class_='a', hidden=True, title=None)
  '<td class="a" hidden>&lt;b&gt;</td>'
  """
  words = [name]
  for key, value in attributes.items():
    key = key.rstrip('_').replace('_', '-')
    if value is True:
      words.append(key)
    elif value is not None and value is not False:
      words.append(f'{key}="{html.escape(str(value))}"')
  start = f'<{" ".join(words)}>'
  return Html(start if name in _VOID else f'{start}{join(*children)}</{name}>')


def table(
  head: tuple[str, ...], rows: Sequence[tuple[str, ...]], label: str
) -> Html:
  """Returns a table that scrolls by itself where it is wider than the page.

  Args:
    head: names of the columns.
    rows: cells; the first of a row names it.
    label: subject of the table, for screen readers.
  """
  body = []
  for first, *rest in rows:
    cells = [tag('th', first, scope='row')]
    for cell in rest:
      long = len(cell) > _LONG and not isinstance(cell, Html)
      cells.append(tag('td', cell, class_='long' if long else None))
    body.append(tag('tr', *cells))
  names = (tag('th', name, scope='col') for name in head)
  return tag(
    'div',
    tag('table', tag('thead', tag('tr', *names)), tag('tbody', *body)),
    class_='scroll',
    tabindex=0,
    role='region',
    aria_label=label,
  )


def strip(spans: Iterable[tuple[float, float]], total: float) -> Html:
  """Returns a small timeline from 0 to `total` with these spans filled."""
  path = ''.join(f'M{a:.4g} 0H{b:.4g}V1H{a:.4g}z' for a, b in spans)
  return tag(
    'svg',
    tag('path', d=path),
    viewBox=f'0 0 {total:g} 1',
    preserveAspectRatio='none',
    class_='strip',
    aria_hidden='true',
  )


class Axis(NamedTuple):
  """An axis and the format of its numbers in the table."""

  label: str
  show: Callable[[float], str] = '{:.4f}'.format  # digits and commas only
  unit: str = ''  # suffix of the ticks, such as 'B'
  log: bool = False
  whole: bool = False  # ticks at integers only


class Series(NamedTuple):
  """One curve. A y of None is a gap."""

  name: str
  points: Sequence[tuple[float, float | None]]
  look: int | None  # None: one of many that are alike, drawn in gray


class View(NamedTuple):
  """The curves of a chart against one horizontal axis."""

  name: str  # completes 'against ...'
  note: str  # explanation below the chart
  x: Axis  # points at 0 have no place on a logarithmic one
  series: Sequence[Series]  # the first ones are drawn on top
  # Indices of series between which an area is filled: (highest, lowest).
  bands: Sequence[tuple[int, int]] = ()


def chart(
  key: str,
  title: str,
  note: str,
  x: Axis,
  y: Axis,
  series: Sequence[Series],
  top: float | None = None,
  joined: bool = True,
) -> Html:
  """Returns a figure: title, chart, note, and the table of its numbers.

  Args:
    key: id of the figure, unique on the page, of letters and hyphens.
    title: title of the figure.
    note: explanation below the chart.
    x: horizontal axis. Points at 0 have no place on a logarithmic one.
    y: vertical axis.
    series: curves; the first ones are drawn on top.
    top: limit of the vertical axis; the note says how many values are above.
    joined: True draws a curve across the x where only others have a value.
  """
  return views(key, title, y, [View('', note, x, series)], top, joined)


def views(
  key: str,
  title: str,
  y: Axis,
  found: Sequence[View],
  top: float | None = None,
  joined: bool = True,
) -> Html:
  """Returns a figure whose reader chooses the horizontal axis; see `chart`.

  Views without a value are left out.
  """
  caption = tag('figcaption', tag('h3', title))
  specs, notes, tables = [], [], []
  for view in found:
    curves = [_finite(s, view.x) for s in view.series]
    values = [v for points in curves for v in points.values() if v is not None]
    if not values:
      continue
    specs.append(
      {
        'name': view.name, 'y': y.label, 'unit': view.x.unit,
        'log': view.x.log, 'whole': view.x.whole, 'top': top,
        'joined': joined, 'looks': [s.look for s in view.series],
        'bands': [list(band) for band in view.bands],
      }
    )  # fmt: skip
    rows = [
      (
        view.x.show(px),
        *('' if (v := c.get(px)) is None else y.show(v) for c in curves),
      )
      for px in sorted({px for points in curves for px in points})
    ]
    head = (view.x.label, *(s.name for s in view.series))
    against = f' against {view.name}' if view.name else ''
    tables.append(table(head, rows, f'{title}{against}'))
    text = f'{view.note}{_above(values, y, top)}'.strip()
    notes.append(tag('p', text, class_='note', hidden=len(notes) > 0))
  if not specs:
    empty = tag('p', 'No values were recorded.', class_='note')
    return tag('figure', caption, empty, id=key)
  word = 'Table' if len(tables) == 1 else 'Tables'
  return tag(
    'figure',
    caption,
    tag('div', class_='plot', data_chart=json.dumps(specs)),
    *notes,
    tag(
      'details',
      tag('summary', f'{word} of {title[0].lower()}{title[1:]}'),
      *tables,
    ),
    class_='chart',
    id=key,
  )


def _above(values: Sequence[float], y: Axis, top: float | None) -> str:
  """Returns the remark about values that are cut off, or ''."""
  above = [v for v in values if top is not None and v > top]
  if not above:
    return ''
  return (
    f' Values above {top:.3g} are cut off: {len(above)}, up to '
    f'{y.show(max(above))}.'
  )


def _finite(series: Series, x: Axis) -> dict[float, float | None]:
  """Returns y by x without points that have no place; NaN becomes a gap."""
  return {
    px: py if py is not None and math.isfinite(py) else None
    for px, py in series.points
    if math.isfinite(px) and (px > 0 or not x.log)
  }


def thin(items: Sequence[_T], most: int) -> list[_T]:
  """Returns at most `most` items, evenly spaced, with the first and the last.

  >>> thin(range(10), 4)
  [0, 3, 6, 9]
  """
  if len(items) <= most:
    return list(items)
  step = (len(items) - 1) / (most - 1)
  return [items[round(i * step)] for i in range(most)]
