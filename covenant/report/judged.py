"""What a validator found: who was refused and why, and how each stands."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from covenant.gauntlet import checks
from covenant.report import folder
from covenant.report import lanes
from covenant.report import markup
from covenant.report import scale

tag = markup.tag
_ROWS = 400  # of a table, at most
_LANES = 40  # of the figure
_CHARACTERS = 200  # of what a peer may have written
_VALID = checks.Verdict.VALID.name
_PENALTY = 'PENALTY'
_MEANING = {
  **{verdict.name: verdict.value for verdict in checks.Verdict},
  _PENALTY: 'valid, but paid less: a penalty lasts',
}


def refused(run: folder.Run) -> list[markup.Html]:
  """A figure and a table of refusals and penalties by miner and reason."""
  if not run.verdicts:
    return []
  found: dict[int, dict[str, dict[int, str]]] = {}
  for index, verdict in sorted(run.verdicts.items()):
    for d in verdict['decisions']:
      reason, detail = d['verdict'], d['detail']
      if reason == _VALID:
        if d['after']['penalty'] >= 1:
          continue
        reason, detail = _PENALTY, '; '.join(d['reasons'])
      of_one = found.setdefault(d['uid'], {})
      of_one.setdefault(reason, {})[index] = detail
  judged = f'{len(run.verdicts):,} rounds'
  if not found:
    return [tag('p', f'Nobody was refused or penalized in {judged}.')]
  cast = run.cast
  order = sorted(found, key=lambda u: (-sum(map(len, found[u].values())), u))
  shown = sorted(order[:_LANES])
  note = (
    f'{len(found)} of the miners were refused or penalized in {judged}. Rounds '
    'count from 0, as in verdicts.jsonl and --role=explain.'
  )
  if len(order) > _LANES:
    note += f' Drawn are the {_LANES} who were refused most.'
  figure = lanes.refusals(
    'refusals',
    'Who was refused or penalized, and when',
    note + _whose(run),
    {
      _who(uid, cast): {r: list(by) for r, by in found[uid].items()}
      for uid in shown
    },
    max(run.verdicts),
  )
  rows = [
    (
      _who(uid, cast),
      reason,
      _MEANING.get(reason, ''),
      str(len(by_round)),
      scale.ranges(list(by_round)),
      _clip(list(by_round.values())[-1]),
    )
    for uid in sorted(order[:_ROWS])
    for reason, by_round in found[uid].items()
  ]
  head = ('miner', 'reason', 'meaning', 'times', 'rounds', 'found at last')
  return [figure, _table('refused-table', 'Why they were', head, rows)]


def miners(run: folder.Run) -> list[markup.Html]:
  """How each miner stands after the last verdict."""
  if not run.verdicts:
    return []
  valid: dict[int, int] = {}
  rounds: dict[int, int] = {}
  latest: dict[int, Mapping[str, Any]] = {}
  for _, verdict in sorted(run.verdicts.items()):
    for d in verdict['decisions']:
      uid = d['uid']
      latest[uid] = d
      rounds[uid] = rounds.get(uid, 0) + 1
      valid[uid] = valid.get(uid, 0) + (d['verdict'] == _VALID)
  cast = run.cast
  rows = [
    (
      _who(uid, cast),
      f'{d.get("weight") or 0.0:.4f}',
      f'{d["after"]["score"]:.3f}',
      f'{d["after"]["rating"]:.1f}',
      f'{d["after"]["penalty"]:.3g}',
      f'{valid[uid]} of {rounds[uid]}',
      _clip('; '.join(d['reasons'])),
      _clip(d['hotkey']),
    )
    for uid, d in sorted(latest.items())
  ]
  head = (
    'miner', 'weight', 'score', 'rating', 'penalty', 'valid', 'last reasons',
    'hotkey',
  )  # fmt: skip
  title = f'Standing after round {max(run.verdicts)}'
  return [_table('standing', title, head, rows)]


def process(run: folder.Run) -> list[markup.Html]:
  """What a process of a network did, and could not do."""
  if not run.events:
    return []
  counts: dict[str, list[int]] = {}
  errors = []
  for event in run.events:
    of_one = counts.setdefault(str(event['what']), [0, 0])
    of_one[bool(event['error'])] += 1
    if event['error']:
      when = datetime.datetime.fromtimestamp(event['time'], datetime.UTC)
      errors.append(
        (
          f'{when:%Y-%m-%d %H:%M:%S}',
          str(event.get('round', '')),
          str(event['what']),
          _clip(str(event['error'])),
        )
      )
  took = run.events[-1]['time'] - run.events[0]['time']
  rows = [(what, f'{n:,}', f'{bad:,}') for what, (n, bad) in counts.items()]
  title = f'What it did, in {took:,.0f} measured seconds'
  parts = [_table('events', title, ('what', 'done', 'failed'), rows)]
  if errors:
    head = ('UTC', 'round', 'what', 'error')
    parts.append(_table('errors', 'What failed', head, errors[::-1]))
  return parts


def _table(
  key: str,
  title: str,
  head: tuple[str, ...],
  rows: Sequence[tuple[str, ...]],
) -> markup.Html:
  more = len(rows) - _ROWS
  return tag(
    'div',
    tag('h3', title),
    markup.table(head, list(rows[:_ROWS]), title),
    *([tag('p', f'{more:,} more rows are left out.')] if more > 0 else []),
    class_='wide',
    id=key,
  )


def _whose(run: folder.Run) -> str:
  text = '' if run.uid is None else f' Found by the validator of uid {run.uid}.'
  if run.unreadable:
    text += f' Torn lines, not read: {run.unreadable}.'
  return text


def _who(uid: int, cast: Mapping[int, str]) -> str:
  return f'{uid}: {cast[uid]}' if uid in cast else str(uid)


def _clip(text: str) -> str:
  return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + '...'
