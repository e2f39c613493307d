"""The site: README, docs, notebooks and the API, in one.

sphinx-build -W --keep-going -c docs . build/site
"""

import fnmatch
import pathlib
import re
import sys

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))
import covenant  # noqa: E402  the checkout's

project = 'covenant'
author = 'The covenant authors'
release = covenant.__version__

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]
# Links between pages stay what they are on a code host, relative to a file, so
# the sources are the whole checkout; these of it are pages.
root_doc = 'README'
include_patterns = [
  'README.md',
  'AGENTS.md',
  'CHANGELOG.md',
  'CONTRIBUTING.md',
  'docs/*.md',
  'docs/*.rst',
  'experiments/results/*.md',
  'notebooks/*.ipynb',
]
default_role = 'literal'  # `name` is code, as in Markdown

nb_execution_mode = 'off'  # tests run them; their outputs are stored
myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_heading_anchors = 3
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80
html_theme = 'furo'
html_title = 'covenant'

_SECTIONS = ('Args:', 'Attributes:', 'Raises:', 'Returns:', 'Yields:')
# Pages that are not named here come last.
_PAGES = {
  'Start': [
    'docs/why',
    'docs/install',
    'docs/sparseloco',
    'docs/python',
    'docs/api',
  ],
  'Run': [
    'docs/operating',
    'docs/clusters',
    'docs/data',
    'docs/huggingface',
    'docs/islands',
    'docs/scale',
  ],
  'Understand': [
    'docs/architecture',
    'docs/glossary',
    'docs/protocol',
    'docs/gauntlet',
    'docs/reliability',
    'docs/security',
    'docs/results',
    'docs/report',
    'docs/claims',
    'docs/benchmarks',
  ],
  'Notebooks': ['notebooks/*'],
  'Develop': [
    'docs/extending',
    'CONTRIBUTING',
    'AGENTS',
    'docs/releasing',
    'CHANGELOG',
  ],
}


def _add_contents(app, name, source):
  """Appends the table of contents to the README, where code hosts need none."""
  if name != root_doc:
    return
  rest = sorted(app.env.found_docs - {root_doc})
  groups = {}
  for caption, names in _PAGES.items():
    groups[caption] = [
      page for pattern in names for page in fnmatch.filter(rest, pattern)
    ]
  named = {page for pages in groups.values() for page in pages}
  groups['More'] = [page for page in rest if page not in named]
  for caption, pages in groups.items():
    paths = '\n'.join(f'/{page}' for page in pages)
    source[0] += (
      f'\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{paths}\n```\n'
    )


def _read_as_text(app, what, name, item, options, lines):
  """Marks up a docstring, which is text: no character of it is a command.

  Indented blocks outside of the sections of Google's style are code.
  """
  del app, what, name, item, options
  marked = []
  in_section = in_list = in_block = in_example = False
  for line in lines:
    text = line.strip()
    in_example = bool(text) and (in_example or text.startswith('>>>'))
    if text and not line.startswith(' '):
      if in_block:
        marked.append('')
      in_block = False
      in_section = text in _SECTIONS
      in_list = bool(re.match(r'([-*]|\d+\.) ', text))
    elif text and not (in_section or in_list or in_block or in_example):
      marked += ['', '::', '']
      in_block = True
    if not (in_block or in_example):
      pieces = re.split(r'(`[^`]*`)', line)  # code at odd places
      pieces[::2] = [re.sub(r'([*|\\])', r'\\\1', p) for p in pieces[::2]]
      line = ''.join(pieces)
    marked.append(line)
  lines[:] = marked


def _write_index(app, error):
  """Leads from the root of the site to the README."""
  if error is None and app.builder.format == 'html':
    (pathlib.Path(app.outdir) / 'index.html').write_text(
      '<!doctype html><meta charset="utf-8"><title>covenant</title>'
      '<meta http-equiv="refresh" content="0; url=README.html">'
      '<a href="README.html">covenant</a>\n',
      encoding='utf-8',
    )


def setup(app):
  # Before napoleon, which reads the sections.
  app.connect('autodoc-process-docstring', _read_as_text, priority=400)
  app.connect('source-read', _add_contents)
  app.connect('build-finished', _write_index)
