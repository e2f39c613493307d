"""The state of the embedded chain in SQLite: rows with their blocks.

A row is valid from block `since` until before block `until`. It is kept for
HISTORY blocks beyond that, as by a node without an archive.

A block that a process has read is sealed: later writes belong to a later
block. The pay of an epoch is computed by the process that first seals its
block. Both happen in exclusive transactions, so all processes agree.
"""

import contextlib
import json
import os
import sqlite3
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from covenant.chain import interface
from covenant.chain import yuma

HISTORY = 256  # blocks; substrate's default for nodes without an archive
NOW = 2**62  # `until` of rows that are still valid
_HISTORIES = ('peers', 'commitments', 'earned')
_TABLES = """
  BEGIN EXCLUSIVE;
  CREATE TABLE chain (seed BLOB, rules TEXT, genesis REAL, sealed INTEGER);
  CREATE TABLE peers (
    uid INTEGER, since INTEGER, until INTEGER,
    hotkey TEXT, stake REAL, validator INTEGER, registered INTEGER);
  CREATE TABLE commitments (
    uid INTEGER, since INTEGER, until INTEGER, data BLOB);
  CREATE TABLE earned (
    uid INTEGER, since INTEGER, until INTEGER, tao REAL);
  CREATE TABLE votes (
    uid INTEGER PRIMARY KEY, block INTEGER, weights BLOB, bonds BLOB);
  CREATE TABLE sealed (uid INTEGER, block INTEGER, weights BLOB);
  CREATE INDEX peers_until ON peers (until, uid);
  CREATE INDEX commitments_until ON commitments (until, uid);
  CREATE INDEX earned_until ON earned (until, uid);
"""


class ChainRules(NamedTuple):
  """The rules of a chain. Intervals and periods are in blocks."""

  block_seconds: float = 12.0
  tempo: int = 360  # from one epoch to the next
  emission: float = 1.0  # TAO per block, half to miners, half to validators
  capacity: int = 256  # uids
  immunity: int = 4096  # time in which a newcomer cannot be replaced
  commit_interval: int = 0  # from one commitment to the next
  weights_interval: int = 0
  reveal_epochs: int = 0  # epochs until weights are revealed; 0: not sealed
  # Number of the largest stakes that get a validator permit in every epoch, as
  # on Bittensor, where pay is staked, too; 0: permits stay as registered.
  permits: int = 0

  def subnet(self, head: int, age: int) -> interface.Subnet:
    """Returns the rules as of another chain, at a block."""
    return interface.Subnet(
      block=head,
      tempo=self.tempo,
      weights_interval=self.weights_interval,
      sealed=bool(self.reveal_epochs),
      reveal_epochs=self.reveal_epochs,
      permits=self.permits or None,
      immunity=self.immunity,
      oldest=max(head - min(age, HISTORY), 0) if age else None,
    )


