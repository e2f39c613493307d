"""A chain in one SQLite file: for one machine, for tests, and for emulation.

Any number of processes open the file; no process runs the chain. Blocks pass
by the clock alone: block n begins at genesis + n * block_seconds. The pay of an
epoch is computed by the process that first needs a later block.

A block whose state a process has read is sealed (see `storage`), so a change
belongs to the newest block or to the one after it.
"""

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping

import numpy as np

from covenant.chain import clock as clock_lib
from covenant.chain import interface
from covenant.chain import keys
from covenant.chain import storage as storage_lib
from covenant.chain import yuma


class LocalChain:
  """The chain as one hotkey sees it (`interface.Chain`), and its controls.

  Without a key it can be read, and changed by `register` and the like, but it
  cannot sign. Safe to use from several threads.
  """

  def __init__(
    self,
    storage: storage_lib.ChainStorage,
    key: keys.Key | None = None,
    clock: Callable[[], float] | None = None,
  ):
    self._storage = storage
    self._key = key
    self._clock = clock or clock_lib.machine_clock(storage)
    self._newest = -1
    self.rules = storage.rules
    self.block_seconds = storage.rules.block_seconds
    self.hotkey = key.address if key else ''

  @classmethod
  def create(
    cls,
    path: str | os.PathLike[str],
    seed: bytes,
    rules: storage_lib.ChainRules,
    key: keys.Key | None = None,
    clock: Callable[[], float] | None = None,
  ) -> 'LocalChain':
    """Creates a chain that has not begun.

    Args:
      path: the file; or ':memory:', which only `seen_by` shares.
      seed: the seed of the block hashes.
      rules: the rules of the chain, which never change.
      key: the key of this view.
      clock: returns Unix seconds; None is the machine's.

    Raises:
      ChainError: there is a chain at `path`, or none can be created there.
      ValueError: a rule is out of its range.
    """
    for name in ('block_seconds', 'tempo', 'capacity'):
      if not getattr(rules, name) > 0:
        raise ValueError(f'{name}: expected more than 0, got {rules}')
    return cls(storage_lib.ChainStorage.create(path, seed, rules), key, clock)

  @classmethod
  def open(
    cls,
    path: str | os.PathLike[str],
    key: keys.Key | None = None,
    clock: Callable[[], float] | None = None,
    timeout: float = 5.0,
  ) -> 'LocalChain':
    """Opens the chain in a file, for one process.

    Args:
      path: the file that `create` made.
      key: the key of this view.
      clock: returns Unix seconds; None is the machine's.
      timeout: seconds to wait for other processes before a
        ChainUnreachableError.

    Raises:
      ChainError: there is no chain.
    """
    return cls(storage_lib.ChainStorage.open(path, timeout), key, clock)

  @classmethod
  def load(
    cls,
    data: bytes,
    key: keys.Key | None = None,
    clock: Callable[[], float] | None = None,
  ) -> 'LocalChain':
    """Loads the image of a chain from `dump`, in memory.

    Raises:
      ChainError: `data` is no such image.
    """
    return cls(storage_lib.ChainStorage.load(data), key, clock or time.time)

  def dump(self) -> bytes:
    """Returns all state as an SQLite image, without the clock and the key."""
    return self._storage.dump()

  def seen_by(self, key: keys.Key) -> 'LocalChain':
    """Returns the same chain for another hotkey, over the same connection."""
    view = copy.copy(self)
    view._key, view.hotkey = key, key.address
    return view

  def close(self) -> None:
    """Closes the connection, which views made by `seen_by` share."""
    self._storage.close()

  def begin(self, at: float) -> None:
    """Sets the Unix time of block 0, once. Until then `head()` is -1.

    Raises:
      ChainRejectedError: it has begun at another time.
    """
    if not math.isfinite(at):
      raise interface.ChainRejectedError(
        f'begin: expected Unix seconds, got {at}'
      )
    with self._storage.transaction():
      ((genesis,),) = self._storage.query('SELECT genesis FROM chain')
      if genesis is None:
        self._storage.query('UPDATE chain SET genesis = ?', float(at))
      elif genesis != at:
        raise interface.ChainRejectedError(
          f'the chain began at {genesis}, not at {at}'
        )

  def head(self) -> int:
    genesis = self._storage.genesis
    if genesis is None:
      return -1
    now, step = self._clock(), self.block_seconds
    block = math.floor((now - genesis) / step)
    # The division may be an ulp off; `timestamp(block) <= now` must hold.
    while genesis + (block + 1) * step <= now:
      block += 1
    while genesis + block * step > now:
      block -= 1
    self._newest = max(self._newest, block)  # even if the clock is set back
    return self._newest

  def block_hash(self, block: int) -> bytes:
    """See `interface.Chain`; every block that has begun has a hash.

    Hashes follow from the chain's seed, since emulator and real processes must
    get the same ones. So a node with the seed could predict them.
    """
    self._check_begun(block)
    return hashlib.blake2b(
      block.to_bytes(8, 'little') + self._storage.seed,
      digest_size=32,
      person=b'covenant.block',
    ).digest()

  def timestamp(self, block: int) -> float:
    self._check_begun(block)
    genesis = self._storage.genesis
    assert genesis is not None
    return genesis + block * self.block_seconds

  def peers(self, block: int) -> tuple[interface.Peer, ...]:
    rows = self._at(block, 'peers', 'uid, hotkey, stake, validator, registered')
    return tuple(
      interface.Peer(uid, hotkey, stake, bool(validator), registered)
      for uid, hotkey, stake, validator, registered in rows
    )

  def commitments(self, block: int) -> dict[int, interface.CommittedData]:
    rows = self._at(block, 'commitments', 'uid, since, data')
    return {
      uid: interface.CommittedData(since, data) for uid, since, data in rows
    }

  def earned(self, block: int) -> dict[int, float]:
    rows = self._at(block, 'earned', 'uid, tao')
    return dict(rows)

  def weights(self) -> dict[int, dict[int, int]]:
    """Returns the last weights of each validator, as u16, for people."""
    rows = self._storage.query('SELECT uid, weights FROM votes ORDER BY uid')
    said = {uid: np.frombuffer(blob, '<u2') for uid, blob in rows}
    return {
      uid: {int(j): int(w_N[j]) for j in np.flatnonzero(w_N)}
      for uid, w_N in said.items()
    }

  def commit(self, data: bytes) -> None:
    """See `interface.Chain`; included in the newest block or the next one."""
    self._signer('commit')
    if len(data) > interface.MAX_COMMITMENT:
      raise interface.ChainRejectedError(
        f'commit: expected {interface.MAX_COMMITMENT} bytes at most, got '
        f'{len(data)}'
      )
    with self._storage.writing(self.head) as block:
      uid, _, _ = self._registered(self.hotkey)
      last = self._storage.query(
        'SELECT since FROM commitments WHERE uid = ? AND until = ?',
        uid,
        storage_lib.NOW,
      )
      if last:
        _check_rate('commit', block, last[0][0], self.rules.commit_interval)
      self._storage.replace('commitments', uid, block, bytes(data))

  def set_weights(self, weights: Mapping[int, float]) -> None:
    self._signer('set_weights')
    try:
      values = yuma.quantize(weights)
    except ValueError as e:
      raise interface.ChainRejectedError(f'set_weights: {e}') from e
    with self._storage.writing(self.head) as block:
      uid, validator, _ = self._registered(self.hotkey)
      if not validator:
        raise interface.ChainRejectedError(
          f'set_weights: uid {uid} is not a validator'
        )
      last = self._storage.last_vote(uid)
      if last is not None:
        interval = self.rules.weights_interval
        _check_rate('set_weights', block, last, interval)
      there = self._storage.query(
        'SELECT uid FROM peers WHERE until = ?', storage_lib.NOW
      )
      if unknown := sorted(set(weights) - {u for (u,) in there}):
        raise interface.ChainRejectedError(
          f'set_weights: expected registered uids; got uids {unknown}'
        )
      weights_N = np.zeros(self.rules.capacity, '<u2')
      weights_N[list(values)] = list(values.values())
      self._storage.vote(uid, block, weights_N.tobytes())

  def check_weights(
    self, weights: Mapping[int, float], sent: int
  ) -> str | None:
    last = max(self.head() - 1, 0)  # of the newest block changes may come
    hotkeys = {peer.hotkey: peer for peer in self.peers(last)}
    me = hotkeys.get(self.hotkey)
    if me is None:
      return f'weights of block {sent} are not in force: not registered'
    if self.weights().get(me.uid) == yuma.quantize(weights):
      return ''
    rules = self.rules
    due = sent + (rules.reveal_epochs + 1) * rules.tempo + 1
    if rules.reveal_epochs and last < due:
      return None
    why = '' if me.permit else f'; uid {me.uid} has no validator permit'
    return (
      f'weights of block {sent} are not in force: the chain has others{why}'
    )

  def subnet(self, age: int = 0) -> interface.Subnet:
    return self.rules.subnet(self.head(), age)

  def sign(self, data: bytes) -> bytes:
    """See `interface.Chain`.

    Raises:
      ChainRejectedError: the chain was opened without a key.
    """
    return self._signer('sign').sign(data)

  def verify(self, hotkey: str, data: bytes, signature: bytes) -> bool:
    return keys.verify(hotkey, data, signature)

  def register(self, hotkey: str, stake: float, validator: bool) -> int:
    """Gives a hotkey a uid: its own, else a free one, else the poorest peer's.

    The peer that has earned least and is not immune is replaced; among equals,
    the oldest. Its commitment, weights, bonds and pay are removed.

    Raises:
      ChainRejectedError: all uids belong to immune peers, or a bad stake.
    """
    _check_stake(stake)
    with self._storage.writing(self.head) as block:
      rows = self._storage.query(
        'SELECT hotkey, uid FROM peers WHERE until = ?', storage_lib.NOW
      )
      taken = dict(rows)
      if hotkey in taken:
        return taken[hotkey]
      free = set(range(self.rules.capacity)).difference(taken.values())
      uid = min(free) if free else self._poorest(block)
      self._storage.remove(uid, block)
      self._storage.replace(
        'peers', uid, block, hotkey, float(stake), int(validator), block
      )
      self._storage.replace('earned', uid, block, 0.0)
    return uid

  def set_stake(self, hotkey: str, stake: float) -> None:
    """Sets a stake.

    Raises:
      ChainRejectedError: the hotkey is not registered, or a bad stake.
    """
    _check_stake(stake)
    with self._storage.writing(self.head) as block:
      uid, validator, registered = self._registered(hotkey)
      self._storage.replace(
        'peers', uid, block, hotkey, float(stake), validator, registered
      )

  def set_permit(self, hotkey: str, permit: bool) -> None:
    """Gives a validator permit or takes it; for rules without `permits`.

    Raises:
      ChainRejectedError: the hotkey is not registered.
    """
    with self._storage.writing(self.head) as block:
      uid, _, registered = self._registered(hotkey)
      ((stake,),) = self._storage.query(
        'SELECT stake FROM peers WHERE uid = ? AND until = ?',
        uid,
        storage_lib.NOW,
      )
      self._storage.replace(
        'peers', uid, block, hotkey, stake, int(permit), registered
      )

  def deregister(self, hotkey: str) -> None:
    """Frees a uid; raises ChainRejectedError if it is not registered."""
    with self._storage.writing(self.head) as block:
      self._storage.remove(self._registered(hotkey)[0], block)

  def _signer(self, action: str) -> keys.Key:
    if self._key is None:
      raise interface.ChainRejectedError(
        f'{action}: opened without a key; use open(path, key) or seen_by(key)'
      )
    return self._key

  def _check_begun(self, block: int) -> None:
    if not 0 <= block <= self.head():
      raise interface.ChainRejectedError(
        f'block {block}: expected 0 to {self.head()}, the newest'
      )

  def _registered(self, hotkey: str) -> tuple[int, int, int]:
    """Returns the uid, validator flag and registration block of a hotkey."""
    rows = self._storage.query(
      'SELECT uid, validator, registered FROM peers '
      'WHERE hotkey = ? AND until = ?',
      hotkey,
      storage_lib.NOW,
    )
    if not rows:
      raise interface.ChainRejectedError(f'hotkey {hotkey} is not registered')
    return rows[0]

  def _at(self, block: int, table: str, columns: str) -> list[tuple]:
    self._check_begun(block)
    return self._storage.rows_at(block, table, columns, self.head)

  def _poorest(self, block: int) -> int:
    rows = self._storage.query(
      'SELECT p.uid FROM peers p JOIN earned e ON e.uid = p.uid '
      'AND e.until = ?1 WHERE p.until = ?1 AND p.registered <= ?2 '
      'ORDER BY e.tao, p.registered, p.uid LIMIT 1',
      storage_lib.NOW,
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
