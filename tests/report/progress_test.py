import io
import sys
import types
from unittest import mock

from absl.testing import absltest

from covenant import metrics
from covenant.emulate import localnet
from covenant.report import progress


def _round(number, **changes):
  fields = dict(
    round=number,
    tokens=40_960 * number,
    loss=2.5,
    miner_losses=(2.4, 2.6),
    uids=(0, 1),
    learning_rate=3e-3,
    bytes_up=31_000 * number,
    bytes_round=31_000,
    dense_bytes_round=6_200_000,
    compression_ratio=200.0,
    delta_norm=0.5,
    error_norm=1.5,
    payloads=2,
    seconds=2.0,
    tokens_per_second=20_480.0,
  )
  return metrics.Round(**(fields | changes))


def _evaluation(number, loss):
  return metrics.Evaluation(
    round=number,
    tokens=0,
    bytes_up=0,
    loss=loss,
    nats_per_byte=loss,
    bits_per_byte=2 * loss,
    sequences=8,
    seconds=1.0,
  )


class _Terminal(io.StringIO):
  def isatty(self):
    return True


class _Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class _Handle:
  """A stand-in for IPython's display handle."""

  shown: list[tuple[str, dict[str, str]]] = []

  def display(self, data, raw):
    self.shown.append(('display', data))

  def update(self, data, raw):
    self.shown.append(('update', data))


def _ipython(kernel):
  """The modules that a shell of IPython has loaded."""
  shell = types.SimpleNamespace(kernel=kernel)
  return {
    'IPython': types.SimpleNamespace(get_ipython=lambda: shell),
    'IPython.display': types.SimpleNamespace(DisplayHandle=_Handle),
  }


class NotebookTest(absltest.TestCase):
  def test_shows_one_bar_and_updates_it(self):
    stream = _Terminal()
    with (
      mock.patch.dict(sys.modules, _ipython(object())),
      mock.patch.object(_Handle, 'shown', []) as shown,
      progress.Progress(3, stream=stream) as bar,
    ):
      for record in (_round(1), _evaluation(1, 2.25), _round(2)):
        bar.update(record)
    self.assertEmpty(stream.getvalue())
    self.assertEqual([how for how, _ in shown], ['display', 'update'])
    first, last = (data for _, data in shown)
    self.assertIn('<progress value="1" max="3">', first['text/html'])
    self.assertStartsWith(last['text/plain'], '2/3 ETA ')
    self.assertIn('held-out 2.250', last['text/plain'])

  def test_no_kernel_is_no_notebook(self):
    with mock.patch.dict(sys.modules, _ipython(None)):
      self.assertIsNone(progress.notebook())
    with mock.patch.dict(sys.modules, {'IPython': None}):
      self.assertIsNone(progress.notebook())


class ProgressTest(absltest.TestCase):
  def _run(self, rounds, *, seconds, completed=0, records=None):
    stream, clock = io.StringIO(), _Clock()
    with progress.Progress(
      rounds, stream=stream, completed=completed, every=10.0, clock=clock
    ) as live:
      for record in records or map(_round, range(completed + 1, rounds + 1)):
        clock.now += seconds
        live.update(record)
    return stream.getvalue().splitlines()

  def test_log_gets_few_plain_lines(self):
    lines = self._run(20, seconds=2.0)
    shown = [int(line.split()[1].split('/')[0]) for line in lines]
    self.assertEqual(shown, [1, 6, 11, 16, 20])
    self.assertEqual(
      lines[1],
      'round 6/20, ETA 00:28, loss 2.500, sent 186 kB (200x), 20.5 k tok/s',
    )
    self.assertTrue(all(line.isprintable() for line in lines))

  def test_resumed_run_estimates_from_its_own_rounds(self):
    lines = self._run(20, seconds=3.0, completed=18)
    self.assertStartsWith(lines[0], 'round 19/20, ETA 00:03, ')

  def test_held_out_loss_shows_after_its_evaluation(self):
    records = [_round(1), _evaluation(1, 1.875), _round(2)]
    lines = self._run(2, seconds=1.0, records=records)
    self.assertNotIn('held-out', lines[0])
    self.assertIn('loss 2.500, held-out 1.875, sent', lines[1])

  def test_round_without_payloads_claims_no_ratio(self):
    silent = _round(1, bytes_round=0, compression_ratio=0.0)
    (line,) = self._run(1, seconds=1.0, records=[silent])
    self.assertNotIn('x)', line)

  def test_terminal_gets_one_live_line(self):
    stream = _Terminal()
    with progress.Progress(3, stream=stream) as live:
      for number in (1, 2, 3):
        live.update(_round(number))
    text = stream.getvalue()
    self.assertIn('3/3', text)
    self.assertIn('sent 93.0 kB (200x)', text)
    self.assertEqual(text.count('\n'), 1)


