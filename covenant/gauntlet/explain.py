"""The records of a validator in words, for the operator of a miner."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from covenant import files

_LINES = 10  # last rounds that get a line each


def decisions(path: pathlib.Path) -> list[Mapping[str, Any]]:
  """Reads the decisions of the first validator in a verdicts.jsonl."""
  verdicts = files.read_jsonl(path)
  first = verdicts[0].get('validator') if verdicts else None
  return [
    decision
    for verdict in verdicts
    if verdict.get('validator') == first
    for decision in verdict['decisions']
  ]


def explain(decisions: Iterable[Mapping[str, Any]], uid: int) -> str:
  """Explains the score of a uid: its standing, then its last rounds.

  Args:
    decisions: records of `rating_update.update`, oldest first, of any uids.
      Other fields are ignored, except `weight`, which is shown if present.
    uid: the uid to explain.
  """
  records = [d for d in decisions if d['uid'] == uid]
  if not records:
    return f'uid {uid}: no validator of this run has judged it.'
  last = records[-1]
  mine = [d for d in records if d['hotkey'] == last['hotkey']]
  now = last['after']
  lines = [
    f'uid {uid}, hotkey {last["hotkey"]}, after round {last["round"]}:',
    f'  score {now["score"]:.3f}' + _weight(last),
    f'  = average gain {now["gain"]:.3f} of the median peer'
    f' x penalties {now["penalty"]:.3g}'
    f' x {_ratio(now["score"], now["raw_score"]):.2f} for proof of work',
    f'  rating {now["rating"]:.1f} ({now["mu"]:.1f} - 3 x {now["sigma"]:.1f}),'
    ' which decides whether it is heard',
    f'  {sum(d["verdict"] == "VALID" for d in mine)} of {len(mine)} rounds '
    f'valid, {sum(d["evaluation"] is not None for d in mine)} evaluated',
  ]
  if len(mine) < len(records):
    lines.append('  an earlier hotkey held this uid; nothing was inherited')
  lines.append('Last rounds:')
  for d in mine[-_LINES:]:
    moved = d['after']['score'] - d['before']['score']
    why = '; '.join(d['reasons']) or 'valid, not evaluated'
    lines.append(
      f'  {d["round"]}: {d["after"]["score"]:.3f} ({moved:+.3f}) {why}'
    )
  return '\n'.join(lines)


def _weight(record: Mapping[str, Any]) -> str:
  weight = record.get('weight')
  return '' if weight is None else f', weight {weight:.4f}'


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0
