"""Faults as data: what fails, for which nodes, in which blocks.

Whether a fault strikes is a pure function of the plan, the seed, the block, the
node and the operation, so a run with faults is as repeatable as one without.
Every strike is counted: a test whose faults never strike tests nothing.

This module injects faults into the chain and the buckets as one node sees them
(`Faults` is an `environment.Environment`). Faults of a node itself (it dies,
its clock is off, its memory is corrupted) are injected by `network`.
"""

import collections
import enum
import hashlib
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from covenant import proxy
from covenant.chain import interface as chain_lib
from covenant.emulate import environment
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib


class Kind(enum.Enum):
  """The kinds of faults."""

  # A node:
  KILL = 'killed'
  BUSY = 'slow to train'  # by `amount` blocks
  SKEW = 'clock off'  # by `amount` seconds
  TWO = 'two manifests signed'
  FORGED = 'checkpoint forged'
  FLIP = 'bit flipped'  # in its parameters
  DISK = 'disk full'  # nothing can be saved
  LEAVE = 'left'
  JOIN = 'joined'
  SILENT = 'silent permit holder'  # registered, and runs nothing
  PERMIT = 'permit gained'  # by a miner
  STAKE = 'stake changed'
  ATTACK = 'attack'  # by a manifest, a vote or a message
  STRANGER = 'stranger'  # registered, or committed to nothing
  # The chain as it sees it:
  UNREACHABLE = 'chain unreachable'
  LAG = 'chain lags'  # by `amount` blocks
  FORK = 'block taken back'  # the newest one was another
  ORPHAN = 'commitment taken back'
  ANSWER = 'answer lost'  # what was committed is on the chain
  # A bucket as it sees it:
  DOWN = 'store down'
  SLOW = 'store slow'  # nothing comes before the deadline, `amount` blocks
  CORRUPT = 'object corrupted'
  STALE = 'object stale'  # the bytes of an earlier one
  MISSING = 'object missing'
  FULL = 'bucket full'


class Fault(NamedTuple):
  """One fault.

  `names` are the nodes that suffer it, `owners` those whose buckets it
  concerns; none means all.
  """

  kind: Kind
  blocks: range
  names: frozenset[str] = frozenset()
  owners: frozenset[str] = frozenset()
  amount: float = 0.0
  rate: float = 1.0  # of the occasions

  def strikes(
    self, seed: int, block: int, name: str, owner: str = '', what: str = ''
  ) -> bool:
    """True if the fault strikes on this occasion."""
    if block not in self.blocks:
      return False
    if self.names and name not in self.names:
      return False
    if self.owners and owner not in self.owners:
      return False
    return self.rate >= 1 or self.rate > draw(
      seed, self.kind.value, block, name, owner, what
    )


def draw(*occasion: object) -> float:
  """Returns a number in [0, 1) that is a function of the occasion.

  >>> draw(0, 'killed', 3, '1') == draw(0, 'killed', 3, '1')
  True
  """
  text = '/'.join(map(str, occasion)).encode()
  digest = hashlib.blake2b(text, digest_size=8).digest()
  return int.from_bytes(digest, 'little') / 2**64


class Kill(NamedTuple):
  """The death of a node (kill -9) and the time that it is down."""

  name: str
  round: int
  phase: round_lib.Phase
  # When: BEFORE the phase, after so many of its writes to chain and bucket
  # (at its end if there are fewer), or AFTER the phase, with nothing saved.
  writes: int = 0
  down: int = 1  # blocks

  @property
  def when(self) -> str:
    names = {BEFORE: 'before', AFTER: 'after'}
    return names.get(self.writes, f'after write {self.writes} of')


BEFORE, AFTER = 0, -1


class Killed(BaseException):
  """Ends a node in the middle of a phase. No code of nodes catches it."""


