"""The members of a network of processes, as one table."""

from collections.abc import Sequence
from typing import TextIO

from covenant.emulate import localnet

_HEADER = ('member', 'doing', 'round', 'loss', 'stake', 'weight', 'restarts')
_ERROR_WIDTH = 60


def table(sights: Sequence[localnet.Sight]) -> str:
  """Returns one line per member, then the last errors."""
  rows = [_HEADER]
  errors = []
  for sight in sights:
    status = sight.status
    loss = status.get('loss')
    rows.append(
      (
        sight.member.name,
        status.get('phase', 'starting'),
        str(status.get('round', '')),
        '' if loss is None else f'{loss:.3f}',
        f'{sight.stake:.0f}' if sight.stake else '',
        f'{sight.weight:.3f}' if sight.weight else '',
        str(sight.restarts or ''),
      )
    )
    if status.get('error'):
      text = status['error']
      if len(text) > _ERROR_WIDTH:
        text = text[: _ERROR_WIDTH - 3] + '...'
      errors.append(f'  {sight.member.name}: {text}')
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in rows
  ]
  if errors:
    lines += ['last errors:', *errors]
  return '\n'.join(line.rstrip() for line in lines)


class Screen:
  """Shows the table in place on a terminal, or one line per round in a log.

  Args:
    stream: output, such as stderr.
  """

  def __init__(self, stream: TextIO):
    self._stream = stream
    self._lines = 0
    self._round: object = None

  def show(self, sights: Sequence[localnet.Sight]) -> None:
    if self._stream.isatty():
      text = table(sights)
      up = f'\x1b[{self._lines}F\x1b[J' if self._lines else ''
      print(up + text, file=self._stream, flush=True)
      self._lines = text.count('\n') + 1
      return
    rounds = [s.status.get('round') for s in sights]
    known = [r for r in rounds if r is not None]
    if known and min(known) != self._round:
      self._round = min(known)
      losses = [s.status['loss'] for s in sights if 'loss' in s.status]
      loss = f', mean loss {sum(losses) / len(losses):.3f}' if losses else ''
      print(
        f'round {self._round}: {len(known)} of {len(rounds)} members{loss}',
        file=self._stream,
        flush=True,
      )
