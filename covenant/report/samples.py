"""Texts that the model of a run wrote, for its report."""

from collections.abc import Sequence

from covenant.node import samples as samples_lib
from covenant.report import folder
from covenant.report import markup

_MOST = 100  # newest samples on the page


def section(run: folder.Run) -> Sequence[markup.Html]:
  """Returns the samples of a run as a table; nothing without any."""
  found = samples_lib.read(run.folder)
  rows = [
    (str(x['round']), f'{x["prompt"]}{x["text"]}') for x in found[-_MOST:]
  ]
  if not rows:
    return []
  return [
    markup.tag(
      'div',
      markup.tag('h3', 'Text of the model by round, the newest last'),
      markup.table(('round', 'text'), rows, 'Samples'),
      class_='wide',
      id='samples',
    )
  ]
