"""The tables, verdicts and the figure of experiments/gauntlet.py."""

import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib import figure

from covenant.adversaries import registry
from experiments import charts
from experiments import gauntlet_pay
from experiments import study

MEANS = (
  'nats_per_byte', 'emissions', 'least_honest', 'most_adversary', 'auc',
  'banned', 'detected', 'undetected',
)  # fmt: skip
# Cells of the figure, and what they are called there.
CELLS = {
  'honest alone': '12 honest miners alone',
  'mixed': 'with 8 adversaries',
  'mixed, plain mean': 'with 8 adversaries,\na plain mean',
}
PAY = {
  'least_honest': 'the least paid honest miner',
  'most_adversary': 'the best paid adversary',
}
Row = dict[str, Any]


def tables(rows: list[Row]) -> str:
  """Returns a table of all cells, and a line per bar."""
  lines = [
    'cell | n | nats per byte | emissions of adversaries | least honest | '
    'most adversary | AUC | banned | detected | never',
  ]
  for cell in dict.fromkeys(r['cell'] for r in rows):
    of_cell = _of(rows, cell)
    means = [_mean(of_cell, column) for column in MEANS]
    lines.append(' | '.join([cell, str(len(of_cell)), *means]))
  verdicts = [f'{v.claim}: {v.outcome}, {v.measured}' for v in judge(rows)]
  return '\n'.join([*lines, '', *verdicts])


def alone_table(rows: list[Row], paid: Sequence[gauntlet_pay.Row]) -> str:
  """Returns Markdown: a row per kind of adversary that ran without others.

  Pay is per unit of work, over that of the mean honest miner with full work;
  all but strategies are said to do as much work as that. Harm is the share by
  which the final loss is above that of the honest ones without them. Rows are
  those of the present rule of pay; single strategies have none. The error of
  pay is a standard error, by the relative spread of honest pay in that run.

  Args:
    rows: those of the table of runs.
    paid: the pay of all uids of these runs.
  """
  rule = study.rule()
  of = {
    r['cell']: r for r in rows if r['rule'] == rule and str(r['seed']) == '0'
  }
  lines = [
    '| | four: harm | paid | deployed | since round | '
    'one: harm | paid | deployed | pay at most 1.05, harm at most 1 % |',
    '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |',
  ]
  for kind in registry.ADVERSARIES:
    if kind not in of:
      continue
    columns, met = [], True
    for cell in (kind, f'one {kind}'):
      if cell not in of:
        columns += [''] * 3
        continue
      loss, usual = (float(of[c]['nats_per_byte']) for c in (cell, 'nobody'))
      in_cell = [p for p in paid if (p.cell, p.rule) == (cell, rule)]
      ours, error, theirs = _per_work(in_cell, kind)
      columns.append(f'{loss / usual - 1:+.1%}')
      columns += [f'{ours:.2f} ± {error:.2f}', f'{theirs:.2f}']
      if cell == kind:
        columns.append(of[cell]['detected'] or '-')
      met = met and ours <= 1.05 and loss / usual <= 1.01
    outcome = 'met' if met else '**missed**'
    lines.append(f'| {kind} | {" | ".join(columns)} | {outcome} |')
  return '\n'.join(lines)


def _per_work(
  paid: Sequence[gauntlet_pay.Row], kind: str
) -> tuple[float, float, float]:
  """Returns the pay of a kind per unit of work: ours, its error, deployed."""
  strategy = registry.STRATEGIES.get(kind)
  work = strategy.cost if strategy else 1.0
  own = [p for p in paid if p.kind == kind]
  honest = [p.paid for p in paid if p.kind == 'honest']
  spread = statistics.stdev(honest) / statistics.mean(honest)
  spread *= (1 / len(own) + 1 / len(honest)) ** 0.5
  ours = statistics.mean(p.paid for p in own) / work
  theirs = statistics.mean(p.deployed for p in own) / work
  return ours, spread * ours, theirs


def _of(rows: list[Row], cell: str) -> list[Row]:
  """Returns the rows of a cell by the rule of pay that has most of them."""
  by_rule: dict[str, list[Row]] = {study.rule(): []}
  for row in rows:
    if row['cell'] == cell:
      by_rule.setdefault(row['rule'], []).append(row)
  return max(by_rule.values(), key=len)


def _mean(rows: list[Row], column: str) -> str:
  values = [float(r[column]) for r in rows if r.get(column) not in ('', None)]
  return f'{statistics.mean(values):.4g}' if values else '-'


def judge(rows: list[Row]) -> Iterator[study.Verdict]:
  """Yields a verdict per bar, UNDECIDED for those that were not measured.

  Bars that were not measured by the present rule of pay are judged by the rows
  of an earlier one, and say so.
  """
  present = [row for row in rows if row['rule'] == study.rule()]
  before = [row for row in rows if row['rule'] != study.rule()]
  for now, then in zip(_judge(present), _judge(before), strict=True):
    if now.outcome == 'UNDECIDED' and then.outcome != 'UNDECIDED':
      yield then._replace(measured=f'{then.measured}, by an earlier rule')
    else:
      yield now


def _judge(rows: list[Row]) -> Iterator[study.Verdict]:
  """Yields a verdict per bar from the rows of one rule of pay."""
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
    'on every seed at least 0.995',
    mixed_values('auc'), min, lambda x: x >= 0.995, '{:.4f}',
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


def draw(rows: list[Row], path: pathlib.Path) -> None:
  """Draws the final losses, and the pay under the mix of adversaries.

  Args:
    rows: the rows of the table; those of missing cells leave a gap.
    path: the PNG to write.
  """
  fig = figure.Figure(figsize=(10, 3.2), dpi=150, layout='constrained')
  left, right = fig.subplots(1, 2, width_ratios=(3, 2))
  for i, cell in enumerate(CELLS):
    losses = [float(r['nats_per_byte']) for r in _of(rows, cell)]
    left.plot(losses, [i] * len(losses), **_marks(i))
    if losses:
      left.plot([statistics.mean(losses)], [i], 'k|', ms=24)
  left.set(
    xlabel='final held-out loss (nats per byte); lines: means of seeds',
    ylim=(len(CELLS) - 0.5, -0.5),
  )
  left.set_yticks(range(len(CELLS)), [*CELLS.values()])
  mixed = _of(rows, 'mixed')
  seeds = [int(r['seed']) for r in mixed]
  for i, (column, label) in enumerate(PAY.items()):
    pay = [100 * float(r[column]) for r in mixed]
    right.plot(seeds, pay, label=label, **_marks(i))
  right.set(
    xlabel='seed; second half of the rounds',
    ylabel='% of the pay',
  )
  right.set_xticks(seeds)
  right.margins(0.2)
  right.legend(fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1.0))
  for ax in (left, right):
    ax.grid(color='#E0E0E0', lw=0.6)
    ax.set_axisbelow(True)
  fig.savefig(path, metadata={'Software': None})


def _marks(index: int) -> dict[str, Any]:
  """Returns the look of marks without a line, which differ in gray, too."""
  return charts.style(index) | {'linestyle': 'none', 'ms': 7}
