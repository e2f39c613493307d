"""The settings of a run: the phases of its rounds, and every config field."""

import json
from collections.abc import Iterator, Mapping

from covenant import config as config_lib
from covenant import typing as ct
from covenant.protocol import round as round_lib
from covenant.report import folder
from covenant.report import markup

tag = markup.tag


def phases(run: folder.Run) -> list[markup.Html]:
  """Returns a table of the phases of one round, with a timeline."""
  raw, second = run.get('phases'), run.get('network.block_seconds')
  if not isinstance(raw, Mapping) or not second:
    return []
  known = config_lib.flatten(config_lib.Config())
  ours = {k: v for k, v in raw.items() if f'phases.{k}' in known}
  # The round that starts at block 0; all others have the same phases.
  settings = config_lib.Phases(**{**ours, 'origin': 0})
  plan = round_lib.Schedule(settings)
  put, decision = plan.put_opens(0), plan.decision_block(0)
  spans = (
    ('train', settings.confirmations, put, 'miners, on their assigned data'),
    ('put window', put, plan.start(1), 'payloads are committed'),
    (
      'upload, check, vote',
      plan.collection_block(0),
      decision,
      'miners upload, validators check and vote',
    ),
    ('takeover', decision, plan.last_decision_block(0), 'without a majority'),
  )
  most = max(stop for _, _, stop, _ in spans)
  word = 'simulated s' if run.rounds else 'configured s'
  rows = [
    (
      name,
      f'{start}-{stop - 1}',
      f'{second * (stop - start):,.0f}',
      markup.strip([(start, stop)], most),
      what,
    )
    for name, start, stop, what in spans
  ]
  overlap = ', except for its first steps,' if run.get('optim.overlap') else ''
  note = (
    f'A round is {settings.round_blocks} blocks, '
    f'{second * settings.round_blocks:,.0f} {word}. Blocks and timelines begin '
    f'with the round and run into the next one, whose training{overlap} waits '
    'for the decision.'
  )
  title = 'Phases of a round'
  head = ('phase', 'blocks', word, 'when', 'content')
  return [
    tag(
      'div',
      tag('h3', title),
      markup.table(head, rows, title),
      tag('p', note, class_='note'),
      class_='wide',
      id='phases',
    )
  ]


def fields(run: folder.Run) -> list[markup.Html]:
  """Returns every field of the config by section, with a search."""
  if not run.config:
    return [tag('p', 'There is no config.json in this folder.')]
  defaults = config_lib.flatten(config_lib.Config())
  sections: dict[str, list[tuple[str, str, str]]] = {}
  for path, value in leaves(run.config):
    section = path.partition('.')[0] if '.' in path else 'run'
    sections.setdefault(section, []).append(
      (path, show(value), _difference(path, value, defaults))
    )
  rows = [row for of_one in sections.values() for row in of_one]
  changed = sum(bool(difference) for _, _, difference in rows)
  head = ('field', 'value', 'default, where it differs')
  folds = [
    tag(
      'details',
      tag('summary', f'{name} ({len(of_one)})'),
      markup.table(head, of_one, name),
    )
    for name, of_one in sections.items()
  ]
  search = tag(
    'label',
    f'Search {len(rows)} fields, {changed} of them not the default: ',
    tag('input', type='search', id='search', autocomplete='off'),
    tag('output', id='found', aria_live='polite'),
  )
  path = run.folder / 'config.json'
  if path.exists():  # a process has the config of its network instead
    again = tag('code', f'python run.py --config={path}')
    folds.append(tag('p', 'To run it again: ', again, class_='note'))
  return [tag('div', search, *folds, class_='wide', id='fields')]


def leaves(
  node: folder.JsonObject, prefix: str = ''
) -> Iterator[tuple[str, ct.Json]]:
  """Yields every field of nested mappings as path and value."""
  for key, value in node.items():
    if isinstance(value, Mapping):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def show(value: object) -> str:
  """Returns a value as it is in config.json.

  >>> show([64, 64]), show('sign')
  ('[64, 64]', '"sign"')
  """
  return json.dumps(value, ensure_ascii=False)


def _difference(path: str, value: object, defaults: folder.JsonObject) -> str:
  """Returns the default of a field that has another value, else ''."""
  if path not in defaults:
    return 'not a field of this version'
  default = json.loads(json.dumps(defaults[path]))  # tuples become lists
  return '' if value == default else show(default)