class Faults(environment.Environment):
  """An environment with faults.

  Args:
    plan: the faults.
    kills: the deaths of nodes, each of which happens once.
    seed: of the random faults.
  """

  def __init__(
    self,
    plan: Iterable[Fault] = (),
    kills: Iterable[Kill] = (),
    seed: int = 0,
  ):
    self.plan = list(plan)
    self.kills = list(kills)
    self.count: collections.Counter[Kind] = collections.Counter()
    self.delay: collections.Counter[str] = collections.Counter()  # blocks
    self.block = 0
    self._seed = seed
    self._lock = threading.Lock()  # gathering is done by threads
    self._armed: dict[str, Kill] = {}
    self._writes: collections.Counter[str] = collections.Counter()
    # All that was ever put, by key; what was first put of each kind, by owner.
    self.written: dict[str, list[bytes]] = {}
    self._first: dict[tuple[str, str], bytes] = {}

  def chain(self, name: str, chain: chain_lib.Chain) -> chain_lib.Chain:
    return proxy.make(
      chain_lib.Chain,
      _FaultyChain(self, name, chain).call,
      hotkey=chain.hotkey,
      block_seconds=chain.block_seconds,
      faults=self,
    )

  def bucket(
    self, name: str, owner: str, bucket: store_lib.Bucket
  ) -> store_lib.Bucket:
    call = _FaultyBucket(self, name, owner, bucket).call
    return proxy.make(store_lib.Bucket, call, location=bucket.location)

  def strikes(
    self, kind: Kind, name: str, owner: str = '', what: str = ''
  ) -> Fault | None:
    """Returns the fault that strikes now, if any, without counting it."""
    for fault in self.plan:
      if fault.kind is kind and fault.strikes(
        self._seed, self.block, name, owner, what
      ):
        return fault
    return None

  def struck(self, kind: Kind) -> None:
    with self._lock:
      self.count[kind] += 1

  def strike(
    self, kind: Kind, name: str, owner: str = '', what: str = ''
  ) -> Fault | None:
    """Returns what `strikes` does, and counts the strike."""
    fault = self.strikes(kind, name, owner, what)
    if fault is not None:
      self.struck(kind)
    return fault

  def begin(self, name: str, command: round_lib.Command) -> None:
    """Begins a phase of a node; raises Killed if the node dies before it."""
    self._writes[name] = 0
    self._armed.pop(name, None)
    for kill in self.kills:
      if kill[:3] == (name, command.round, command.phase):
        self.kills.remove(kill)
        self._armed[name] = kill
        break
    self._die(name, BEFORE)

  def end(self, name: str) -> None:
    """Ends the phase; raises Killed if the node dies after it."""
    if name in self._armed:
      self._die(name, self._armed[name].writes)

  def wrote(self, name: str) -> None:
    """Counts a write of a node; raises Killed if the node dies after it."""
    self._writes[name] += 1
    self._die(name, self._writes[name])

  def _die(self, name: str, writes: int) -> None:
    kill = self._armed.get(name)
    if kill is not None and kill.writes == writes:
      del self._armed[name]
      self.struck(Kind.KILL)
      raise Killed(kill)

  def remember(self, owner: str, key: str, data: bytes) -> None:
    """Records an object that was put."""
    copies = self.written.setdefault(key, [])
    if data not in copies:
      copies.append(data)
    self._first.setdefault((owner, _kind(key)), data)

  def stale(self, owner: str, key: str) -> bytes | None:
    """Returns the first object of the kind of a key, if any."""
    return self._first.get((owner, _kind(key)))


def _kind(key: str) -> str:
  return key.split('/')[1]


