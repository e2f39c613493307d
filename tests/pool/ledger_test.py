"""A pool's accounts add up to the unit, whatever happens."""

import json
import pathlib
import sqlite3
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.pool import ledger as ledger_lib
from covenant.pool import miner as miner_lib

WORKERS = st.sampled_from('abcdef')
ROUNDS = st.lists(
  st.tuples(
    st.integers(0, 10**15),  # paid to the uid since the round before
    st.booleans(),  # whether it was registered anew
    st.dictionaries(WORKERS, st.integers(0, 10**6)),
    st.sets(WORKERS),  # proven
    st.sets(WORKERS, max_size=3),  # caught
    st.booleans(),  # whether the pool is started again after it
  ),
  max_size=6,
)


class SplitTest(absltest.TestCase):
  @hypothesis.given(
    st.integers(0, 10**18),
    st.dictionaries(st.text(), st.integers(0, 10**9), min_size=1),
  )
  def test_sums_exactly_and_is_off_by_less_than_a_unit(self, amount, weights):
    hypothesis.assume(any(weights.values()))
    parts = ledger_lib.split(amount, weights)
    self.assertEqual(sum(parts.values()), amount)
    total = sum(weights.values())
    for name, weight in weights.items():
      self.assertLess(abs(parts[name] * total - amount * weight), total)

  def test_refuses_what_cannot_be_split(self):
    for amount, weights in (5, {}), (5, {'a': 0}), (-1, {'a': 1}):
      with self.assertRaises(ValueError):
        ledger_lib.split(amount, weights)


