"""The live line of a run or table of a network, and the summary at the end."""

import html
import importlib
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from covenant import config as config_lib
from covenant import extras
from covenant import metrics
from covenant.emulate import localnet
from covenant.models import llama

with extras.needed('run'):
  import tqdm

# The text fits in 80 columns up to round 9999; the bar takes the rest.
_BAR = '{n_fmt}/{total_fmt} {desc} {bar}'
_MEMBERS_HEADER = (
  'member',
  'doing',
  'round',
  'loss',
  'stake',
  'weight',
  'restarts',
)
_ERROR_WIDTH = 60


def human_bytes(count: float) -> str:
  """Returns a number of bytes for people, in powers of 1000.

  >>> human_bytes(512), human_bytes(3_140_000)
  ('512 B', '3.14 MB')
  """
  return _human(count) + 'B'


def human_count(count: float) -> str:
  """Returns a number for people, in powers of 1000.

  >>> human_count(980), human_count(10_900), human_count(4_096_000)
  ('980', '10.9 k', '4.10 M')
  """
  return _human(count).strip()


def _human(count: float) -> str:
  prefix = ''
  for larger in 'kMGTP':
    if abs(count) < 999.5:  # above, it would print as 1000
      break
    count, prefix = count / 1000, larger
  # Three digits, as in 1.23, 12.3 and 123.
  digits = max(0, 3 - len(str(int(abs(count))))) if prefix else 0
  return f'{count:.{digits}f} {prefix}'


def human_seconds(seconds: float) -> str:
  """Returns a duration for people.

  >>> human_seconds(75), human_seconds(3 * 3600 + 62)
  ('01:15', '3:01:02')
  """
  return tqdm.tqdm.format_interval(seconds)


def header(config: config_lib.Config) -> str:
  """Returns two lines about the run and about the payloads of a peer."""
  optim = config.optim
  sent = {'diloco': 'the dense delta', 'ddp': 'the dense gradient'}
  exchange = sent.get(optim.method) or (
    f'{optim.compression.kind}, {optim.compression.k} of each '
    f'{optim.compression.block[0]} x {optim.compression.block[1]} block of '
    f'each tensor, quantizer {optim.compression.quantizer!r}, error feedback '
    f'{optim.compression.error_decay}'
  )
  return (
    f'{config.name}: {llama.num_params(config.model):,} parameters, '
    f'{config.miners} miners, {config.rounds} rounds of {optim.inner_steps} '
    f'steps of {optim.inner.batch_size} x {config.data.context} tokens\n'
    f'{optim.method}: each sends {exchange}'
  )


class Notebook:
  """A bar with a text in the output of a notebook's cell, updated in place."""

  def __init__(self):
    self._handle = importlib.import_module('IPython.display').DisplayHandle()
    self._is_shown = False

  def show(self, done: int, total: int, text: str) -> None:
    """Shows `done` of `total`, and a text, in place of what it showed."""
    line = f'{done}/{total} {text}'
    shown = {
      'text/plain': line,
      'text/html': f'<progress value="{done}" max="{total}"></progress> '
      f'<code>{html.escape(line)}</code>',
    }
    display = self._handle.update if self._is_shown else self._handle.display
    self._is_shown = True
    display(shown, raw=True)


def notebook() -> Notebook | None:
  """Returns the output of this notebook's cell; None outside of notebooks."""
  shell = sys.modules.get('IPython')
  shell = shell and shell.get_ipython()
  return Notebook() if getattr(shell, 'kernel', None) else None


