"""The tables, verdicts and the figure of experiments/gauntlet.py."""

import pathlib
import statistics
from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np
from matplotlib import figure

from experiments import charts
from experiments import study

MEANS = (
  'nats_per_byte', 'emissions', 'least_honest', 'most_adversary', 'auc',
  'banned', 'detected', 'undetected',
)  # fmt: skip
Row = dict[str, Any]


def tables(rows: list[Row]) -> str:
  """Returns a table of all cells, and a line per bar."""
  lines = [
    'cell | n | nats per byte | emissions of adversaries | least honest | '
    'most adversary | AUC | banned | detected | never',
  ]
  for cell in dict.fromkeys(r['cell'] for r in rows):
    of_cell = [r for r in rows if r['cell'] == cell]
    means = [_mean(of_cell, column) for column in MEANS]
    lines.append(' | '.join([cell, str(len(of_cell)), *means]))
  verdicts = [f'{v.claim}: {v.outcome}, {v.measured}' for v in judge(rows)]
  return '\n'.join([*lines, '', *verdicts])


def _mean(rows: list[Row], column: str) -> str:
  values = [float(r[column]) for r in rows if r.get(column) not in ('', None)]
  return f'{statistics.mean(values):.4g}' if values else '-'


def judge(rows: list[Row]) -> Iterator[study.Verdict]:
  """Yields a verdict per bar, UNDECIDED for those that were not measured."""
  by_cell: dict[str, dict[int, Row]] = {}
  for row in rows:
    by_cell.setdefault(row['cell'], {})[int(row['seed'])] = row

  def above(cell: str) -> list[float]:
    """The loss of a cell relative to that of the honest alone, per seed."""
    alone = by_cell.get('honest alone', {})
    return [
      float(row['nats_per_byte']) / float(alone[seed]['nats_per_byte']) - 1
      for seed, row in by_cell.get(cell, {}).items()
      if seed in alone
    ]

  yield _bar(
    'C14, loss',
    'under attack by 40 % the model is as good as with the honest alone',
    'in the mean at most 1 % above',
    above('mixed'), statistics.mean, lambda x: x <= 0.01, '{:+.2%}',
  )  # fmt: skip
  yield _bar(
    'C14, plain mean',
    'a plain mean under the same attack is far worse',
    'in the mean more than 5 % above',
    above('mixed, plain mean'), statistics.mean, lambda x: x > 0.05, '{:+.1%}',
  )  # fmt: skip
  yield from _judge_pay([*by_cell.get('mixed', {}).values()])
  bans = [float(r['banned']) for r in rows if r.get('banned') not in ('', None)]
  times = [
    float(row['validator_seconds'])
    for uids in (255, 63)
    for row in by_cell.get(f'crowd of {uids}, 20', {}).values()
  ]
  crowd = [times[0] / times[1]] if len(times) == 2 else []
  yield _bar(
    'C13, bans',
    'no honest uid is ever banned',
    'none in any run',
    bans, max, lambda x: x == 0, '{:.0f}',
  )  # fmt: skip
  yield _bar(
    'Crowd',
    'the cost of a validator grows with who is evaluated only',
    '256 uids, 20 evaluated: below 1.5 times that with 64',
    crowd, max, lambda x: x < 1.5, '{:.2f} times',
  )  # fmt: skip


def _judge_pay(mixed: list[Row]) -> Iterator[study.Verdict]:
  """Yields the verdicts about pay under the mix of adversaries."""

  def mixed_values(column: str) -> list[float]:
    return [float(row[column]) for row in mixed]

  gaps = [
    least - most
    for least, most in zip(
      mixed_values('least_honest'), mixed_values('most_adversary'), strict=True
    )
  ]
  yield _bar(
    'C13, emissions',
    'adversaries together are paid nearly nothing',
    'on every seed at most 1 % from half of the rounds on',
    mixed_values('emissions'), max, lambda x: x <= 0.01, '{:.2%}',
  )  # fmt: skip
  yield _bar(
    'C13, order',
    'every honest uid is paid more than every adversary',
    'on every seed a gap above 0',
    gaps, min, lambda x: x > 0, '{:+.4f}',
  )  # fmt: skip
  yield _bar(
    'C13, AUC',
    'ratings tell the honest from adversaries',
    'on every seed at least 0.99',
    mixed_values('auc'), min, lambda x: x >= 0.99, '{:.4f}',
  )  # fmt: skip


def _bar(
  claim: str,
  says: str,
  criterion: str,
  values: list[float],
  reduce: Callable[[list[float]], float],
  holds: Callable[[float], bool],
  text: str,
) -> study.Verdict:
  """Returns the verdict on a bar; UNDECIDED if there is no value.

  Args:
    claim: its number or name.
    says: the claim in words.
    criterion: the bar in words.
    values: one value per seed.
    reduce: summary of the values.
    holds: True if the summary passes.
    text: format of the summary.
  """
  if not values:
    measured, outcome = 'not measured', 'UNDECIDED'
  else:
    value = reduce(values)
    measured = f'{text.format(value)} (n = {len(values)})'
    outcome = 'PASS' if holds(value) else 'FAIL'
  source = 'Gauntlet, figure 2' if claim[:3] == 'C13' else 'Covenant-72B'
  return study.Verdict(claim, says, source, criterion, measured, outcome)


def draw(
  traces: dict[str, dict[str, Any]],
  path: pathlib.Path,
  honest: Container[str],
) -> None:
  """Draws the losses of seed 0, and the weights of its miners.

  Args:
    traces: the course of each cell (experiments/gauntlet.py).
    path: the PNG to write.
    honest: the names in the zoo of honest miners.
  """
  fig = figure.Figure(figsize=(10, 4), dpi=150, layout='constrained')
  left, right = fig.subplots(1, 2)
  for i, (name, trace) in enumerate(traces.items()):
    x, y = zip(*trace['losses'], strict=True)
    left.plot(x, y, label=name, **charts.style(i))
  left.set(xlabel='round', ylabel='held-out loss (nats per byte)')
  lasts = [trace['losses'][-1][1] for trace in traces.values()]
  if lasts:  # the ends, which differ by percents, fill the figure
    left.set_ylim(0.97 * min(lasts), 1.3 * max(lasts))
  left.legend(frameon=False, handlelength=3.5)
  left.grid(color='#E0E0E0', lw=0.6)
  right.grid(color='#E0E0E0', lw=0.6)
  if mixed := traces.get('mixed'):
    weights = mixed['weights']
    bad = {int(u): n for u, n in mixed['names'].items() if n not in honest}
    uids = sorted({int(u) for w in weights for u in w} | set(bad))
    for uid in uids:
      y = [float(w.get(str(uid), w.get(uid, 0.0))) for w in weights]
      style = (
        dict(color='#D55E00', lw=1.2, ls='--')
        if uid in bad
        else dict(color='#8C8C8C', lw=0.7)
      )
      label = 'adversaries' if uid == min(bad, default=-1) else None
      label = 'honest' if uid == uids[0] and uid not in bad else label
      right.plot(np.arange(len(y)), y, label=label, **style)
    right.legend(frameon=False)
  right.set(xlabel='round', ylabel='weight')
  fig.savefig(path, metadata={'Software': None})