class LedgerTest(parameterized.TestCase):
  def ledger(self, fee=0.0, threshold=0, path=':memory:'):
    ledger = ledger_lib.Ledger(path, ledger_lib.PaymentPolicy(fee, threshold))
    self.addCleanup(ledger.close)
    return ledger

  @pytest.mark.slow
  @hypothesis.given(
    ROUNDS, st.floats(0, 1), st.integers(0, 10**15), st.integers(1, 3)
  )
  def test_every_unit_is_somewhere(self, rounds, fee, threshold, deposit):
    """Over any rounds, forfeits, payouts and restarts."""
    path = pathlib.Path(self.create_tempdir().full_path, 'ledger.sqlite')
    path.unlink(missing_ok=True)
    policy = ledger_lib.PaymentPolicy(fee, threshold, deposit)
    ledger = ledger_lib.Ledger(path, policy)
    earned = meter = fees = 0
    for r, (income, anew, work, proven, caught, again) in enumerate(rounds):
      meter = income if anew else meter + income
      before = ledger.totals()['earned']
      ledger.settle(r, meter, work, proven, caught)
      added = ledger.totals()['earned'] - before
      if not anew:
        self.assertEqual(added, income)
      earned += added
      fees += int(added * ledger_lib.fractions.Fraction(str(fee)))
      if again:
        ledger.settle(r, meter + 5, work, proven, caught)  # as after a kill
        ledger.close()
        ledger = ledger_lib.Ledger(path, policy)
      totals = ledger.totals()
      self.assertEqual(totals.pop('earned'), earned)
      self.assertEqual(sum(totals.values()), earned)
      self.assertEqual(totals['fee'], fees)
      self.assertGreaterEqual(min(totals.values()), 0)
      accounts = {w: ledger.account(w) for w in 'abcdef'}
      self.assertEqual(sum(a.held for a in accounts.values()), totals['held'])
      self.assertEqual(sum(a.paid for a in accounts.values()), totals['paid'])
      for worker in caught:
        self.assertEqual(accounts[worker].held, 0)
      for account in accounts.values():
        self.assertLess(account.due, max(threshold, 1))
    orders = ledger.orders()
    self.assertEqual(sum(o.rao for o in orders), ledger.totals()['paid'])
    self.assertLen({o.number for o in orders}, len(orders))
    ledger.close()

  def test_pay_is_held_until_proven_and_forfeited_to_the_others(self):
    ledger = self.ledger(fee=0.1)
    ledger.settle(0, 1000, {'a': 1, 'b': 1, 'c': 1})
    self.assertEqual(ledger.held(), {'a': 300, 'b': 300, 'c': 300})
    self.assertEmpty(ledger.orders())
    ledger.settle(1, 1000, {'a': 1}, proven={'a'})
    self.assertEqual(ledger.account('a'), (0, 0, 300))
    self.assertEqual(ledger.account('b'), (300, 0, 0))
    # Nothing came in round 1; what c loses goes to those of round 0.
    ledger.settle(2, 2000, {'a': 1, 'c': 1}, caught={'c'})
    self.assertEqual(ledger.held(), {'a': 150 + 900, 'b': 300 + 150})
    self.assertEqual(ledger.account('c'), (0, 0, 0))
    self.assertEqual(ledger.banned(2), {'c'})
    self.assertEmpty(ledger.banned(3))
    ledger.settle(3, 2000, {}, proven={'a', 'b', 'c'})
    first, *others = ledger.orders()
    self.assertEqual((first.worker, first.rao), ('a', 300))
    self.assertEqual(
      [(o.worker, o.rao) for o in others], [('a', 1050), ('b', 450)]
    )
    self.assertEqual(ledger.orders(after=first.number), others)

  def test_an_audit_does_not_release_the_deposit(self):
    policy = ledger_lib.PaymentPolicy(deposit=3)
    ledger = ledger_lib.Ledger(':memory:', policy)
    self.addCleanup(ledger.close)
    for r in range(6):
      ledger.settle(r, 100 * (r + 1), {'a': 1}, proven={'a'})
      held = 100 * min(r + 1, 3)
      self.assertEqual(ledger.account('a'), (held, 0, 100 * (r + 1) - held))

  @parameterized.parameters(({2}, 200), ({0}, 0), (set(), 0), ({0, 3}, 300))
  def test_a_worker_that_left_gets_what_an_audit_followed(self, proven, paid):
    policy = ledger_lib.PaymentPolicy(deposit=4)
    ledger = ledger_lib.Ledger(':memory:', policy)
    self.addCleanup(ledger.close)
    for r in range(12):
      work = {'a': 1} if r < 4 else {'b': 1}
      names = {'a'} if r in proven else set()
      ledger.settle(r, 100 * min(r + 1, 4), work, proven=names)
      if r < 7:
        self.assertEqual(ledger.account('a').paid, 0)
    self.assertEqual(ledger.account('a'), (400 - paid, 0, paid))

  def test_what_nobody_worked_for_waits(self):
    ledger = self.ledger()
    ledger.settle(0, 70, {})
    self.assertEqual(ledger.totals()['pot'], 70)
    ledger.settle(1, 100, {'a': 3, 'b': 1})
    self.assertEqual(ledger.held(), {'a': 75, 'b': 25})
    ledger.settle(2, 100, {}, caught={'a', 'b'})
    self.assertEqual(ledger.totals()['pot'], 100)

  def test_threshold(self):
    ledger = self.ledger(threshold=100)
    meters = 60, 99, 100, 100
    accounts = (60, 0, 0), (39, 60, 0), (1, 99, 0), (0, 0, 100)
    for r, (meter, account) in enumerate(zip(meters, accounts, strict=True)):
      ledger.settle(r, meter, {'a': 1}, proven={'a'})
      self.assertEqual(ledger.account('a'), account)

  def test_a_round_is_entered_whole_or_not_at_all(self):
    path = self.create_tempdir().full_path + '/ledger.sqlite'
    ledger = self.ledger(path=path)
    ledger.settle(0, 50, {'a': 1})
    with mock.patch.object(ledger, '_pay', side_effect=KeyboardInterrupt):
      with self.assertRaises(KeyboardInterrupt):
        ledger.settle(1, 100, {'a': 1, 'b': 1}, proven={'a'}, caught={'b'})
    again = self.ledger(path=path)
    self.assertEqual(again.next_round, 1)
    self.assertEqual(again.totals()['earned'], 50)
    self.assertEqual(again.held(), {'a': 50})
    self.assertEmpty(again.banned(0))

  def test_entries_that_do_not_add_up_are_found(self):
    path = self.create_tempdir().full_path + '/ledger.sqlite'
    ledger = self.ledger(path=path)
    ledger.settle(0, 50, {'a': 1})
    with sqlite3.connect(path) as other:
      other.execute('UPDATE entries SET rao = rao + 1 WHERE target = "pot"')
    other.close()
    with self.assertRaisesRegex(ledger_lib.LedgerError, 'differ'):
      ledger.totals()

  def test_another_file_is_refused(self):
    file = self.create_tempfile(content='not a database, but long enough ' * 9)
    with self.assertRaisesRegex(ledger_lib.LedgerError, 'not the ledger'):
      ledger_lib.Ledger(file.full_path, ledger_lib.PaymentPolicy())

  def test_payouts_are_whole_again_after_a_power_failure(self):
    """Its zeros and parts of lines are replaced by what the ledger has."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    ledger = ledger_lib.Ledger(':memory:', ledger_lib.PaymentPolicy())
    path, lines = folder / 'payouts.jsonl', []
    for r, torn in enumerate((b'', b'\0' * 99, b'\0' * 99 + b'\n', b'{"nu\n')):
      ledger.settle(r, 100 * (r + 1), {'w': 1}, {'w'})
      with open(path, 'ab') as file:
        file.write(torn)
      miner_lib.write_payouts(ledger, path)
      lines = [json.loads(line) for line in path.read_text().splitlines()]
      wanted = [order._asdict() for order in ledger.orders()]
      self.assertEqual(lines, wanted)
    self.assertLen(lines, 3)


if __name__ == '__main__':
  absltest.main()
