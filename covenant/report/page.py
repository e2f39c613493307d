"""`report.html`: one run as one page that loads nothing from anywhere.

The page is made from the files of a workdir (folder.py), which may belong to a
run in progress, a stopped run or a finished one.
"""

import base64
import datetime
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from covenant import config as config_lib
from covenant import files
from covenant.protocol import round as round_lib
from covenant.report import amendments
from covenant.report import curves
from covenant.report import folder
from covenant.report import markup
from covenant.report import progress
from covenant.report import samples
from covenant.report import series
from covenant.report import verdicts

tag, join = markup.tag, markup.join
_HERE = pathlib.Path(__file__).parent


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes `report.html` of a workdir into it and returns its path.

  Raises:
    ConfigError: the folder has no files of a run.
    MetricsError: its metrics.jsonl is malformed.
  """
  run = folder.read(workdir)
  sections = [
    ('Summary', _tiles(facts(run))),
    ('Loss', [*curves.losses(run), *curves.published(run)]),
    ('Training', series.training(run)),
    (
      'Miners',
      [*curves.miners(run), *verdicts.refused(run), *verdicts.miners(run)],
    ),
    ('Samples', samples.section(run)),
    ('Process', [*series.process(run), *verdicts.process(run)]),
    ('Round', phases(run)),
    ('Amendments', amendments.section(run)),
    ('Origin', origin(run)),
    ('Config', fields(run)),
  ]
  text = render(run.name, standing(run), sections)
  return save(run.folder / 'report.html', text)


def save(path: pathlib.Path, text: str) -> pathlib.Path:
  """Writes a page atomically: a browser may be loading it."""
  # Text from peers may hold lone surrogates, which UTF-8 cannot encode.
  files.write(path, text.encode(errors='replace'))
  return path


def render(
  title: str,
  lead: str,
  sections: Sequence[tuple[str, Sequence[markup.Html]]],
) -> markup.Html:
  """Returns a whole page.

  Its policy allows no loading, no style and no script but the page's own,
  identified by their digests: markup that got past the escaping would be inert.

  Args:
    title: title of the page.
    lead: sentence under the title.
    sections: headings with their content; empty ones are left out.
  """
  style = _read('uplot/uPlot.min.css', 'page.css')
  script = _read('uplot/uPlot.iife.min.js', 'page.js')
  policy = (
    f"default-src 'none'; style-src '{_digest(style)}'; "
    f"script-src '{_digest(script)}'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
  )
  shown = [(name, content) for name, content in sections if content]
  head = tag(
    'head',
    tag('meta', charset='utf-8'),
    tag('meta', http_equiv='Content-Security-Policy', content=policy),
    tag('meta', name='viewport', content='width=device-width'),
    tag('meta', name='color-scheme', content='light dark'),
    tag('title', title),
    tag('link', rel='icon', href='data:,'),  # else a browser requests one
    tag('style', style),
  )
  links = (tag('a', name, href=f'#{name.lower()}') for name, _ in shown)
  no_script = 'Charts need JavaScript. Their numbers are in the tables.'
  body = tag(
    'body',
    tag('header', tag('h1', title), tag('p', lead), tag('nav', *links)),
    tag('noscript', tag('p', no_script)),
    tag(
      'main',
      *(
        tag(
          'section',
          tag('h2', name),
          tag('div', *content, class_='grid-of-figures'),
          id=name.lower(),
        )
        for name, content in shown
      ),
    ),
    tag('script', script),
  )
  return join(
    markup.Html('<!doctype html>'), tag('html', head, body, lang='en')
  )


def _read(*names: str) -> markup.Html:
  """Returns files of this package, one after another, as they are."""
  texts = [(_HERE / name).read_text(encoding='utf-8') for name in names]
  return markup.Html('\n'.join(texts))


def _digest(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'


def standing(run: folder.Run) -> str:
  """Returns whose page it is, and the progress, as a sentence."""
  if not run.rounds:
    if not (run.folder / 'status.json').exists():
      return 'No round yet.'
    text = f'The {run.status.get("role") or "process"} of a network'
    if (uid := run.status.get('uid')) is not None:
      text += f', uid {uid}'
    if done := run.status.get('round'):
      text += f', after {done:,} rounds'
    hotkey = run.status.get('hotkey')
    return f'{text}. Hotkey {hotkey}.' if hotkey else f'{text}.'
  last, planned = run.rounds[-1].round, amendments.planned_rounds(run)
  text = f'{last:,} of {planned:,} rounds' if planned else f'{last:,} rounds'
  if planned and last < planned:
    text += ': stopped, or in progress when this page was made'
  return (
    f'{text}. All nodes on one host, in simulated time. The first round is '
    'round 1.'
  )


def origin(run: folder.Run) -> list[markup.Html]:
  """Returns a table of the starts: when, where and with what versions."""
  rows = []
  for start in run.starts:
    when = datetime.datetime.fromtimestamp(start['time'], datetime.UTC)
    versions = ', '.join(f'{k} {v}' for k, v in start['versions'].items())
    rows.append(
      (
        f'{when:%Y-%m-%d %H:%M:%S} UTC',
        str(start['host']),
        str(start.get('devices', '')),
        f'{start.get("cores", "?")} cores, '
        f'{progress.human_bytes(start.get("memory_bytes", 0))}',
        str(start.get('system', '')),
        str(start.get('commit') or 'no checkout'),
        versions,
      )
    )
  if not rows:
    return []
  title = 'Starts'
  head = ('started', 'host', 'devices', 'size', 'system', 'commit', 'versions')
  table = markup.table(head, rows, title)
  return [tag('div', tag('h3', title), table, class_='wide', id='starts')]


def facts(run: folder.Run) -> list[tuple[str, str, str]]:
  """Returns the numbers of a run, each with a name and a remark."""
  found = []
  if run.evaluations:
    last = run.evaluations[-1]
    remark = (
      f'nats per byte; {last.bits_per_byte:.4f} bits per byte, '
      f'{last.loss:.4f} nats per token'
    )
    found.append(('held-out loss', f'{last.nats_per_byte:.4f}', remark))
  if not run.rounds:
    return found
  last = run.rounds[-1]
  ratio = f'{last.compression_ratio:.1f}x less than fp32, last round'
  found += [
    ('training loss', f'{last.loss:.4f}', 'nats per token, last round'),
    (
      'tokens',
      progress.human_count(last.tokens),
      f'by {len(last.uids)} miners in the last round',
    ),
    ('bytes sent', progress.human_bytes(last.bytes_up), ratio),
  ]
  if run.num_params:
    found.append(('parameters', f'{run.num_params:,}', 'of the model'))
  if run.payload_bytes:
    size = progress.human_bytes(run.payload_bytes)
    found.append(('payload', size, 'mean of the last round'))
  blocks, second = run.get('phases.round_blocks'), run.block_seconds
  if blocks and second:
    simulated = progress.human_seconds(blocks * last.round * second)
    remark = f'{last.round:,} rounds of {blocks} blocks of {second:g} s'
    found.append(('simulated time', simulated, remark))
  trained = sum(r.seconds for r in run.rounds)
  evaluated = sum(e.seconds for e in run.evaluations)
  remark = f'of this host, {progress.human_seconds(evaluated)} for evaluation'
  measured = progress.human_seconds(trained + evaluated)
  return [*found, ('measured time', measured, remark)]


def _tiles(found: Sequence[tuple[str, str, str]]) -> list[markup.Html]:
  tiles = (
    tag('div', tag('dt', name), tag('dd', value), tag('dd', remark))
    for name, value, remark in found
  )
  return [tag('dl', *tiles, class_='tiles')] if found else []


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
  for path, value in folder.leaves(run.config):
    section = path.partition('.')[0] if '.' in path else 'run'
    sections.setdefault(section, []).append(
      (path, show_value(value), _difference(path, value, defaults))
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
    again = tag('code', f'covenant --config={path}')
    folds.append(tag('p', 'To run it again: ', again, class_='note'))
  return [tag('div', search, *folds, class_='wide', id='fields')]


def show_value(value: object) -> str:
  """Returns a value as it is in config.json.

  >>> show_value([64, 64]), show_value('sign')
  ('[64, 64]', '"sign"')
  """
  return json.dumps(value, ensure_ascii=False)


def _difference(path: str, value: object, defaults: folder.JsonObject) -> str:
  """Returns the default of a field that has another value, else ''."""
  if path not in defaults:
    return 'not a field of this version'
  default = json.loads(json.dumps(defaults[path]))  # tuples become lists
  return '' if value == default else show_value(default)
