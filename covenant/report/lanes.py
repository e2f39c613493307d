"""Figures of lanes: who was refused in which rounds, the phases of a round."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from covenant.report import chart
from covenant.report import markup
from covenant.report import scale

tag = markup.tag
_LANE = 44  # height: a name, and its marks under it
_NAME, _MIDDLE = 15, 29  # in a lane: the base of the name, the middle of marks
_LEFT, _RIGHT = 6, chart.WIDTH - 8
_BINS = 360  # along the rounds; a bin is about a pixel of a small screen


class Phase(NamedTuple):
  """A span of a round, in blocks from its start; `stop` is excluded."""

  name: str
  start: int
  stop: int


def refusals(
  key: str,
  title: str,
  note: str,
  refused: Mapping[str, Mapping[str, Sequence[int]]],
  last: int,
) -> markup.Html:
  """Who was refused when: a lane a miner, a colour and a height a reason.

  Args:
    key: of the figure, unique on the page.
    title: of the figure.
    note: below it.
    refused: miner -> reason -> rounds.
    last: the last round that was judged.
  """
  reasons = sorted({reason for of_one in refused.values() for reason in of_one})
  looks = {reason: i for i, reason in enumerate(reasons)}
  per_bin = last // _BINS + 1
  if per_bin > 1:
    note += f' A mark may stand for up to {per_bin} rounds.'
  bins = last // per_bin + 1
  parts = []
  for lane, (name, of_one) in enumerate(refused.items()):
    y = _LANE * lane
    parts += [
      tag('text', name, x=_LEFT, y=y + _NAME),
      tag('path', d=f'M{_LEFT} {y + _MIDDLE}H{_RIGHT}', class_='grid'),
    ]
    for reason, rounds in of_one.items():
      spans = _spans(sorted({r // per_bin for r in rounds}))
      places = [(_x(a / bins), _x(b / bins)) for a, b in spans]
      parts.append(_bars(places, y + _MIDDLE, looks[reason]))
  marks = [t for t in scale.ticks(0, last) if t == int(t)]
  places = [((t / per_bin + 0.5) / bins, scale.short(t)) for t in marks]
  legend = [
    tag(
      'li',
      tag('svg', _bars([(2, 24)], 8, i), viewBox='0 0 26 16',
          aria_hidden='true'),
      reason,
      class_=chart.look_class(i),
    )
    for reason, i in looks.items()
  ]  # fmt: skip
  return _figure(key, title, note, parts, len(refused), places, 'round', legend)


def phases(
  key: str, title: str, note: str, spans: Sequence[Phase], blocks: int
) -> markup.Html:
  """The phases of one round, a lane each, over its blocks and the next ones.

  Args:
    key: of the figure, unique on the page.
    title: of the figure.
    note: below it.
    spans: from early to late.
    blocks: of a round; the next one begins there.
  """
  most = max(span.stop for span in spans)
  edge = f'M{_x(blocks / most):.1f} 0V{_LANE * len(spans)}'
  parts = [tag('path', d=edge, class_='edge')]
  for lane, span in enumerate(spans):
    y = _LANE * lane
    place = _x(span.start / most), _x(span.stop / most)
    parts += [
      tag('text', span.name, x=_LEFT, y=y + _NAME),
      tag('path', d=f'M{_LEFT} {y + _MIDDLE}H{_RIGHT}', class_='grid'),
      _bars([place], y + _MIDDLE, lane),
    ]
  places = [(t / most, scale.short(t)) for t in scale.ticks(0, most)]
  below = 'blocks from the start of the round'
  return _figure(key, title, note, parts, len(spans), places, below, [])


def _x(share: float) -> float:
  """Where a share of the width is."""
  return _LEFT + share * (_RIGHT - _LEFT)


def _bars(
  places: Iterable[tuple[float, float]], middle: float, look: int
) -> markup.Html:
  """Bars from left to right ends; their height, too, says which look it is."""
  half = (8.0, 5.5, 3.5, 2.0)[look % 4]
  path = ''
  for left, right in places:
    across = max(right - left, 1.5)
    path += f'M{left:.1f} {middle - half:g}h{across:.1f}v{2 * half:g}'
    path += f'h-{across:.1f}z'
  bar = tag('path', d=path, class_='bar')
  return tag('g', bar, class_=chart.look_class(look))


def _figure(
  key: str,
  title: str,
  note: str,
  parts: Sequence[markup.Html],
  lanes: int,
  ticks: Iterable[tuple[float, str]],
  below: str,
  legend: Sequence[markup.Html],
) -> markup.Html:
  bottom = _LANE * lanes
  axis = []
  for share, name in ticks:
    # At an end, the name must not leave the figure.
    side = 'start' if share < 0.02 else 'end' if share > 0.98 else 'middle'
    x = f'{_x(share):.1f}'
    axis.append(tag('text', name, x=x, y=bottom + 17, class_=side))
  middle = (_LEFT + _RIGHT) / 2
  axis.append(tag('text', below, x=middle, y=bottom + 37, class_='middle'))
  return tag(
    'figure',
    tag('figcaption', tag('h3', title)),
    *([tag('ul', *legend, class_='legend')] if legend else []),
    tag(
      'svg',
      tag('title', f'{title}. {note}'),
      *parts,
      *axis,
      viewBox=f'0 0 {chart.WIDTH} {bottom + 44}',
      role='img',
    ),
    tag('p', note, class_='note'),
    id=key,
  )


def _spans(numbers: Sequence[int]) -> list[tuple[int, int]]:
  """Runs of rising integers; the end is excluded."""
  spans: list[tuple[int, int]] = []
  for number in numbers:
    if spans and spans[-1][1] == number:
      spans[-1] = spans[-1][0], number + 1
    else:
      spans.append((number, number + 1))
  return spans
