"""What a run was told to do: the phases of its rounds, and every field."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from covenant import config as config_lib
from covenant.protocol import round as round_lib
from covenant.report import folder
from covenant.report import lanes
from covenant.report import markup

tag = markup.tag


def phases(run: folder.Run) -> list[markup.Html]:
  """The phases of one round as a timeline and a table."""
  raw, second = run.get('phases'), run.get('network.block_seconds')
  if not isinstance(raw, Mapping) or not second:
    return []
  known = config_lib.flatten(config_lib.Config())
  ours = {k: v for k, v in raw.items() if f'phases.{k}' in known}
  # Of the first round, from block 0: all others are like it.
  settings = config_lib.Phases(**{**ours, 'origin': 0})
  plan, lag = round_lib.Schedule(settings), settings.confirmations
  opens, end = plan.put_opens(0), plan.start(1)
  spans = (
    ('train', lag, opens, 'on the data assigned'),
    ('put window', opens, end, 'payloads are committed'),
    (
      'upload, check, vote',
      plan.collection_block(0),
      plan.decision_block(0),
      'by miners; by validators',
    ),
    (
      'takeover',
      plan.decision_block(0),
      plan.last_decision_block(0),
      'where no majority is found',
    ),
  )
  word = 'simulated s' if run.rounds else 'configured s'
  rows = [
    (
      name,
      f'{start}-{stop - 1}',
      f'{second * (stop - start):,.0f}',
      what,
    )
    for name, start, stop, what in spans
  ]
  begun = '(but for its first steps) ' if run.get('optim.overlap') else ''
  note = (
    f'A round is {settings.round_blocks} blocks, '
    f'{second * settings.round_blocks:,.0f} {word}. The dashed line is the '
    'start of the next one, whose training '
    f'{begun}waits for what is decided here.'
  )
  title = 'Phases of a round'
  figure = lanes.phases(
    'phases',
    title,
    note,
    [
      lanes.Phase(f'{name}: {blocks}, {seconds} s', start, stop)
      for (name, blocks, seconds, _), (_, start, stop, _) in zip(
        rows, spans, strict=True
      )
    ],
    settings.round_blocks,
  )
  table = markup.table(('phase', 'blocks', word, 'what'), rows, title)
  return [figure, tag('div', table, id='phases-table')]


def fields(run: folder.Run) -> list[markup.Html]:
  """Every field of the config, by section, with a search."""
  if not run.config:
    return [tag('p', 'There is no config.json in this folder.')]
  defaults = config_lib.flatten(config_lib.Config())
  sections: dict[str, list[tuple[str, str, str]]] = {}
  for path, value in leaves(run.config):
    section = path.partition('.')[0] if '.' in path else 'run'
    sections.setdefault(section, []).append(
      (path, show(value), _difference(path, value, defaults))
    )
  count = sum(map(len, sections.values()))
  changed = sum(bool(d) for rows in sections.values() for _, _, d in rows)
  folds = [
    tag(
      'details',
      tag('summary', f'{name} ({len(rows)})'),
      markup.table(('field', 'value', 'default, where it differs'), rows, name),
      class_='section',
    )
    for name, rows in sections.items()
  ]
  search = tag(
    'label',
    f'Search {count} fields, {changed} of them not the default: ',
    tag('input', type='search', id='search', autocomplete='off'),
    tag('output', id='found', aria_live='polite'),
  )
  path = run.folder / 'config.json'
  again = tag('code', f'python run.py --config={path}')
  if path.exists():  # of a process, its network has it
    folds.append(tag('p', 'To run it again: ', again, class_='note'))
  return [
    tag(
      'div',
      search,
      *folds,
      class_='wide',
      id='fields',
    )
  ]


def leaves(node: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Every field of nested mappings, as path and value."""
  for key, value in node.items():
    if isinstance(value, Mapping):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def show(value: Any) -> str:
  """A value as in config.json.

  >>> show([64, 64]), show('sign')
  ('[64, 64]', '"sign"')
  """
  return json.dumps(value, ensure_ascii=False)


def _difference(path: str, value: Any, defaults: Mapping[str, Any]) -> str:
  """The default that a field does not have; '' if it has it."""
  if path not in defaults:
    return 'not a field of this version'
  default = json.loads(json.dumps(defaults[path]))  # tuples become lists
  return '' if value == default else show(default)
