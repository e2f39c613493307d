"""Tests of what is made of the rows of the studies of pay."""

import pathlib

from absl.testing import absltest

from experiments import best_response
from experiments import gauntlet
from experiments import gauntlet_pay
from experiments import gauntlet_report
from experiments import study

EARLIER = 'an earlier rule'


def mixed(seed, emissions, rule):
  return dict.fromkeys(gauntlet.COLUMNS, '') | dict(
    cell='mixed', seed=seed, emissions=emissions, rule=rule,
    least_honest=0.05, most_adversary=emissions, auc=1.0, nats_per_byte=2.0,
  )  # fmt: skip


class RuleTest(absltest.TestCase):
  """Rows by an earlier rule of pay are never taken for those of the present."""

  def emissions(self, rows):
    found = {v.claim: v for v in gauntlet_report.judge(rows)}
    return found['C13, emissions']

  def test_bars_are_judged_by_the_present_rule(self):
    before = [mixed(seed, 0.3, EARLIER) for seed in range(3)]
    only_before = self.emissions(before)
    self.assertEqual(only_before.outcome, 'FAIL')
    self.assertIn('by an earlier rule', only_before.measured)
    both = self.emissions([*before, mixed(0, 0.001, study.rule())])
    self.assertEqual((both.outcome, both.measured), ('PASS', '0.10% (n = 1)'))

  def test_a_run_of_an_earlier_rule_is_not_done(self):
    path = pathlib.Path(self.create_tempdir(), 'gauntlet.csv')
    table = gauntlet.Table(path)
    table.rows = [mixed(0, 0.3, EARLIER) | {'config': 'a'}]
    self.assertEqual(table.done, set())
    table.add('mixed', 0, 'a', {'emissions': 0.1})
    self.assertEqual(table.done, {'a'})
    self.assertLen(gauntlet.Table(path).rows, 2)  # with the earlier one

  def test_strategies_are_judged_by_the_present_rule(self):
    def row(seed, per_work, rule):
      return best_response.Row(
        'final', 'work=0.5', seed, 0.5, per_work / 2, per_work, 0.05, 1.8,
        'code', rule,
      )  # fmt: skip

    before = [row(seed, 1.5, EARLIER) for seed in range(2)]
    response, fairness = best_response.judge(before)
    self.assertEqual(response.outcome, 'FAIL')
    self.assertIn('by an earlier rule', fairness.measured)
    present = [row(seed, 0.9, study.rule()) for seed in range(2)]
    response, fairness = best_response.judge([*before, *present])
    self.assertEqual(response.outcome, 'PASS')
    self.assertNotIn('earlier', fairness.measured)


class AloneTest(absltest.TestCase):
  def test_pay_is_per_work_and_harm_over_nobody(self):
    rule = study.rule()

    def row(cell, loss, rule=rule):
      return dict.fromkeys(gauntlet.COLUMNS, '') | dict(
        cell=cell, seed='0', nats_per_byte=loss, rule=rule
      )

    def paid(cell, kind, paid, rule=rule):
      return gauntlet_pay.Row(cell, 0, 16, kind, paid, 0.4, 'code', rule)

    cells = ('half-worker', 'noise', 'one noise')
    rows = [row('nobody', '2.0'), *(row(cell, '2.01') for cell in cells)]
    rows += [row('one noise', '2.01') | {'nats_per_byte': '2.1'}]
    rows += [row('copier', '2.0', EARLIER), row('one copier', '2.0')]
    found = [paid(cell, cell.removeprefix('one '), 0.1) for cell in cells]
    found += [paid(cell, 'honest', x) for cell in cells for x in (0.5, 1.5)]
    found += [paid('half-worker', 'half-worker', 0.9, EARLIER)]
    _, _, *lines = gauntlet_report.alone_table(rows, found).splitlines()
    self.assertEqual(
      sorted(lines),
      [
        '| half-worker | +0.5% | 0.20 ± 0.17 | 0.80 | - |  |  |  | met |',
        '| noise | +0.5% | 0.10 ± 0.09 | 0.40 | - | '
        '+5.0% | 0.10 ± 0.09 | 0.40 | **missed** |',
      ],
    )


class PayTest(absltest.TestCase):
  def test_rows_take_the_place_of_the_same_run(self):
    path = pathlib.Path(self.create_tempdir(), 'gauntlet_pay.csv')
    row = gauntlet_pay.Row('mixed', 0, 7, 'noise', 0.5, 0.1, 'code', 'rule')
    table = gauntlet_pay.Table(path)
    table.add([row, row._replace(uid=8)])
    table.add([row._replace(seed=1)])
    table.add([row._replace(paid=0.25)])
    table.add([])
    self.assertEqual(
      gauntlet_pay.Table(path).rows,
      [row._replace(seed=1), row._replace(paid=0.25)],
    )


if __name__ == '__main__':
  absltest.main()
