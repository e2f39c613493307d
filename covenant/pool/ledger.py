"""What a pool earned, and whose it is: to the last unit, for good.

Every entry moves a whole number of rao (1e-9 TAO) from one account to another,
and none is ever changed:

  chain -> pot           what the network paid to the pool's uid
  pot -> fee             the pool's share of it
  pot -> held:WORKER     the rest, by verified work of the round
  held:A -> held:B       forfeited by A, shared by the others of that round
  held:W -> due:W        W passed an audit of a later round: it is its own
  due:W -> paid:W        an order to pay, numbered, once enough is due

So all accounts but `chain` hold together what came from it. What cannot be
shared stays in the pot, and is shared with what comes next. A round is one
transaction: a pool that is killed has entered it whole or not at all.
"""

import contextlib
import fractions
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

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
  CREATE TABLE IF NOT EXISTS balances (
    account TEXT NOT NULL, share INTEGER NOT NULL, rao INTEGER NOT NULL,
    PRIMARY KEY (account, share));
"""


class LedgerError(errors.CovenantError):
  """The file is not a ledger, or does not add up; says which and where."""


class Policy(NamedTuple):
  """What the pool keeps, and when it pays."""

  fee: float = 0.0  # share of what the network pays, rounded down
  threshold: int = 0  # rao that must be due before they are paid


class Order(NamedTuple):
  """To pay a worker. No two have one number, which rise."""

  number: int
  worker: str
  rao: int


class Account(NamedTuple):
  """What a worker has of a pool, in rao."""

  held: int  # until it passes the next audit
  due: int  # its own, below the threshold
  paid: int


def split(amount: int, weights: Mapping[str, int]) -> dict[str, int]:
  """Whole parts of `amount` in proportion to `weights`, which sum to it.

  By largest remainder; of equal ones the smaller name gets the unit.

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
  """The accounts of one pool, in one SQLite file.

  Args:
    path: of the file; made if it is not there. ':memory:' for emulations.
    policy: from now on; what was entered stays.

  Raises:
    LedgerError: there is something else in the file.
  """

  def __init__(self, path: str | os.PathLike[str], policy: Policy):
    self._path = os.fspath(path)
    # Exact: a float times a large integer would not be.
    self._fee = fractions.Fraction(str(policy.fee))
    self._threshold = max(policy.threshold, 1)
    self._lock = threading.RLock()  # a transaction is of one thread
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
    """The first round that may be settled."""
    ((last,),) = self._query('SELECT MAX(round) FROM rounds')
    return 0 if last is None else last + 1

  @property
  def meter(self) -> int:
    """What the network had paid in all when a round was settled last."""
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
    """Enters a round, all of it or, if the process dies, nothing.

    Args:
      round_index: which round. One that was entered already changes nothing.
      meter: rao that the network has paid to the uid in all; what came since
        the last round is shared. Less than then is a uid registered anew.
      work: verified sequences by worker, of this round.
      proven: who passed an audit: what is held for them, of the rounds before,
        becomes theirs. Who cheats in a round has the rest of it to be caught.
      caught: who failed one: what is held for them goes to the others of the
        rounds that it was of, and their work of this round counts for nothing.
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
        for share, rao in self._held(worker):
          if share < round_index:
            self._move(
              round_index, share, f'held:{worker}', f'due:{worker}', rao
            )
      self._pay(round_index)

  def account(self, worker: str) -> Account:
    return Account(
      *(self._balance(f'{kind}:{worker}') for kind in Account._fields)
    )

  def orders(self, after: int = 0) -> list[Order]:
    """What is to be paid, from the number `after` on, by number."""
    rows = self._query(
      'SELECT id, substr(target, 6), rao FROM entries '
      "WHERE target LIKE 'paid:%' AND id > ? ORDER BY id",
      after,
    )
    return [Order(*row) for row in rows]

  def held(self) -> dict[str, int]:
    """What is at stake for each worker, in rao."""
    rows = self._query(
      'SELECT substr(account, 6), SUM(rao) FROM balances WHERE account LIKE '
      "'held:%' GROUP BY account"
    )
    return dict(rows)

  def banned(self, since: int) -> set[str]:
    """Who was caught in a round from `since` on."""
    rows = self._query('SELECT worker FROM caught WHERE round >= ?', since)
    return {worker for (worker,) in rows}

  def totals(self) -> dict[str, int]:
    """What has come from the chain, and where it is: by kind of account.

    Added up anew from every entry.

    Raises:
      LedgerError: the balances are not what the entries add up to.
    """
    sums: dict[tuple[str, int], int] = {}
    totals = dict.fromkeys(('earned', 'pot', 'fee', *Account._fields), 0)
    for share, source, target, rao in self._query(
      'SELECT share, source, target, rao FROM entries'
    ):
      for account, change in ((source, -rao), (target, rao)):
        # Only of what is held does it matter which round it is of.
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
    """Shares what is in an account by the work of the round `share`."""
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

  def _pay(self, round_index: int) -> None:
    for account, rao in self._query(
      "SELECT account, rao FROM balances WHERE account LIKE 'due:%' "
      'AND rao >= ? ORDER BY account',
      self._threshold,
    ):
      worker = account.partition(':')[2]
      self._move(round_index, -1, account, f'paid:{worker}', rao)

  def _held(self, worker: str) -> list[tuple[int, int]]:
    """Of which round how much, in rao."""
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
    """One entry. Of nothing there is none."""
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

  def _query(self, sql: str, *values: Any) -> list[tuple]:
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
        if self._connection.in_transaction:  # it raised
          self._query('ROLLBACK')
