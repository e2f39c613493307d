"""Line charts of the page, each with its numbers as a table.

Python writes the table; page.js draws the chart from it with uPlot, which
gives axes, zoom, cursor and legend. So a chart never shows other numbers than
its table, and text from peers reaches the browser as text only.

`uplot/` is uPlot 1.6.32 (MIT), unchanged. Of the libraries compared in
docs/operating.md it is the smallest by far, and it keeps the strict policy of
the page: no inline style, no `eval`, no HTML from labels.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from covenant.report import markup

LOOKS = 5  # colors of page.css; dashes tell the curves apart without them

tag = markup.tag
_T = TypeVar('_T')


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


def draw(
  key: str,
  title: str,
  note: str,
  x: Axis,
  y: Axis,
  series: Sequence[Series],
  top: float | None = None,
  joined: bool = True,
) -> markup.Html:
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
  curves = [_finite(s, x) for s in series]
  values = [v for points in curves for v in points.values() if v is not None]
  caption = tag('figcaption', tag('h3', title))
  if not values:
    empty = tag('p', 'No values were recorded.', class_='note')
    return tag('figure', caption, empty, id=key)
  if top is not None and (above := [v for v in values if v > top]):
    note += (
      f' Values above {top:.3g} are cut off: {len(above)}, up to '
      f'{y.show(max(above))}.'
    )
  options = {
    'y': y.label, 'unit': x.unit, 'log': x.log, 'whole': x.whole, 'top': top,
    'joined': joined, 'looks': [s.look for s in series],
  }  # fmt: skip
  rows = [
    (
      x.show(px),
      *('' if (v := c.get(px)) is None else y.show(v) for c in curves),
    )
    for px in sorted({px for points in curves for px in points})
  ]
  return tag(
    'figure',
    caption,
    tag('div', class_='plot', data_chart=json.dumps(options)),
    tag('p', note.strip(), class_='note'),
    tag(
      'details',
      tag('summary', f'Table of {title[0].lower()}{title[1:]}'),
      markup.table((x.label, *(s.name for s in series)), rows, title),
    ),
    class_='chart',
    id=key,
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
