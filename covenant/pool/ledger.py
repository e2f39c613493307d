"""The accounts of a pool, exact to one rao (1e-9 TAO).

Every entry moves a whole number of rao between two accounts and is permanent:

  chain -> pot           pay of the network to the pool's uid
  pot -> fee             the pool's share
  pot -> held:WORKER     the rest, in proportion to verified work of the round
  held:A -> held:B       pay forfeited by A, shared by the others of that round
  held:W -> due:W        released when W passes an audit some rounds later, or
                         has left and passed one after that round
  due:W -> paid:W        a numbered payment order above the threshold

All accounts but `chain` sum to what came from it. Amounts that cannot be shared
stay in the pot until the next round. A round is one transaction: after a crash
it is entered completely or not at all.
"""

import contextlib
import fractions
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from covenant import errors

RAO = 10**9  # of 1 TAO
_TABLES = """
  CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, round INTEGER NOT NULL, share INTEGER NOT NULL,
    source TEXT NOT NULL, target TEXT NOT NULL,
    rao INTEGER NOT NULL CHECK (rao > 0));
  CREATE TABLE IF NOT EXISTS work (
    round INTEGER NOT NULL, worker TEXT NOT NULL,
    sequences INTEGER NOT NULL CHECK (sequences > 0),
    PRIMARY KEY (round, worker));
  CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, meter INTEGER NOT NULL);
  CREATE TABLE IF NOT EXISTS caught (
    worker TEXT NOT NULL, round INTEGER NOT NULL,
    PRIMARY KEY (worker, round));
  CREATE TABLE IF NOT EXISTS audits (
    worker TEXT PRIMARY KEY, round INTEGER NOT NULL);
  CREATE TABLE IF NOT EXISTS balances (
    account TEXT NOT NULL, share INTEGER NOT NULL, rao INTEGER NOT NULL,
    PRIMARY KEY (account, share));
"""


class LedgerError(errors.CovenantError):
  """The file is not a ledger, or its balances are inconsistent."""


class PaymentPolicy(NamedTuple):
  """The fee, the payment threshold and the deposit of a pool."""

  fee: float = 0.0  # share of the network's pay, rounded down
  threshold: int = 0  # smallest payment, rao
  # The newest rounds whose pay no audit releases: a worker that would send
  # something else instead of work always has something to lose.
  deposit: int = 1


class Order(NamedTuple):
  """A payment order; numbers are unique and ascending."""

  number: int
  worker: str
  rao: int


class Account(NamedTuple):
  """The balances of a worker, in rao."""

  held: int  # until it passes an audit
  due: int  # released, below the threshold
  paid: int  # ordered


