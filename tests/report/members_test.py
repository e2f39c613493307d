import io

from absl.testing import absltest

from covenant.emulate import localnet
from covenant.report import members


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def _sight(uid, **status):
  member = localnet.Member('miner', uid)
  return localnet.Sight(member, status, stake=0.0, weight=0.25, restarts=0)


class MembersTest(absltest.TestCase):
  def test_table(self):
    lines = members.table(
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
    screen = members.Screen(stream)
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
    screen = members.Screen(stream)
    screen.show([_sight(0)])
    screen.show([_sight(0)])
    self.assertEqual(stream.getvalue().count('\x1b[2F\x1b[J'), 1)


if __name__ == '__main__':
  absltest.main()
