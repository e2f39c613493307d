"""The pages of all claims, from experiments/results/.

python -m experiments.claims     seconds

Writes docs/claims.md, a row per claim, and in docs/results.md the summary and
the figures of each group of claims.
"""

import collections
import csv
import math
import types
from collections.abc import Iterator
from typing import NamedTuple

from experiments import aggregation
from experiments import arithmetic
from experiments import best_response
from experiments import byzantine
from experiments import churn
from experiments import compression
from experiments import density
from experiments import gauntlet_report
from experiments import horizons
from experiments import islands
from experiments import joining
from experiments import methods
from experiments import muon
from experiments import overlap
from experiments import overlap_density
from experiments import peer_counts
from experiments import peers
from experiments import pools
from experiments import quantizers
from experiments import recipe
from experiments import recipe_larger
from experiments import recipe_muon
from experiments import recipe_parts
from experiments import size
from experiments import skipping
from experiments import study
from experiments import transformations

PAGE = study.ROOT.parent / 'docs' / 'results.md'
ROWS = study.ROOT.parent / 'docs' / 'claims.md'
OUTCOMES = 'PASS', 'UNDECIDED', 'FAIL'
BEGIN, END = '<!-- claims -->\n', '<!-- end of claims -->\n'
STUDIES: tuple[types.ModuleType, ...] = (
  recipe,
  recipe_muon,
  recipe_parts,
  recipe_larger,
  methods,
  horizons,
  size,
  compression,
  density,
  aggregation,
  churn,
  joining,
  peers,
  peer_counts,
  muon,
  quantizers,
  islands,
  skipping,
  overlap_density,
  transformations,
  byzantine,
)


class Group(NamedTuple):
  """Claims about one subject."""

  title: str
  studies: tuple[str, ...]  # names of modules
  figures: dict[str, str]  # file in experiments/results: what it shows
  finding: str


GROUPS = (
  Group(
    'A thousandth of the bytes',
    ('recipe', 'recipe_parts', 'recipe_muon', 'recipe_larger'),
    {
      'recipe': 'Held-out loss of synchronous AdamW and of the recipe',
      'recipe_parts': 'Final loss with one part of the recipe undone',
      'recipe_muon': 'Held-out loss with synchronous Muon beside them',
      'recipe_larger': 'Held-out loss of both at 0.8 M parameters',
    },
    'Six inner steps per round, an error decay that forgets in a few rounds '
    'and one bit per value send a thousandth of what synchronous AdamW sends, '
    'and end 0.7 % above it in the mean, undecided by seven seeds '
    '([report.md](report.md#the-recipe)).',
  ),
  Group(
    'Against other methods',
    ('methods', 'horizons', 'transformations', 'muon', 'size'),
    {
      'transformations': 'Held-out loss of seven methods against tokens and '
      'bytes, and at the end',
      'methods': 'Held-out loss of SparseLoCo, DiLoCo and AdamW',
      'horizons': 'Final loss against the inner steps, rates tuned at each',
      'muon': 'Held-out loss with AdamW and with Muon as inner optimizer',
      'size': 'Loss of SparseLoCo over AdamW against the number of parameters',
    },
    'At 15 steps per round SparseLoCo ends below DiLoCo with a two-hundredth '
    'of its bytes, and a little above AdamW on every gradient, the less so the '
    'larger the model and the more rounds. With more steps per round it must '
    'send more values.',
  ),
  Group(
    'What is sent',
    ('compression', 'density', 'quantizers'),
    {
      'compression': 'Held-out loss of nine compressors',
      'density': 'Final loss against the share of values sent, by momentum',
      'quantizers': 'Final loss of five quantizers against the outer rate',
    },
    'One bit per value is enough, if it is one of the largest. Momentum on top '
    'of error feedback hurts. An error decay of 0.8 ends well below the '
    'published 0.95. With tuned rates, error feedback at 0.95 and the choice '
    'of the quantizer matter less than claimed.',
  ),
  Group(
    'Peers',
    ('aggregation', 'churn', 'joining', 'peers', 'peer_counts'),
    {
      'aggregation': 'Held-out loss of means over senders and over all peers',
      'churn': 'Held-out loss with peers that stay and that come and go',
      'joining': 'Final loss of miners that lose state, over those that do not',
      'peers': 'Final loss against the number of peers',
      'peer_counts': 'Final loss of 1 to 32 peers, each number tuned',
    },
    'Peers that come and go cost nothing that seeds can tell, nor do joiners '
    'without moments and error. All peers must not lose them in every round. '
    'More peers with smaller batches cost much.',
  ),
  Group(
    'Islands and pools',
    ('islands', 'skipping', 'overlap_density'),
    {
      'islands': 'Final loss against the compression between stages',
      'skipping': 'Loss with failing stages that are bypassed or waited for',
      'overlap_density': 'Final loss of late exchanges, by share of values',
    },
    'Unequal hardware trains together at a small loss if the slow part '
    'compresses between its stages and the fast part does not. The gain in '
    'time is below its bar.',
  ),
  Group(
    'Gauntlet',
    ('gauntlet', 'overlap', 'byzantine', 'best_response'),
    {
      'gauntlet': 'Final loss and pay with 40 % adversaries',
      'overlap': 'Share of indices that pairs of honest peers have in common',
      'byzantine': 'Final loss of five rules of aggregation under attacks',
      'best_response': 'Pay against work of all strategies that were tried',
    },
    'Under attack by 40 % the model is as good as with the honest alone, and '
    'honest miners are paid alike. An adversary that is mostly honest is paid '
    'as one. No strategy is paid much more per unit of work than honesty. '
    'Rules of the literature fit dense gradients, and fail on sparse messages.',
  ),
  Group(
    'Formulas',
    ('arithmetic',),
    {},
    'Bytes and times are what the papers report.',
  ),
)


