"""Line charts as SVG in HTML, each with its numbers as a table.

Drawn here, not in the browser: a page shows its figures without JavaScript,
which only reads values off the table (page.js). Colours are classes of
page.css, so that they follow a dark screen; dashes and marks tell the curves
apart without them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from covenant.report import markup
from covenant.report import scale

LOOKS = 5  # colours; each then comes with other dashes
WIDTH, HEIGHT = 480, 300  # of the view box
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 28, 46
_DASHES = ('', '7 3', '2 3')
_MARKS = 8  # on a curve, about
_NAMED = 64  # muted curves that get a button each, at most

tag = markup.tag
# A mark around a point, as a path; one a look.
_SHAPES = (
  'm-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z',
  'm-3-3h6v6h-6z',
  'm0-4l4.2 7h-8.4z',
  'm0-4.4l4.4 4.4l-4.4 4.4l-4.4-4.4z',
  'm0 4l4.2-7h-8.4z',
)


class Axis(NamedTuple):
  """How an axis is named, and how its numbers read."""

  label: str
  tick: Callable[[float], str] = scale.short
  show: Callable[[float], str] = '{:.4f}'.format  # in the table
  log: bool = False
  whole: bool = False  # integers only


class Series(NamedTuple):
  """One curve. A y of None is a gap."""

  name: str
  points: Sequence[tuple[float, float | None]]
  look: int | None  # None: one of many that are alike, drawn in grey
  marks: bool = True


class _Frame(NamedTuple):
  """Where numbers are in the view box."""

  x: Axis
  low_x: float
  high_x: float
  low_y: float
  high_y: float

  def place_x(self, x: float) -> float:
    low, high = self.low_x, self.high_x
    if self.x.log:
      x, low, high = math.log10(x), math.log10(low), math.log10(high)
    share = (x - low) / (high - low) if high > low else 0.5
    return LEFT + share * (WIDTH - LEFT - RIGHT)

  def place_y(self, y: float) -> float:
    low, high = self.low_y, self.high_y
    share = (y - low) / (high - low) if high > low else 0.5
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def draw(
  key: str,
  title: str,
  note: str,
  x: Axis,
  y: Axis,
  series: Sequence[Series],
  top: float | None = None,
) -> markup.Html:
  """A figure: title, legend, chart, what it shows, table.

  Args:
    key: of the figure, unique on the page, of letters and hyphens.
    title: of the figure.
    note: what there is to know about it, below.
    x: the horizontal axis. Of a logarithmic one, points at 0 are left out.
    y: the vertical axis.
    series: curves; the first ones are drawn on top.
    top: what is higher is cut off, which the note then says.
  """
  kept = [_valid(s, x) for s in series]
  points = [(px, py) for s in kept for px, py in s.points if py is not None]
  if not points:
    return tag(
      'figure',
      tag('figcaption', tag('h3', title)),
      tag('p', 'Nothing of it was recorded.', class_='note'),
      class_='chart',
      id=key,
    )
  over = [py for _, py in points if top is not None and py > top]
  if top is not None and over:
    note += (
      f' Values above {y.tick(top)} are cut off: {len(over)} of them, up to '
      f'{y.show(max(over))}.'
    )
  frame = _frame(points, x, top if over else None)
  rows, positions = _rows(kept, x, y, frame)
  svg = tag(
    'svg',
    tag('title', f'{title}. {note}'),
    *_axes(frame, y),
    tag(
      'clipPath',
      tag('rect', x=LEFT - 4, y=TOP - 5, width=WIDTH, height=HEIGHT),
      id=f'{key}-clip',
    ),
    tag(
      'g',
      *(_curve(i, s, frame) for i, s in reversed(list(enumerate(kept)))),
      clip_path=f'url(#{key}-clip)',
    ),
    tag('path', class_='cursor', d=f'M0 {TOP}V{HEIGHT - BOTTOM}'),
    viewBox=f'0 0 {WIDTH} {HEIGHT}',
    role='img',
  )
  return tag(
    'figure',
    tag('figcaption', tag('h3', title)),
    _legend(kept),
    tag(
      'div',
      svg,
      class_='plot',
      tabindex=0,
      role='group',
      aria_label=f'{title}: left and right arrow keys read values',
    ),
    tag('output', class_='readout', aria_live='polite'),
    tag('p', note, class_='note'),
    tag(
      'details',
      tag('summary', f'Table of {title[0].lower()}{title[1:]}'),
      markup.table((x.label, *(s.name for s in kept)), rows, title, positions),
    ),
    class_='chart',
    id=key,
  )


def _valid(series: Series, x: Axis) -> Series:
  """Without what has no place; what is no number becomes a gap."""
  points = [
    (px, py if py is not None and math.isfinite(py) else None)
    for px, py in series.points
    if math.isfinite(px) and (px > 0 or not x.log)
  ]
  return series._replace(points=points)


def _frame(
  points: Sequence[tuple[float, float]], x: Axis, top: float | None
) -> _Frame:
  ys = [py for _, py in points]
  low, high = min(ys), max(ys) if top is None else top
  # A logarithmic axis begins where something can be seen.
  xs = [px for px, py in points if not x.log or py <= high]
  pad = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
  # A quantity that starts near zero is shown from zero.
  low = 0.0 if 0 <= low <= 0.25 * high else low - pad
  return _Frame(x, min(xs), max(xs), low, high if top else high + pad)


def _axes(frame: _Frame, y: Axis) -> list[markup.Html]:
  x, low, high = frame.x, frame.low_x, frame.high_x
  bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
  marks_x = scale.log_ticks(low, high) if x.log else scale.ticks(low, high)
  if x.whole:
    marks_x = [t for t in marks_x if t == int(t)]
  marks_y = scale.ticks(frame.low_y, frame.high_y)
  grid = ''.join(f'M{LEFT} {frame.place_y(t):.1f}H{right}' for t in marks_y)
  grid += ''.join(
    f'M{frame.place_x(t):.1f} {bottom}v4' for t in marks_x or [low]
  )
  return [
    tag('path', class_='grid', d=grid),
    *(
      tag('text', x.tick(t), x=f'{frame.place_x(t):.1f}', y=bottom + 19,
          class_='middle')
      for t in marks_x
    ),
    *(
      tag('text', y.tick(t), x=LEFT - 7, y=f'{frame.place_y(t) + 4.5:.1f}',
          class_='end')
      for t in marks_y
    ),
    tag('text', x.label, x=(LEFT + right) / 2, y=HEIGHT - 5, class_='middle'),
    tag('text', y.label, x=4, y=13),
  ]  # fmt: skip


def _curve(index: int, series: Series, frame: _Frame) -> markup.Html:
  """Lines, and marks on some points of them."""
  line, pen = [], 'M'
  places = []
  for i, (px, py) in enumerate(series.points):
    if py is None:
      pen = 'M'
      continue
    place = f'{frame.place_x(px):.1f} {frame.place_y(py):.1f}'
    line.append(pen + place)
    alone = i + 1 == len(series.points) or series.points[i + 1][1] is None
    if pen == 'M' and alone:
      line.append('h0')  # a dot, by the round caps of lines
    pen = 'L'
    places.append(place)
  parts = [tag('path', d=''.join(line), class_='line', **_dash(series.look))]
  if series.look is not None and series.marks:
    shape = _SHAPES[series.look % len(_SHAPES)]
    every = max(1, round(len(places) / _MARKS))
    marks = ''.join(f'M{place}{shape}' for place in places[::-1][::every])
    parts.append(tag('path', d=marks, class_='mark'))
  return tag('g', *parts, class_=look_class(series.look), data_series=index)


def look_class(look: int | None) -> str:
  """The class that gives a colour."""
  return 'muted' if look is None else f'look{look % LOOKS}'


def _dash(look: int | None) -> dict[str, str]:
  dash = _DASHES[(look or 0) // LOOKS % len(_DASHES)]
  return {'stroke_dasharray': dash} if dash else {}


def _legend(series: Sequence[Series]) -> markup.Html:
  """Buttons that put one curve in front of the others."""
  muted = sum(s.look is None for s in series)
  items = []
  for i, s in enumerate(series):
    if s.look is None and muted > _NAMED:
      continue
    sample = [tag('path', d='M1 6H25', class_='line', **_dash(s.look))]
    if s.look is not None and s.marks:
      shape = _SHAPES[s.look % len(_SHAPES)]
      sample.append(tag('path', d=f'M13 6{shape}', class_='mark'))
    picture = tag('svg', *sample, viewBox='0 0 26 12', aria_hidden='true')
    button = tag(
      'button',
      *([picture] if s.look is not None else []),
      s.name,
      type='button',
      class_=look_class(s.look),
      aria_pressed='false',
      data_series=i,
    )
    items.append(tag('li', button))
  if muted > _NAMED:
    items.append(tag('li', f'{muted} others in grey'))
  return tag('ul', *items, class_='legend')


def _rows(
  series: Sequence[Series], x: Axis, y: Axis, frame: _Frame
) -> tuple[Sequence[tuple[str, ...]], list[float]]:
  """A row an x that any curve has, and where it is."""
  values = [dict(s.points) for s in series]
  xs = sorted({px for of_one in values for px in of_one})
  rows = []
  for px in xs:
    found = (of_one.get(px) for of_one in values)
    rows.append((x.show(px), *('' if v is None else y.show(v) for v in found)))
  return rows, [frame.place_x(px) for px in xs]
