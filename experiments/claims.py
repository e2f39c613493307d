"""A table of all claims: writes docs/results.md from experiments/results/.

python -m experiments.claims     seconds
"""

import csv
import pathlib
import types
from collections.abc import Iterator

from experiments import aggregation
from experiments import arithmetic
from experiments import churn
from experiments import compression
from experiments import density
from experiments import gauntlet_report
from experiments import islands
from experiments import methods
from experiments import muon
from experiments import overlap
from experiments import peers
from experiments import pools
from experiments import quantizers
from experiments import study
from experiments import transformations

PAGE = study.ROOT.parent / 'docs' / 'results.md'
BEGIN, END = '<!-- claims -->\n', '<!-- end of claims -->\n'
STUDIES: tuple[types.ModuleType, ...] = (
  methods,
  compression,
  density,
  aggregation,
  churn,
  peers,
  muon,
  quantizers,
  islands,
  transformations,
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
  for verdict in arithmetic.judge():
    yield 'arithmetic', 0.0, verdict


def table() -> str:
  lines = [
    '| claim | says | source | criterion | measured | verdict | '
    '`python -m experiments.` | core minutes |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for name, minutes, v in verdicts():
    lines.append(
      f'| {v.claim} | {v.says} | {v.source} | {v.criterion} | {v.measured} | '
      f'**{v.outcome}** | `{name}` | {minutes:.0f} |'
    )
  return '\n'.join(lines) + '\n'


def page() -> str:
  """Returns docs/results.md with the table made anew."""
  text = PAGE.read_text(encoding='utf-8')
  head, rest = text.split(BEGIN)
  _, tail = rest.split(END)
  return head + BEGIN + table() + END + tail


def write(path: pathlib.Path = PAGE) -> None:
  path.write_text(page(), encoding='utf-8')


if __name__ == '__main__':
  write()
  print(table())
