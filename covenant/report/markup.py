"""HTML and SVG from Python calls, in which nothing can stay unescaped.

A string becomes text, whatever it holds; only what `tag` made is markup. So
what a peer or a config wrote cannot become part of the page.
"""

import html
from collections.abc import Sequence

_VOID = frozenset({'input', 'link', 'meta'})  # of those that are used here
_LONG = 36  # characters of a cell; longer ones go over several lines


class Html(str):
  """Markup: the one kind of string that is not escaped."""

  __slots__ = ()


def text(value: str) -> Html:
  """Any string as markup that shows it.

  >>> text('a < b')
  'a &lt; b'
  """
  return value if isinstance(value, Html) else Html(html.escape(value))


def join(*children: str) -> Html:
  """Children one after another."""
  return Html(''.join(map(text, children)))


def tag(
  name: str, /, *children: str, **attributes: str | float | bool | None
) -> Html:
  """An element.

  Args:
    name: of the element.
    *children: strings are escaped, `Html` is not.
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
  head: tuple[str, ...],
  rows: Sequence[tuple[str, ...]],
  label: str,
  positions: Sequence[float] | None = None,
) -> Html:
  """A table that scrolls by itself where it is wider than the page.

  Args:
    head: names of the columns.
    rows: cells; the first of a row names it.
    label: what it is, for who cannot see it.
    positions: where the rows are in the figure they belong to.
  """
  body = []
  for i, (first, *rest) in enumerate(rows):
    cells = [tag('th', first, scope='row')]
    for cell in rest:
      long = 'long' if len(cell) > _LONG else None
      cells.append(tag('td', cell, class_=long))
    x = None if positions is None else f'{positions[i]:.1f}'
    body.append(tag('tr', *cells, data_x=x))
  names = (tag('th', name, scope='col') for name in head)
  return tag(
    'div',
    tag(
      'table',
      tag('thead', tag('tr', *names)),
      tag('tbody', *body),
    ),
    class_='scroll',
    tabindex=0,
    role='region',
    aria_label=label,
  )