class Progress:
  """One live line on a terminal or in a notebook, or now and then in a log.

  Args:
    rounds: rounds of the whole run.
    stream: output, such as stderr.
    completed: rounds done before this process started.
    every: seconds between two lines when `stream` is not a terminal. The
      first and the last round always print.
    clock: seconds since any fixed time; tests pass their own.
  """

  def __init__(
    self,
    rounds: int,
    *,
    stream: TextIO,
    completed: int = 0,
    every: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._rounds = rounds
    self._stream = stream
    self._every = every
    self._clock = clock
    self._first = completed
    self._start = clock()
    self._printed: float | None = None
    self._heldout: list[str] = []
    self._bar = None
    self._notebook = notebook()
    if stream.isatty() and not self._notebook:
      self._bar = tqdm.tqdm(
        total=rounds,
        initial=completed,
        file=stream,
        bar_format=_BAR,
        dynamic_ncols=True,
        miniters=1,
      )

  def plan(self, rounds: int) -> None:
    """Takes the length of the run, which an amendment may change."""
    self._rounds = rounds
    if self._bar is not None:
      self._bar.total = rounds

  def update(self, record: metrics.Record) -> None:
    """Shows a round, with the loss of the last evaluation before it."""
    if isinstance(record, metrics.Evaluation):
      self._heldout = [f'held-out {record.loss:.3f}']
      return
    facts = self._facts(record)
    if self._notebook:
      self._notebook.show(record.round, self._rounds, ', '.join(facts))
      return
    if self._bar is not None:
      # update() draws, and at most ten times a second.
      self._bar.set_description_str(' '.join(facts), refresh=False)
      self._bar.update(record.round - self._bar.n)
      return
    now = self._clock()
    if (
      self._printed is None
      or now - self._printed >= self._every
      or record.round == self._rounds
    ):
      self._printed = now
      facts.insert(0, f'round {record.round}/{self._rounds}')
      print(', '.join(facts), file=self._stream, flush=True)

  def _facts(self, record: metrics.Round) -> list[str]:
    # The rate includes evaluations and checkpoints, as the remaining time does.
    elapsed = self._clock() - self._start
    rate = elapsed / max(1, record.round - self._first)
    left = human_seconds(rate * (self._rounds - record.round))
    sent = f'sent {human_bytes(record.bytes_up)}'
    if record.bytes_round:
      sent += f' ({record.compression_ratio:.0f}x)'
    return [
      f'ETA {left}',
      f'loss {record.loss:.3f}',
      *self._heldout,
      sent,
      f'{human_count(record.tokens_per_second)} tok/s',
    ]

  def close(self) -> None:
    """Ends the line and leaves its last state on the terminal."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def summary(
  records: Sequence[metrics.Record],
  adversaries: Mapping[int, str] = types.MappingProxyType({}),
) -> str:
  """Returns the summary of a run as a table of plain text.

  Args:
    records: records of one run, in order.
    adversaries: uid -> kind; their weights are shown apart from the others.
  """
  rounds = metrics.rounds(records)
  evaluations = metrics.evaluations(records)
  rows: list[tuple[str, str]] = []
  if rounds:
    last = rounds[-1]
    rows.append(('rounds', f'{last.round}'))
    rows.append(('miners', f'{len(last.uids)} in the last round'))
    rows.append(('tokens', human_count(last.tokens)))
    rows.append(('training loss', f'{last.loss:.4f} nats per token'))
  if evaluations:
    last, best = evaluations[-1], min(evaluations, key=lambda e: e.loss)
    losses = (
      f'{last.loss:.4f} nats per token, {last.nats_per_byte:.4f} nats per '
      f'byte, {last.bits_per_byte:.4f} bits per byte (after round {last.round})'
    )
    rows.append(('held-out loss', losses))
    if best.round != last.round:
      losses = f'{best.loss:.4f} nats per token (after round {best.round})'
      rows.append(('best held-out', losses))
  if rounds:
    sent = sum(r.bytes_round for r in rounds)
    dense = sum(r.dense_bytes_round for r in rounds)
    seconds = sum(r.seconds for r in rounds)
    ratio = f' ({dense / sent:.1f}x less than fp32)' if sent else ''
    rows.append(('bytes sent', human_bytes(rounds[-1].bytes_up) + ratio))
    rows.append(('training time', human_seconds(seconds)))
    trained = sum(r.tokens_per_second * r.seconds for r in rounds)
    if seconds:
      rows.append(('tokens/s', human_count(trained / seconds)))
  rows += _weights([r for r in rounds if r.weights], adversaries)
  if evaluations:
    waited = sum(e.seconds for e in evaluations)
    rows.append(('evaluation time', human_seconds(waited)))
  if not rows:
    return 'no rounds were run'
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)


def _weights(
  judged: Sequence[metrics.Round], adversaries: Mapping[int, str]
) -> list[tuple[str, str]]:
  """Returns the weights of adversaries, and the range of the others."""
  rows = []
  for uid, kind in sorted(adversaries.items()):
    present = [r for r in judged if uid < len(r.weights)]
    if present:
      best = max(present, key=lambda r, uid=uid: r.weights[uid])
      text = (
        f'uid {uid}, {kind}: {present[-1].weights[uid]:.2%} of the weight, '
        f'{best.weights[uid]:.2%} at most (round {best.round})'
      )
      rows.append(('adversary', text))
  last = judged[-1].weights if judged and adversaries else ()
  if others := [w for uid, w in enumerate(last) if uid not in adversaries]:
    text = f'{min(others):.2%} to {max(others):.2%} of the weight each'
    rows.append(('the others', text))
  return rows


def aligned(
  rows: Sequence[tuple[str, ...]],
  align: Callable[[str, int], str] = str.ljust,
) -> list[str]:
  """Returns rows as lines of columns, all but the first aligned by `align`.

  >>> aligned([('run', 'loss'), ('a', '1.5')], str.rjust)
  ['run  loss', 'a     1.5']
  """
  first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join([row[0].ljust(first), *map(align, row[1:], others)]).rstrip()
    for row in rows
  ]


def members_table(sights: Sequence[localnet.Sight]) -> str:
  """Returns one line per member, then the last errors."""
  rows = [_MEMBERS_HEADER]
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
  lines = aligned(rows)
  if errors:
    lines += ['last errors:', *errors]
  return '\n'.join(lines)


class MembersScreen:
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
      text = members_table(sights)
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