class SummaryTest(absltest.TestCase):
  def test_summary(self):
    records = [_round(1), _evaluation(1, 1.5), _round(2), _evaluation(2, 1.75)]
    self.assertEqual(
      progress.summary(records).splitlines(),
      [
        'rounds           2',
        'miners           2 in the last round',
        'tokens           81.9 k',
        'training loss    2.5000 nats per token',
        'held-out loss    1.7500 nats per token, 1.7500 nats per byte, '
        '3.5000 bits per byte (after round 2)',
        'best held-out    1.5000 nats per token (after round 1)',
        'bytes sent       62.0 kB (200.0x less than fp32)',
        'training time    00:04',
        'tokens/s         20.5 k',
        'evaluation time  00:02',
      ],
    )

  def test_tells_what_adversaries_deserve(self):
    records = [
      _round(1),
      _round(2, weights=(0.5, 0.3, 0.2)),
      _round(3, weights=(0.6, 0.39, 0.01)),
    ]
    lines = progress.summary(records, {2: 'copier', 3: 'lazy'}).splitlines()
    self.assertEqual(
      [line for line in lines if line.startswith(('adversary', 'the others'))],
      [
        'adversary      uid 2, copier: 1.00% of the weight, 20.00% at most '
        '(round 2)',
        'the others     39.00% to 60.00% of the weight each',
      ],
    )

  def test_an_adversary_that_registers_later(self):
    records = [
      _round(1, weights=(0.5, 0.5)),
      _round(2, weights=(0.4, 0.4, 0.2)),
      _round(3, weights=(0.45, 0.45, 0.1)),
    ]
    self.assertIn(
      'uid 2, copier: 10.00% of the weight, 20.00% at most (round 2)',
      progress.summary(records, {2: 'copier'}),
    )

  def test_short_runs(self):
    self.assertEqual(progress.summary([]), 'no rounds were run')
    self.assertIn('1.5000', progress.summary([_evaluation(0, 1.5)]))
    silent = _round(1, bytes_round=0, bytes_up=0, seconds=0.0)
    self.assertIn('bytes sent     0 B', progress.summary([silent]))


def _sight(uid, **status):
  member = localnet.Member('miner', uid)
  return localnet.Sight(member, status, stake=0.0, weight=0.25, restarts=0)


class MembersTest(absltest.TestCase):
  def test_table(self):
    lines = progress.members_table(
      [
        _sight(0, phase='train', round=3, loss=2.5),
        _sight(1, error='x' * 100),
      ]
    ).splitlines()
    self.assertEqual(lines[0].split()[:3], ['member', 'doing', 'round'])
    self.assertEqual(
      lines[1].split(), ['miner-0', 'train', '3', '2.500', '0.250']
    )
    self.assertEqual(lines[2].split(), ['miner-1', 'starting', '0.250'])
    self.assertEqual(lines[3], 'last errors:')
    self.assertEqual(lines[4], f'  miner-1: {"x" * 57}...')

  def test_a_log_gets_one_line_per_round(self):
    stream = io.StringIO()
    screen = progress.MembersScreen(stream)
    for number in (0, 0, 1):
      sights = [_sight(0, round=number, loss=2.0), _sight(1, round=number + 1)]
      screen.show(sights)
    self.assertEqual(
      stream.getvalue().splitlines(),
      [
        'round 0: 2 of 2 members, mean loss 2.000',
        'round 1: 2 of 2 members, mean loss 2.000',
      ],
    )

  def test_a_terminal_is_drawn_in_place(self):
    stream = _Terminal()
    screen = progress.MembersScreen(stream)
    screen.show([_sight(0)])
    screen.show([_sight(0)])
    self.assertEqual(stream.getvalue().count('\x1b[2F\x1b[J'), 1)


if __name__ == '__main__':
  absltest.main()