def split(amount: int, weights: Mapping[str, int]) -> dict[str, int]:
  """Splits `amount` into integers proportional to `weights`.

  Uses the largest remainder; ties go to the smaller name.

  >>> split(100, {'a': 1, 'b': 1, 'c': 1})
  {'a': 34, 'b': 33, 'c': 33}

  Raises:
    ValueError: the amount or a weight is negative, or all weights are 0.
  """
  total = sum(weights.values())
  if amount < 0 or total <= 0 or min(weights.values()) < 0:
    raise ValueError(
      'expected an amount and weights of 0 or more, and some more than 0; got '
      f'{amount} and {dict(weights)}'
    )
  parts = {name: amount * w // total for name, w in weights.items()}
  rest = amount - sum(parts.values())
  order = sorted(weights, key=lambda n: (-(amount * weights[n] % total), n))
  for name in order[:rest]:
    parts[name] += 1
  return parts


class Ledger:
  """The accounts of one pool in an SQLite file.

  Args:
    path: the file, created if missing; ':memory:' for emulations.
    policy: applies to new entries.

  Raises:
    LedgerError: the file is not a ledger.
  """

  def __init__(self, path: str | os.PathLike[str], policy: PaymentPolicy):
    self._path = os.fspath(path)
    # A fraction, because float times a large integer is inexact.
    self._fee = fractions.Fraction(str(policy.fee))
    self._threshold = max(policy.threshold, 1)
    self._deposit = policy.deposit
    self._lock = threading.RLock()  # one transaction at a time
    self._connection = sqlite3.connect(
      self._path, isolation_level=None, check_same_thread=False
    )
    try:
      self._connection.execute('PRAGMA synchronous = FULL')
      self._connection.executescript(_TABLES)
    except sqlite3.Error as e:
      self._connection.close()
      raise LedgerError(f'{self._path}: not the ledger of a pool: {e}') from e

  def close(self) -> None:
    self._connection.close()

  @property
  def next_round(self) -> int:
    """The first round that is not settled."""
    ((last,),) = self._query('SELECT MAX(round) FROM rounds')
    return 0 if last is None else last + 1

  @property
  def meter(self) -> int:
    """The network's total pay at the last settled round, rao."""
    rows = self._query('SELECT meter FROM rounds ORDER BY round DESC LIMIT 1')
    return rows[0][0] if rows else 0

  def settle(
    self,
    round_index: int,
    meter: int,
    work: Mapping[str, int],
    proven: Collection[str] = (),
    caught: Collection[str] = (),
  ) -> None:
    """Enters a round in one transaction.

    Args:
      round_index: the round; a settled round changes nothing.
      meter: the network's total pay to the uid, rao. The increase since the
        last round is shared. A smaller value means a new registration.
      work: verified sequences of this round, per worker.
      proven: workers that passed an audit; their held pay is released, except
        the deposit.
      caught: workers that failed an audit; their held pay goes to the other
        workers of its rounds, and their work of this round is dropped.
    """
    if round_index < self.next_round:
      return
    with self._transaction():
      for worker in sorted(caught):
        self._query('INSERT INTO caught VALUES (?, ?)', worker, round_index)
      for worker in sorted(caught):
        self._forfeit(round_index, worker)
      for worker, sequences in sorted(work.items()):
        if worker not in caught and sequences:
          self._query(
            'INSERT INTO work VALUES (?, ?, ?)', round_index, worker, sequences
          )
      self._receive(round_index, meter)
      pot = self._balance('pot')
      self._share(round_index, round_index, 'pot', pot)
      for worker in sorted(set(proven) - set(caught)):
        self._query('REPLACE INTO audits VALUES (?, ?)', worker, round_index)
        self._release(round_index, worker, round_index - self._deposit)
      for worker, last in self._away(round_index):
        self._release(round_index, worker, last - 1)
      self._pay(round_index)

  def account(self, worker: str) -> Account:
    return Account(
      *(self._balance(f'{kind}:{worker}') for kind in Account._fields)
    )

  def orders(self, after: int = 0) -> list[Order]:
    """Returns the payment orders after a number, ascending."""
    rows = self._query(
      'SELECT id, substr(target, 6), rao FROM entries '
      "WHERE target LIKE 'paid:%' AND id > ? ORDER BY id",
      after,
    )
    return [Order(*row) for row in rows]

  def held(self) -> dict[str, int]:
    """Returns the held pay per worker, in rao."""
    rows = self._query(
      'SELECT substr(account, 6), SUM(rao) FROM balances WHERE account LIKE '
      "'held:%' GROUP BY account"
    )
    return dict(rows)

  def workers(self) -> set[str]:
    """Returns the workers that have ever done verified work."""
    return {worker for (worker,) in self._query('SELECT worker FROM work')}

  def banned(self, since: int) -> set[str]:
    """Returns the workers caught in round `since` or later."""
    rows = self._query('SELECT worker FROM caught WHERE round >= ?', since)
    return {worker for (worker,) in rows}

  def totals(self) -> dict[str, int]:
    """Sums all entries by kind of account; 'earned' is the total income.

    Raises:
      LedgerError: the balances differ from the entries.
    """
    sums: dict[tuple[str, int], int] = {}
    totals = dict.fromkeys(('earned', 'pot', 'fee', *Account._fields), 0)
    for share, source, target, rao in self._query(
      'SELECT share, source, target, rao FROM entries'
    ):
      for account, change in ((source, -rao), (target, rao)):
        # Only held pay belongs to a round.
        of = share if account.startswith('held:') else -1
        sums[account, of] = sums.get((account, of), 0) + change
        kind = account.partition(':')[0]
        if kind == 'chain':
          totals['earned'] -= change
        else:
          totals[kind] += change
    kept = self._query('SELECT account, share, rao FROM balances')
    if {key: rao for key, rao in sums.items() if rao} != {
      (account, share): rao for account, share, rao in kept
    }:
      raise LedgerError(f'{self._path}: balances and entries differ')
    return totals

  def _receive(self, round_index: int, meter: int) -> None:
    before = self.meter
    income = meter - before if meter >= before else meter
    self._query('INSERT INTO rounds VALUES (?, ?)', round_index, meter)
    self._move(round_index, round_index, 'chain', 'pot', income)
    fee = int(income * self._fee)
    self._move(round_index, round_index, 'pot', 'fee', fee)

  def _share(self, now: int, share: int, source: str, rao: int) -> None:
    """Shares an amount by the work of round `share`."""
    weights = dict(
      self._query(
        'SELECT worker, sequences FROM work WHERE round = ? AND worker NOT IN '
        '(SELECT worker FROM caught WHERE caught.round >= work.round)',
        share,
      )
    )
    if not weights:
      if source != 'pot':
        self._move(now, share, source, 'pot', rao)
      return
    for worker, part in split(rao, weights).items():
      self._move(now, share, source, f'held:{worker}', part)

  def _forfeit(self, now: int, worker: str) -> None:
    for share, rao in self._held(worker):
      self._share(now, share, f'held:{worker}', rao)

  def _release(self, round_index: int, worker: str, last: int) -> None:
    """Makes held pay due, of the rounds up to `last`."""
    for share, rao in self._held(worker):
      if share <= last:
        self._move(round_index, share, f'held:{worker}', f'due:{worker}', rao)

  def _away(self, round_index: int) -> list[tuple[str, int]]:
    """Returns the workers without work for a while and their last audits."""
    return self._query(
      'SELECT audits.worker, audits.round FROM audits WHERE EXISTS '
      "(SELECT 1 FROM balances WHERE account = 'held:' || audits.worker) "
      'AND NOT EXISTS (SELECT 1 FROM work WHERE work.worker = audits.worker '
      'AND work.round > ?) ORDER BY audits.worker',
      round_index - self._deposit,
    )

  def _pay(self, round_index: int) -> None:
    for account, rao in self._query(
      "SELECT account, rao FROM balances WHERE account LIKE 'due:%' "
      'AND rao >= ? ORDER BY account',
      self._threshold,
    ):
      worker = account.partition(':')[2]
      self._move(round_index, -1, account, f'paid:{worker}', rao)

  def _held(self, worker: str) -> list[tuple[int, int]]:
    """Returns the held pay of a worker as (round, rao)."""
    return self._query(
      'SELECT share, rao FROM balances WHERE account = ? ORDER BY share',
      f'held:{worker}',
    )

  def _balance(self, account: str) -> int:
    ((rao,),) = self._query(
      'SELECT COALESCE(SUM(rao), 0) FROM balances WHERE account = ?', account
    )
    return rao

  def _move(
    self, now: int, share: int, source: str, target: str, rao: int
  ) -> None:
    """Adds an entry, unless the amount is 0."""
    if not rao:
      return
    self._query(
      'INSERT INTO entries (round, share, source, target, rao) '
      'VALUES (?, ?, ?, ?, ?)',
      now,
      share,
      source,
      target,
      rao,
    )
    for account, change in ((source, -rao), (target, rao)):
      of = share if account.startswith('held:') else -1
      self._query(
        'INSERT INTO balances VALUES (?1, ?2, ?3) ON CONFLICT (account, share) '
        'DO UPDATE SET rao = rao + ?3',
        account,
        of,
        change,
      )
    self._query('DELETE FROM balances WHERE rao = 0')

  def _query(self, sql: str, *values: str | int) -> list[tuple]:
    with self._lock:
      return self._connection.execute(sql, values).fetchall()

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[None]:
    with self._lock:
      self._query('BEGIN IMMEDIATE')
      try:
        yield
        self._query('COMMIT')
      finally:
        if self._connection.in_transaction:  # an exception
          self._query('ROLLBACK')