class _FaultyChain:
  """A chain as one node sees it."""

  def __init__(self, faults: Faults, name: str, chain: chain_lib.Chain):
    self._faults = faults
    self._name = name
    self._chain = chain

  def call(self, method: str, *args: Any) -> Any:
    """Calls a method of the chain, unless a fault strikes."""
    if method in ('sign', 'verify'):
      return getattr(self._chain, method)(*args)
    if method in ('head', 'commit', 'set_weights', 'check_weights', 'subnet'):
      self._reach(method)
    else:
      self._see(args[0])
    if method == 'commit' and self._strike(Kind.ORPHAN):
      return None
    answer = getattr(self._chain, method)(*args)
    match method:
      case 'head':
        if fault := self._strike(Kind.LAG):
          return max(answer - int(fault.amount), 0)
      case 'commit' | 'set_weights':
        self._faults.wrote(self._name)
        if method == 'commit' and self._strike(Kind.ANSWER):
          raise chain_lib.ChainUnreachableError(
            'injected: no answer, though it is done'
          )
      case 'block_hash' | 'peers' | 'commitments' if self._forked(args[0]):
        return _other_fork(method, args[0], answer)
    return answer

  def _strike(self, kind: Kind) -> Fault | None:
    return self._faults.strike(kind, self._name)

  def _reach(self, what: str) -> None:
    if self._faults.strike(Kind.UNREACHABLE, self._name, what=what):
      raise chain_lib.ChainUnreachableError(
        'injected: the chain does not answer'
      )

  def _see(self, block: int) -> None:
    """Raises ChainRejectedError for a block that this node does not see."""
    self._reach('state')
    fault = self._faults.strikes(Kind.LAG, self._name)
    if fault is not None and block > self._chain.head() - fault.amount:
      raise chain_lib.ChainRejectedError(
        f'injected: block {block} is not here yet'
      )

  def _forked(self, block: int) -> bool:
    """Returns whether this node sees another fork; no fork has old blocks."""
    if block < self._chain.head():
      return False
    return self._strike(Kind.FORK) is not None


def _other_fork(method: str, block: int, answer: Any) -> Any:
  """Returns the answer of a fork that lost: other hash, stakes, commitments."""
  match method:
    case 'block_hash':
      return hashlib.blake2b(answer, digest_size=32).digest()
    case 'peers':
      return tuple(p._replace(stake=p.stake + 1e6 * p.uid) for p in answer)
  return {u: c for u, c in answer.items() if c.block < block}


class _FaultyBucket:
  """A bucket as one node sees it."""

  def __init__(
    self, faults: Faults, name: str, owner: str, bucket: store_lib.Bucket
  ):
    self._faults = faults
    self._who = name, owner
    self._bucket = bucket

  def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of the bucket, unless a fault strikes."""
    (name, owner), first = self._who, args[0]
    key = first if isinstance(first, str) else ' '.join(first)
    self._reach(key)
    if method in ('get', 'head') and self._strike(Kind.MISSING, key):
      raise store_lib.MissingObjectError(f'injected: there is no {key}')
    if method == 'put' and self._strike(Kind.FULL, key):
      raise store_lib.StoreError('injected: no space left on device')
    answer = getattr(self._bucket, method)(*args, **kwargs)
    match method:
      case 'put':
        self._faults.remember(owner, key, args[1])
        self._faults.wrote(name)
      case 'delete':
        self._faults.wrote(name)
      case 'get':
        return self._spoil(key, answer)
      case 'list':
        for kind in Kind.STALE, Kind.MISSING:
          if answer and self._strike(kind, key):
            return answer[:-1]
    return answer

  def _strike(self, kind: Kind, what: str) -> Fault | None:
    return self._faults.strike(kind, *self._who, what)

  def _spoil(self, key: str, data: bytes) -> bytes:
    """Returns the data, with a flipped bit, or an older object instead."""
    if self._strike(Kind.CORRUPT, key):
      if not data:
        return b'?'
      middle = len(data) // 2
      return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    stale = self._faults.stale(self._who[1], key)
    if stale is not None and stale != data and self._strike(Kind.STALE, key):
      return stale
    return data

  def _reach(self, what: str) -> None:
    if self._strike(Kind.DOWN, what):
      raise store_lib.StoreUnavailableError('injected: no connection')
    if fault := self._strike(Kind.SLOW, what):
      # Calls of a phase run side by side, so they all take as long as one.
      name = self._who[0]
      self._faults.delay[name] = max(
        self._faults.delay[name], int(fault.amount)
      )
      raise store_lib.StoreUnavailableError(
        'injected: not there within the deadline'
      )
