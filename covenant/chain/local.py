"""A chain in one SQLite file: for one machine, for tests, and for emulation.

Any number of processes open the file; no process runs the chain. Blocks pass
by the clock alone: block n begins at genesis + n * block_seconds. What is due
at a block (an epoch's pay) is computed by whoever first needs a later one.

A block whose state somebody has read is sealed (see `ledger`), so a change is
in the newest block or in the one after it.
"""

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping

import numpy as np

from covenant.chain import interface
from covenant.chain import keys
from covenant.chain import ledger as ledger_lib
from covenant.chain import yuma


class LocalChain:
  """The chain as one hotkey sees it (`interface.Chain`), and its levers.

  Without a key it can be read, and changed by `register` and the like, but
  nothing can be signed. Safe to use from several threads.
  """

  def __init__(
    self,
    ledger: ledger_lib.Ledger,
    key: keys.Key | None = None,
    clock: Callable[[], float] = time.time,
  ):
    self._ledger = ledger
    self._key = key
    self._clock = clock
    self._newest = -1
    self.rules = ledger.rules
    self.block_seconds = ledger.rules.block_seconds
    self.hotkey = key.address if key else ''

  @classmethod
  def create(
    cls,
    path: str | os.PathLike[str],
    seed: bytes,
    rules: ledger_lib.Rules,
    key: keys.Key | None = None,
    clock: Callable[[], float] = time.time,
  ) -> 'LocalChain':
    """A new chain that has not begun.

    Args:
      path: of the file; or ':memory:', which only `seen_by` shares.
      seed: what block hashes derive from. Same seed, same hashes.
      rules: of this chain, for good.
      key: whose view this is.
      clock: Unix seconds.

    Raises:
      ChainError: there is a chain at `path`, or none can be made there.
      ValueError: a rule is out of its range.
    """
    for name in ('block_seconds', 'tempo', 'capacity'):
      if not getattr(rules, name) > 0:
        raise ValueError(f'{name}: expected more than 0, got {rules}')
    return cls(ledger_lib.Ledger.create(path, seed, rules), key, clock)

  @classmethod
  def open(
    cls,
    path: str | os.PathLike[str],
    key: keys.Key | None = None,
    clock: Callable[[], float] = time.time,
    timeout: float = 5.0,
  ) -> 'LocalChain':
    """The chain in a file, for one process.

    Args:
      path: where `create` made it.
      key: whose view this is.
      clock: Unix seconds.
      timeout: seconds to wait for other processes before Unreachable.

    Raises:
      ChainError: there is no chain.
    """
    return cls(ledger_lib.Ledger.open(path, timeout), key, clock)

  @classmethod
  def load(
    cls,
    data: bytes,
    key: keys.Key | None = None,
    clock: Callable[[], float] = time.time,
  ) -> 'LocalChain':
    """The chain that `dump` wrote, in memory.

    Raises:
      ChainError: `data` is not one.
    """
    return cls(ledger_lib.Ledger.load(data), key, clock)

  def dump(self) -> bytes:
    """All state, as an SQLite image. The clock and the key are not in it."""
    return self._ledger.dump()

  def seen_by(self, key: keys.Key) -> 'LocalChain':
    """The same chain for another hotkey, over the same connection."""
    view = copy.copy(self)
    view._key, view.hotkey = key, key.address
    return view

  def close(self) -> None:
    """Closes the connection, which views made by `seen_by` share."""
    self._ledger.close()

  def begin(self, at: float) -> None:
    """Sets the Unix time of block 0, once. Until then `head()` is -1.

    Raises:
      ChainRejectedError: it has begun at another time.
    """
    if not math.isfinite(at):
      raise interface.ChainRejectedError(
        f'begin: expected Unix seconds, got {at}'
      )
    with self._ledger.transaction():
      ((genesis,),) = self._ledger.query('SELECT genesis FROM chain')
      if genesis is None:
        self._ledger.query('UPDATE chain SET genesis = ?', float(at))
      elif genesis != at:
        raise interface.ChainRejectedError(
          f'the chain began at {genesis}, not at {at}'
        )

  def head(self) -> int:
    genesis = self._ledger.genesis
    if genesis is None:
      return -1
    now, step = self._clock(), self.block_seconds
    block = math.floor((now - genesis) / step)
    # The division may be an ulp off; `timestamp(block) <= now` must hold.
    while genesis + (block + 1) * step <= now:
      block += 1
    while genesis + block * step > now:
      block -= 1
    self._newest = max(self._newest, block)  # though clocks be set back
    return self._newest

  def block_hash(self, block: int) -> bytes:
    """See `interface.Chain`; all blocks that have begun can be asked for.

    It follows from the chain's seed, so whoever knows that knows the future:
    emulator and real processes must get the same hashes.
    """
    self._check_begun(block)
    return hashlib.blake2b(
      block.to_bytes(8, 'little') + self._ledger.seed,
      digest_size=32,
      person=b'covenant.block',
    ).digest()

  def timestamp(self, block: int) -> float:
    self._check_begun(block)
    genesis = self._ledger.genesis
    assert genesis is not None
    return genesis + block * self.block_seconds

  def peers(self, block: int) -> tuple[interface.Peer, ...]:
    rows = self._at(block, 'peers', 'uid, hotkey, stake, validator, registered')
    return tuple(
      interface.Peer(uid, hotkey, stake, bool(validator), registered)
      for uid, hotkey, stake, validator, registered in rows
    )

  def commitments(self, block: int) -> dict[int, interface.Commitment]:
    rows = self._at(block, 'commitments', 'uid, since, data')
    return {uid: interface.Commitment(since, data) for uid, since, data in rows}

  def earned(self, block: int) -> dict[int, float]:
    rows = self._at(block, 'earned', 'uid, tao')
    return dict(rows)

  def weights(self) -> dict[int, dict[int, int]]:
    """What each validator said last, as u16, for people to look at."""
    rows = self._ledger.query('SELECT uid, weights FROM votes ORDER BY uid')
    said = {uid: np.frombuffer(blob, '<u2') for uid, blob in rows}
    return {
      uid: {int(j): int(w_N[j]) for j in np.flatnonzero(w_N)}
      for uid, w_N in said.items()
    }

  def commit(self, data: bytes) -> None:
    """See `interface.Chain`; it is in the newest block or in the next."""
    self._signer('commit')
    if len(data) > interface.MAX_COMMITMENT:
      raise interface.ChainRejectedError(
        f'commit: expected {interface.MAX_COMMITMENT} bytes at most, got '
        f'{len(data)}'
      )
    with self._ledger.writing(self.head) as block:
      uid, _, _ = self._registered(self.hotkey)
      last = self._ledger.query(
        'SELECT since FROM commitments WHERE uid = ? AND until = ?',
        uid,
        ledger_lib.NOW,
      )
      if last:
        _check_rate('commit', block, last[0][0], self.rules.commit_interval)
      self._ledger.replace('commitments', uid, block, bytes(data))

  def set_weights(self, weights: Mapping[int, float]) -> None:
    self._signer('set_weights')
    try:
      values = yuma.quantize(weights)
    except ValueError as e:
      raise interface.ChainRejectedError(f'set_weights: {e}') from e
    with self._ledger.writing(self.head) as block:
      uid, validator, _ = self._registered(self.hotkey)
      if not validator:
        raise interface.ChainRejectedError(
          f'set_weights: uid {uid} is not a validator'
        )
      last = self._ledger.query('SELECT block FROM votes WHERE uid = ?', uid)
      if last:
        interval = self.rules.weights_interval
        _check_rate('set_weights', block, last[0][0], interval)
      there = self._ledger.query(
        'SELECT uid FROM peers WHERE until = ?', ledger_lib.NOW
      )
      if unknown := sorted(set(weights) - {u for (u,) in there}):
        raise interface.ChainRejectedError(
          f'set_weights: nobody has the uids {unknown}'
        )
      weights_N = np.zeros(self.rules.capacity, '<u2')
      weights_N[list(values)] = list(values.values())
      self._ledger.query(
        'INSERT INTO votes VALUES (?, ?, ?, ?) ON CONFLICT (uid) '
        'DO UPDATE SET block = excluded.block, weights = excluded.weights',
        uid,
        block,
        weights_N.tobytes(),
        np.zeros(self.rules.capacity, '<f8').tobytes(),
      )

  def sign(self, data: bytes) -> bytes:
    """See `interface.Chain`.

    Raises:
      ChainRejectedError: the chain was opened without a key.
    """
    return self._signer('sign').sign(data)

  def verify(self, hotkey: str, data: bytes, signature: bytes) -> bool:
    return keys.verify(hotkey, data, signature)

  def register(self, hotkey: str, stake: float, validator: bool) -> int:
    """Gives a hotkey a uid: its own, else a free one, else a poor peer's.

    Replaced is who has earned least and is not immune; of several, who came
    first. Nothing of the old peer is left: another `registered`, no
    commitment, no weights, no bonds, nothing earned.

    Raises:
      ChainRejectedError: every uid is taken by a peer that is immune; or a bad stake.
    """
    _check_stake(stake)
    with self._ledger.writing(self.head) as block:
      rows = self._ledger.query(
        'SELECT hotkey, uid FROM peers WHERE until = ?', ledger_lib.NOW
      )
      taken = dict(rows)
      if hotkey in taken:
        return taken[hotkey]
      free = set(range(self.rules.capacity)).difference(taken.values())
      uid = min(free) if free else self._poorest(block)
      self._ledger.remove(uid, block)
      self._ledger.replace(
        'peers', uid, block, hotkey, float(stake), int(validator), block
      )
      self._ledger.replace('earned', uid, block, 0.0)
    return uid

  def set_stake(self, hotkey: str, stake: float) -> None:
    """Raises Refused where the hotkey is not registered or the stake bad."""
    _check_stake(stake)
    with self._ledger.writing(self.head) as block:
      uid, validator, registered = self._registered(hotkey)
      self._ledger.replace(
        'peers', uid, block, hotkey, float(stake), validator, registered
      )

  def deregister(self, hotkey: str) -> None:
    """Frees the uid. Raises Refused where the hotkey is not registered."""
    with self._ledger.writing(self.head) as block:
      self._ledger.remove(self._registered(hotkey)[0], block)

  def _signer(self, action: str) -> keys.Key:
    if self._key is None:
      raise interface.ChainRejectedError(
        f'{action}: this chain was opened without a key; use '
        'LocalChain.open(path, key) or seen_by(key)'
      )
    return self._key

  def _check_begun(self, block: int) -> None:
    if not 0 <= block <= self.head():
      raise interface.ChainRejectedError(
        f'block {block}: expected 0 to {self.head()}, the newest'
      )

  def _registered(self, hotkey: str) -> tuple[int, int, int]:
    """Its uid, whether it is a validator, and since which block it is there."""
    rows = self._ledger.query(
      'SELECT uid, validator, registered FROM peers '
      'WHERE hotkey = ? AND until = ?',
      hotkey,
      ledger_lib.NOW,
    )
    if not rows:
      raise interface.ChainRejectedError(f'hotkey {hotkey} is not registered')
    return rows[0]

  def _at(self, block: int, table: str, columns: str) -> list[tuple]:
    self._check_begun(block)
    return self._ledger.rows_at(block, table, columns, self.head)

  def _poorest(self, block: int) -> int:
    rows = self._ledger.query(
      'SELECT p.uid FROM peers p JOIN earned e ON e.uid = p.uid '
      'AND e.until = ?1 WHERE p.until = ?1 AND p.registered <= ?2 '
      'ORDER BY e.tao, p.registered, p.uid LIMIT 1',
      ledger_lib.NOW,
      block - self.rules.immunity,
    )
    if not rows:
      raise interface.ChainRejectedError(
        f'register: all {self.rules.capacity} uids are taken, and every peer '
        f'is within its first {self.rules.immunity} blocks; try again later'
      )
    return rows[0][0]


def _check_stake(stake: float) -> None:
  if not (math.isfinite(stake) and stake >= 0):
    raise interface.ChainRejectedError(
      f'stake: expected 0 TAO or more, got {stake}'
    )


def _check_rate(what: str, block: int, last: int, interval: int) -> None:
  if block - last < interval:
    raise interface.ChainRejectedError(
      f'{what}: again in block {block} after block {last}; the chain takes '
      f'one in {interval} blocks, so wait until block {last + interval}'
    )