class ChainStorage:
  """One connection to the state of one chain.

  Every sqlite3.Error becomes an interface.ChainUnreachableError.
  """

  def __init__(self, connection: sqlite3.Connection, where: str):
    self._connection = connection
    self._where = where
    self._lock = threading.RLock()  # a transaction is of one thread
    self._genesis: float | None = None
    self.sealed = -1  # newest sealed block known; never decreases
    try:
      # A killed process loses nothing; a power cut may lose the newest blocks.
      connection.execute('PRAGMA synchronous = NORMAL')
      row = connection.execute('SELECT seed, rules FROM chain').fetchone()
    except sqlite3.Error as e:
      connection.close()
      raise _no_chain(where, e) from e
    self.seed: bytes = row[0]
    self.rules = ChainRules(**json.loads(row[1]))

  @classmethod
  def create(
    cls, path: str | os.PathLike[str], seed: bytes, rules: ChainRules
  ) -> 'ChainStorage':
    """See `local_chain.LocalChain.create`."""
    path = os.fspath(path)
    connection = _connect(path, timeout=5.0)
    try:
      connection.execute('PRAGMA journal_mode = WAL')
      connection.executescript(_TABLES)
      connection.execute(
        'INSERT INTO chain VALUES (?, ?, NULL, -1)',
        (bytes(seed), json.dumps(rules._asdict())),
      )
      connection.execute('COMMIT')
    except sqlite3.Error as e:
      connection.close()
      raise interface.ChainError(
        f'{path}: cannot make a chain here ({e}); open the one that is there, '
        'or remove the file'
      ) from e
    return cls(connection, path)

  @classmethod
  def open(cls, path: str | os.PathLike[str], timeout: float) -> 'ChainStorage':
    """See `local_chain.LocalChain.open`."""
    path = os.fspath(path)
    uri = f'file:{urllib.parse.quote(path)}?mode=rw'  # never makes a file
    try:
      connection = _connect(uri, timeout)
    except sqlite3.Error as e:
      raise _no_chain(path, e) from e
    return cls(connection, path)

  @classmethod
  def load(cls, image: bytes) -> 'ChainStorage':
    """See `local_chain.LocalChain.load`."""
    connection = _connect(':memory:', timeout=5.0)
    # An empty image would be a new chain.
    connection.deserialize(image or b'\0')
    return cls(connection, 'the loaded image')

  def dump(self) -> bytes:
    """Returns an image for `load`."""
    with self._lock, self._errors():
      image = bytearray(self._connection.serialize())
    # The file is in write-ahead mode, which memory cannot be: its header says
    # so in these two bytes (SQLite's file format, section 1.3.3).
    image[18:20] = b'\1\1'
    return bytes(image)

  def close(self) -> None:
    """Closes the connection."""
    with self._lock:
      self._connection.close()

  @property
  def genesis(self) -> float | None:
    """Unix seconds of block 0; None before the chain begins."""
    if self._genesis is None:
      ((self._genesis,),) = self.query('SELECT genesis FROM chain')
    return self._genesis

  def query(self, sql: str, *values: object) -> list[tuple]:
    """Runs a statement and returns its rows."""
    with self._lock, self._errors():
      return self._connection.execute(sql, values).fetchall()

  @contextlib.contextmanager
  def transaction(self) -> Iterator[None]:
    """Runs its block exclusively among all processes; undoes it on an error."""
    with self._lock:
      self.query('BEGIN IMMEDIATE')
      try:
        yield
        self.query('COMMIT')
      finally:
        if self._connection.in_transaction:  # it raised
          self.query('ROLLBACK')

  @contextlib.contextmanager
  def writing(self, head: Callable[[], int]) -> Iterator[int]:
    """Runs a transaction; yields the block that its changes belong to.

    Args:
      head: returns the newest block; called inside, as the process may have
        waited for the transaction.
    """
    with self.transaction():
      block = max(head(), self._read_seal() + 1)
      self._seal(block - 1)
      yield block

  def rows_at(
    self, block: int, table: str, columns: str, head: Callable[[], int]
  ) -> list[tuple]:
    """Returns the rows at the end of a block, by uid, and seals the block.

    Callers check that the block has begun.

    Raises:
      ChainRejectedError: the block is too old.
    """
    if self.sealed < block and self._read_seal() < block:
      with self.transaction():
        self._seal(block)
    rows = self.query(
      f'SELECT {columns} FROM {table} '
      'WHERE since <= ?1 AND until > ?1 ORDER BY uid',
      block,
    )
    # Pruning follows the seal, so the seal is read after the rows.
    oldest = max(head(), self._read_seal()) - HISTORY
    if block < oldest:
      raise interface.ChainRejectedError(
        f'block {block}: state is kept for {HISTORY} blocks, so from block '
        f'{oldest} on'
      )
    return rows

  def replace(self, table: str, uid: int, block: int, *values: object) -> None:
    """Replaces the row of a uid from `block` on; needs a transaction."""
    self._end(table, uid, block)
    marks = ', ?' * len(values)
    self.query(
      f'INSERT INTO {table} VALUES (?, ?, ?{marks})', uid, block, NOW, *values
    )

  def remove(self, uid: int, block: int) -> None:
    """Removes the rows of a uid from `block` on; needs a transaction."""
    for table in _HISTORIES:
      self._end(table, uid, block)
    self.query('DELETE FROM votes WHERE uid = ?', uid)
    if self.rules.reveal_epochs:
      self.query('DELETE FROM sealed WHERE uid = ?', uid)

  def last_vote(self, uid: int) -> int | None:
    """Returns the block in which a uid last set weights; None if never."""
    rows = self.query('SELECT block FROM votes WHERE uid = ?', uid)
    if self.rules.reveal_epochs:
      rows += self.query('SELECT block FROM sealed WHERE uid = ?', uid)
    return max((block for (block,) in rows), default=None)

  def vote(self, uid: int, block: int, weights: bytes) -> None:
    """Sets the weights of a uid, or seals them; needs a transaction."""
    if self.rules.reveal_epochs:
      self.query('INSERT INTO sealed VALUES (?, ?, ?)', uid, block, weights)
    else:
      self._set_vote(uid, block, weights)

  def _set_vote(self, uid: int, block: int, weights: bytes) -> None:
    self.query(
      'INSERT INTO votes VALUES (?, ?, ?, ?) ON CONFLICT (uid) '
      'DO UPDATE SET block = excluded.block, weights = excluded.weights',
      uid,
      block,
      weights,
      np.zeros(self.rules.capacity, '<f8').tobytes(),
    )

  def _reveal(self, block: int) -> None:
    """Reveals the weights that are due in the epoch that ends with a block.

    Like the real chain, it drops those of a uid without a permit, silently.
    """
    until = block - self.rules.reveal_epochs * self.rules.tempo
    due = self.query(
      'SELECT s.uid, s.block, s.weights, p.validator FROM sealed s '
      'JOIN peers p ON p.uid = s.uid AND p.until = ? WHERE s.block <= ? '
      'ORDER BY s.block',
      NOW,
      until,
    )
    for uid, voted, weights, permit in due:
      if permit:
        self._set_vote(uid, voted, weights)
    self.query('DELETE FROM sealed WHERE block <= ?', until)

  def _give_permits(self, block: int, paid: dict[int, float]) -> None:
    """Stakes the pay of an epoch, and gives permits to the largest stakes."""
    rows = self.query(
      'SELECT uid, hotkey, stake, validator, registered FROM peers '
      'WHERE until = ? ORDER BY uid',
      NOW,
    )
    stakes = {uid: stake + paid.get(uid, 0.0) for uid, _, stake, _, _ in rows}
    order = sorted(stakes, key=lambda uid: (-stakes[uid], uid))
    holders = {uid for uid in order[: self.rules.permits] if stakes[uid] > 0}
    for uid, hotkey, stake, permit, registered in rows:
      now = stakes[uid], int(uid in holders)
      if now != (stake, permit):
        self.replace('peers', uid, block, hotkey, *now, registered)

  def _end(self, table: str, uid: int, block: int) -> None:
    # A row of this very block ends where it begins, and is never visible.
    self.query(
      f'UPDATE {table} SET until = ? WHERE uid = ? AND until = ?',
      block,
      uid,
      NOW,
    )

  def _read_seal(self) -> int:
    ((self.sealed,),) = self.query('SELECT sealed FROM chain')
    return self.sealed

  def _seal(self, block: int) -> None:
    """Seals all blocks up to `block`; needs a transaction."""
    sealed, tempo = self._read_seal(), self.rules.tempo
    if block <= sealed:
      return
    # All rows so far are valid at sealed + 1, hence at these blocks as well.
    for due in range(max(sealed // tempo + 1, 1) * tempo, block + 1, tempo):
      self._pay(due)
    self.query('UPDATE chain SET sealed = ?', block)
    for table in _HISTORIES:
      self.query(f'DELETE FROM {table} WHERE until <= ?', block - HISTORY)

  def _pay(self, block: int) -> None:
    """Pays the epoch that ends with a block."""
    if self.rules.reveal_epochs:
      self._reveal(block)
    rows = self.query(
      'SELECT p.uid, p.stake, p.validator, p.registered, e.tao, '
      'COALESCE(v.block, p.registered), v.weights, v.bonds FROM peers p '
      'JOIN earned e ON e.uid = p.uid AND e.until = ?1 '
      'LEFT JOIN votes v ON v.uid = p.uid WHERE p.until = ?1 ORDER BY p.uid',
      NOW,
    )
    if not rows:
      return
    uids, stakes, validators, registered, taos, updated, weights, bonds = zip(
      *rows, strict=True
    )
    uids_N = np.array(uids)
    capacity = self.rules.capacity
    result = yuma.epoch(
      yuma.Uids(
        np.array(stakes, float),
        np.array(validators, bool),
        np.array(registered),
        np.array(updated),
      ),
      _matrix(weights, '<u2', uids_N, capacity),
      _matrix(bonds, '<f8', uids_N, capacity),
      block=block,
      tempo=self.rules.tempo,
    )
    paid_N = result.emission_N * self.rules.emission * self.rules.tempo
    if self.rules.permits:
      self._give_permits(block, dict(zip(uids, paid_N.tolist(), strict=True)))
    for i, uid in enumerate(uids):
      if paid_N[i]:
        self.replace('earned', uid, block, taos[i] + float(paid_N[i]))
      if bonds[i] is not None:
        bonds_C = np.zeros(capacity, '<f8')
        bonds_C[uids_N] = result.bonds_NxN[i]
        self.query(
          'UPDATE votes SET bonds = ? WHERE uid = ?', bonds_C.tobytes(), uid
        )

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except sqlite3.Error as e:
      raise interface.ChainUnreachableError(
        f'the chain in {self._where} did not answer ({e}); if this was a '
        'change, look whether it was made before asking again'
      ) from e


def _matrix(
  blobs: tuple[bytes | None, ...],
  dtype: str,
  uids_N: np.ndarray,
  capacity: int,
) -> np.ndarray:
  """Returns float64 [N, N] of N rows stored by uid; None is zeros."""
  matrix_NxC = np.zeros((len(blobs), capacity))
  for row_C, blob in zip(matrix_NxC, blobs, strict=True):
    if blob is not None:
      row_C[:] = np.frombuffer(blob, dtype)
  return matrix_NxC[:, uids_N]


def _connect(path: str, timeout: float) -> sqlite3.Connection:
  return sqlite3.connect(
    path,
    timeout=timeout,
    isolation_level=None,  # transactions are begun by hand
    check_same_thread=False,
    uri=path.startswith('file:'),
  )


def _no_chain(where: str, error: sqlite3.Error) -> interface.ChainError:
  if 'locked' in str(error):
    return interface.ChainUnreachableError(f'{where}: {error}; ask again later')
  return interface.ChainError(
    f'{where}: there is no chain here ({error}); make one with '
    'LocalChain.create, or correct the path'
  )
