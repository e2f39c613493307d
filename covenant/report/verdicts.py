"""Tables of a validator's findings, and of a process's events."""

import datetime
from collections.abc import Mapping, Sequence

from covenant.gauntlet import checks
from covenant.gauntlet import findings
from covenant.report import folder
from covenant.report import markup

tag = markup.tag
_ROWS = 400  # rows of a table, at most
_RANGES = 40  # ranges of rounds in a cell, at most
_MARKS = 180  # marks of a timeline, at most: about one per pixel
_CHARACTERS = 200  # characters of a text from a peer, at most
_PENALTY = 'PENALTY'
_MEANING = {
  **{verdict.name: verdict.value for verdict in checks.CheckFinding},
  _PENALTY: 'valid, but paid less: a penalty lasts',
}


def refused(run: folder.Run) -> list[markup.Html]:
  """Returns a table of refusals and penalties by miner and reason."""
  if not run.verdicts:
    return []
  found: dict[tuple[int, str], dict[int, str]] = {}
  for index, verdict in sorted(run.verdicts.items()):
    for d in verdict['decisions']:
      reason, detail = d['verdict'], d['detail']
      if reason in findings.VALID_NAMES:
        if d['after']['penalty'] >= 1:
          continue
        reason, detail = _PENALTY, '; '.join(d['reasons'])
      found.setdefault((d['uid'], reason), {})[index + 1] = detail
  judged = f'{len(run.verdicts):,} rounds'
  if not found:
    return [tag('p', f'No miner was refused or penalized in {judged}.')]
  last = max(run.verdicts) + 1
  per_mark = (last - 1) // _MARKS + 1
  rows = [
    (
      _name(uid, run.cast),
      reason,
      _MEANING.get(reason, ''),
      str(len(by_round)),
      markup.strip(
        (
          (r, r + per_mark)
          for r in {(i - 1) // per_mark * per_mark for i in by_round}
        ),
        last - 1 + per_mark,
      ),
      _ranges(list(by_round)),
      _clip(list(by_round.values())[-1]),
    )
    for (uid, reason), by_round in sorted(found.items())
  ]
  note = (
    f'{len({uid for uid, _ in found})} of the miners were refused or penalized '
    f'in {judged}. The timelines end at round {last}.'
  )
  if per_mark > 1:
    note += f' A mark may stand for up to {per_mark} rounds.'
  if run.uid is not None:
    note += f' The validator is uid {run.uid}.'
  if run.unreadable:
    note += f' Torn lines that were skipped: {run.unreadable}.'
  head = (
    'miner', 'reason', 'meaning', 'times', 'when', 'rounds', 'last detail'
  )  # fmt: skip
  title = 'Miners refused or penalized, by reason and round'
  return [_table('refusals', title, head, rows, note)]


def miners(run: folder.Run) -> list[markup.Html]:
  """Returns a table of every miner's state after the last verdict."""
  valid: dict[int, list[bool]] = {}
  latest: dict[int, folder.JsonObject] = {}
  for _, verdict in sorted(run.verdicts.items()):
    for d in verdict['decisions']:
      latest[d['uid']] = d
      is_valid = d['verdict'] in findings.VALID_NAMES
      valid.setdefault(d['uid'], []).append(is_valid)
  if not latest:
    return []
  rows = [
    (
      _name(uid, run.cast),
      f'{d.get("weight") or 0.0:.4f}',
      f'{d["after"]["score"]:.3f}',
      f'{d["after"]["rating"]:.1f}',
      f'{d["after"]["penalty"]:.3g}',
      f'{sum(valid[uid])} of {len(valid[uid])}',
      _clip('; '.join(d['reasons'])),
      _clip(d['hotkey']),
    )
    for uid, d in sorted(latest.items())
  ]
  head = (
    'miner', 'weight', 'score', 'rating', 'penalty', 'valid', 'last reasons',
    'hotkey',
  )  # fmt: skip
  return [
    _table(
      'standing', f'Miners after round {max(run.verdicts) + 1}', head, rows
    )
  ]


def process(run: folder.Run) -> list[markup.Html]:
  """Returns tables of the actions of a network's process and their errors."""
  if not run.events:
    return []
  counts: dict[str, list[int]] = {}
  errors = []
  for event in run.events:
    counts.setdefault(str(event['what']), [0, 0])[bool(event['error'])] += 1
    if event['error']:
      when = datetime.datetime.fromtimestamp(event['time'], datetime.UTC)
      errors.append(
        (
          f'{when:%Y-%m-%d %H:%M:%S}',
          str(event['round'] + 1) if 'round' in event else '',
          str(event['what']),
          _clip(str(event['error'])),
        )
      )
  took = run.events[-1]['time'] - run.events[0]['time']
  rows = [(what, f'{n:,}', f'{bad:,}') for what, (n, bad) in counts.items()]
  title = f'Actions in {took:,.0f} measured seconds'
  parts = [_table('events', title, ('action', 'done', 'failed'), rows)]
  if errors:
    head = ('UTC', 'round', 'action', 'error')
    parts.append(_table('errors', 'Failed actions', head, errors[::-1]))
  return parts


def _table(
  key: str,
  title: str,
  head: tuple[str, ...],
  rows: Sequence[tuple[str, ...]],
  note: str = '',
) -> markup.Html:
  if len(rows) > _ROWS:
    note += f' {len(rows) - _ROWS:,} more rows are left out.'
  return tag(
    'div',
    tag('h3', title),
    markup.table(head, list(rows[:_ROWS]), title),
    tag('p', note.strip(), class_='note'),
    class_='wide',
    id=key,
  )


def _ranges(numbers: Sequence[int]) -> str:
  """Returns rising integers as ranges, only the last ones if many.

  >>> _ranges([1, 2, 3, 7])
  '1-3, 7'
  """
  runs: list[list[int]] = []
  for number in numbers:
    if runs and runs[-1][1] == number - 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  words = [f'{a}-{b}' if a < b else f'{a}' for a, b in runs]
  return ', '.join(
    words if len(words) <= _RANGES else ['...', *words[-_RANGES:]]
  )


def _name(uid: int, cast: Mapping[int, str]) -> str:
  return f'{uid}: {cast[uid]}' if uid in cast else str(uid)


def _clip(text: str) -> str:
  return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + '...'