def runs_of(module: types.ModuleType) -> list[study.Run]:
  """Returns the committed runs of a study; none if it never ran."""
  path = study.RESULTS / f'{module.STUDY.name}.csv'
  return study.read_csv(path, study.Run) if path.exists() else []


def verdicts() -> Iterator[tuple[str, float, study.Verdict]]:
  """Yields (module, core minutes of its runs, verdict)."""
  for module in STUDIES:
    runs = runs_of(module)
    minutes = sum(run.seconds for run in runs) / 60
    for verdict in module.STUDY.judge(runs, study.RESULTS) if runs else ():
      yield module.STUDY.name, minutes, verdict
  path = study.RESULTS / 'pools.csv'
  trials = study.read_csv(path, pools.Row) if path.exists() else []
  for verdict in pools.judge(trials):
    minutes = sum(row.seconds for row in trials) / 60
    yield 'islands', minutes, verdict
  with open(study.RESULTS / 'gauntlet.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  minutes = sum(float(row['seconds'] or 0) for row in rows) / 60
  for verdict in gauntlet_report.judge(rows):
    yield 'gauntlet', minutes, verdict
  path = study.RESULTS / 'overlap.csv'
  shares = study.read_csv(path, overlap.Row) if path.exists() else []
  minutes = sum({row.seed: row.seconds for row in shares}.values()) / 60
  for verdict in overlap.judge(shares):
    yield 'overlap', minutes, verdict
  path = study.RESULTS / 'best_response.csv'
  tried = study.read_csv(path, best_response.Row) if path.exists() else []
  for verdict in best_response.judge(tried):
    yield 'best_response', math.nan, verdict  # its rows have no times
  for verdict in arithmetic.judge():
    yield 'arithmetic', 0.0, verdict


def table(group: Group) -> str:
  """Returns a row per claim of a group."""
  lines = [
    '| claim | says | source | criterion | measured | verdict | '
    '`python -m experiments.` | core minutes |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for name, minutes, v in verdicts():
    if name in group.studies:
      cost = 'not noted' if math.isnan(minutes) else f'{minutes:.0f}'
      lines.append(
        f'| {v.claim} | {v.says} | {v.source} | {v.criterion} | {v.measured} | '
        f'**{v.outcome}** | `{name}` | {cost} |'
      )
  return '\n'.join(lines) + '\n'


def summary() -> str:
  """Returns a row per group, then its figures and the claims that failed."""
  found = list(verdicts())
  lines = [
    f'| subject | finding | {" | ".join(OUTCOMES)} |',
    '| --- | --- | ---: | ---: | ---: |',
  ]
  sections = []
  for group in GROUPS:
    of = [v for name, _, v in found if name in group.studies]
    counts = collections.Counter(v.outcome for v in of)
    numbers = ' | '.join(str(counts[outcome]) for outcome in OUTCOMES)
    anchor = group.title.lower().replace(' ', '-')
    lines.append(
      f'| [{group.title}](#{anchor}) | {group.finding} | {numbers} |'
    )
    sections += ['', f'## {group.title}', '', group.finding]
    for name, alt in group.figures.items():
      if not (study.RESULTS / f'{name}.png').exists():
        continue
      sections += ['', f'![{alt}](../experiments/results/{name}.png)']
    failed = [v for v in of if v.outcome == 'FAIL']
    if failed:
      sections += ['', 'Not as claimed:', '']
      sections += [f'- {v.claim}: {v.says}. {v.measured}.' for v in failed]
    sections += ['', f'[All criteria and numbers](claims.md#{anchor}).']
  total = collections.Counter(v.outcome for _, _, v in found)
  numbers = ' | '.join(f'**{total[outcome]}**' for outcome in OUTCOMES)
  lines.append(f'| all | | {numbers} |')
  return '\n'.join([*lines, *sections]) + '\n'


def rows() -> str:
  """Returns docs/claims.md."""
  parts = [
    '# All claims\n\nWritten by `python -m experiments.claims`; '
    '[results.md](results.md) sums them up, and says what the columns and '
    'verdicts mean.\n'
  ]
  parts += [f'## {group.title}\n\n{table(group)}' for group in GROUPS]
  return '\n'.join(parts)


def page() -> str:
  """Returns docs/results.md with the summary made anew."""
  text = PAGE.read_text(encoding='utf-8')
  head, rest = text.split(BEGIN)
  _, tail = rest.split(END)
  return head + BEGIN + summary() + END + tail


def write() -> None:
  PAGE.write_text(page(), encoding='utf-8')
  ROWS.write_text(rows(), encoding='utf-8')


if __name__ == '__main__':
  write()
  print(summary())
