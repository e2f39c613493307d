"""Parses pages for the tests of the report."""

import html.parser


class Reader(html.parser.HTMLParser):
  """The elements, attributes and table rows of a page."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str | None]] = []
    self.rows: list[list[str]] = []
    self._cell = False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
      self._cell = True

  def handle_endtag(self, tag):
    self._cell = self._cell and tag not in ('td', 'th')

  def handle_data(self, data):
    if self._cell:
      self.rows[-1][-1] += data
