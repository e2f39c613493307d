"""`report.html`: one run as one page that asks nobody for anything.

Made from the files of a workdir (folder.py) at any time: at the end of a run,
of a stopped one, or of one under way.
"""

import base64
import hashlib
import os
import pathlib
from collections.abc import Sequence

from covenant import files
from covenant.report import curves
from covenant.report import folder
from covenant.report import judged
from covenant.report import markup
from covenant.report import progress
from covenant.report import settings

tag, join = markup.tag, markup.join
_HERE = pathlib.Path(__file__).parent


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Makes `report.html` of a workdir, in it; returns its path.

  Raises:
    ConfigError: the folder holds nothing of a run.
    MetricsError: its metrics.jsonl is malformed.
  """
  run = folder.read(workdir)
  sections = [
    ('Summary', _tiles(facts(run))),
    ('Loss', [*curves.losses(run), *curves.published(run)]),
    (
      'Miners',
      [*curves.miners(run), *judged.refused(run), *judged.miners(run)],
    ),
    ('Process', judged.process(run)),
    ('Round', settings.phases(run)),
    ('Config', settings.fields(run)),
  ]
  text = render(run.name, standing(run), sections)
  return save(run.folder / 'report.html', text)


def save(path: pathlib.Path, text: str) -> pathlib.Path:
  """Writes a page, at once or not at all: a browser may be loading it."""
  # Text of a peer may hold lone surrogates, which UTF-8 cannot encode.
  files.write(path, text.encode(errors='replace'))
  return path


def render(
  title: str,
  lead: str,
  sections: Sequence[tuple[str, Sequence[markup.Html]]],
) -> markup.Html:
  """A whole page.

  Its policy lets nothing be loaded and no script run but the page's own, so
  that even what escaped the escaping would stay dead.

  Args:
    title: of the page.
    lead: a sentence under it.
    sections: heading and content; those without content are left out.
  """
  style, script = (
    (_HERE / f'page.{kind}').read_text(encoding='utf-8')
    for kind in ('css', 'js')
  )
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
    tag('link', rel='icon', href='data:,'),  # or a browser asks for one
    tag('style', markup.Html(style)),
  )
  links = (tag('a', name, href=f'#{name.lower()}') for name, _ in shown)
  body = tag(
    'body',
    tag('header', tag('h1', title), tag('p', lead), tag('nav', *links)),
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
    tag('script', markup.Html(script)),
  )
  return join(
    markup.Html('<!doctype html>'), tag('html', head, body, lang='en')
  )


def _digest(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'


def standing(run: folder.Run) -> str:
  """How far a run is, in a sentence."""
  if not run.rounds:
    emulated = (run.folder / 'metrics.jsonl').exists()
    return 'No round yet.' if emulated else 'A process of a network.'
  last, planned = run.rounds[-1].round, run.get('rounds')
  text = f'{last:,} of {planned:,} rounds' if planned else f'{last:,} rounds'
  if planned and last < planned:
    text += ': stopped, or under way when this page was made'
  return f'{text}. All nodes on one host, in simulated time.'


def facts(run: folder.Run) -> list[tuple[str, str, str]]:
  """The numbers of a run: what, how much, and a word on it."""
  found = []
  if run.evaluations:
    last = run.evaluations[-1]
    found.append(
      (
        'held-out loss',
        f'{last.nats_per_byte:.4f}',
        f'nats a byte; {last.bits_per_byte:.4f} bits a byte, '
        f'{last.loss:.4f} nats a token',
      )
    )
  if not run.rounds:
    return found
  last = run.rounds[-1]
  found.append(
    ('training loss', f'{last.loss:.4f}', 'nats a token, last round')
  )
  found.append(
    (
      'tokens',
      progress.human_count(last.tokens),
      f'by {len(last.uids)} miners in the last round',
    )
  )
  if run.num_params:
    found.append(('parameters', f'{run.num_params:,}', 'of the model'))
  ratio = f'{last.compression_ratio:.1f}x less than fp32, last round'
  found.append(('bytes sent', progress.human_bytes(last.bytes_up), ratio))
  if run.payload_bytes:
    size = progress.human_bytes(run.payload_bytes)
    found.append(('a payload', size, 'mean of the last round'))
  blocks = run.get('phases.round_blocks')
  if blocks and run.get('network.block_seconds'):
    seconds = run.seconds(blocks * last.round)
    found.append(
      (
        'simulated time',
        progress.human_seconds(seconds),
        f'{last.round:,} rounds of {blocks} blocks of '
        f'{run.get("network.block_seconds"):g} s',
      )
    )
  trained = sum(r.seconds for r in run.rounds)
  evaluated = sum(e.seconds for e in run.evaluations)
  found.append(
    (
      'measured time',
      progress.human_seconds(trained + evaluated),
      f'of this host, {progress.human_seconds(evaluated)} of it evaluation',
    )
  )
  return found


def _tiles(found: Sequence[tuple[str, str, str]]) -> list[markup.Html]:
  tiles = (
    tag('div', tag('dt', what), tag('dd', value), tag('dd', more))
    for what, value, more in found
  )
  return [tag('dl', *tiles, class_='tiles')] if found else []
