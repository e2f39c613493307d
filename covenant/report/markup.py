"""HTML built by Python calls, in which every string is escaped.

Only `tag` makes markup, so text from a peer or a config cannot become part of
the page.
"""

import html
from collections.abc import Iterable, Sequence

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
