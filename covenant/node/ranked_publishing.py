"""Checkpoints that several ranks publish, beside the rounds.

All ranks gather a piece of a tensor together, since each holds shards of it,
and rank 0 puts it. They do so between two polls, while the node would sleep:
their devices must not exchange two things in different orders, as threads
might. Rank 0 puts on threads, and says when there is room for the next piece.
So a slow store delays no round.
"""

import collections
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np

from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.node import base as node_lib
from covenant.node import multihost as multihost_lib
from covenant.node import publishing
from covenant.node import ranked
from covenant.protocol import apply
from covenant.protocol import published_checkpoint
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import pieces as pieces_lib
from covenant.train import placement
from covenant.train import shared_state as shared_state_lib

_PUTS = 8  # pieces that are put at the same time
_PAUSE_SECONDS = 5.0  # after a failure, before the next try
_LATER, _PIECE, _INDEX = 'later', 'piece', 'index'


class RankedPublisher:
  """Publishes the state of a validator of several ranks, in its turn.

  Args:
    process_group: the ranks.
    storage: their storage.

  Attributes:
    failures: the number of puts that failed; each is tried again.
  """

  def __init__(
    self,
    process_group: multihost_lib.ProcessGroup,
    storage: ranked.RankedStorage,
  ):
    self._process_group = process_group
    self._storage = storage
    self._place: apply.Position | None = None
    self._node: node_lib.Node | None = None
    self._pieces: Iterator[tuple[str, np.ndarray]] = iter(())
    self._is_over = False  # True once all pieces are gathered
    self._not_before = 0.0  # by time.monotonic, of the next try of the index
    self._names: list[str] = []  # of the tensor of each piece, in order
    self._digests: list[futures.Future[bytes]] = []  # of rank 0
    self._pool = futures.ThreadPoolExecutor(_PUTS, 'publish')
    self._closed = threading.Event()
    self._lock = threading.Lock()
    self.failures, self._error = 0, ''

  @property
  def is_busy(self) -> bool:
    """True if a state is being published."""
    return self._place is not None

  def start(self, node: node_lib.Node) -> None:
    """Starts to publish the state of a node if it is its turn; cleans up.

    A publication that is still under way goes on, and this turn is left out,
    but for the last state of a run.
    """
    r = node.state.round
    is_free = not self.is_busy or r == node.config.rounds
    if is_free and publishing.is_turn(node, r):
      self._begin(node)
    publishing.cleaning(node, r, publishing.voters(node, r))()

  def _begin(self, node: node_lib.Node) -> None:
    place, host = node.place, node.shared_model.host
    # Arrays on devices are changed in place; those of the host are loaded.
    if not placement.is_offloaded(place.shared):
      copies: ct.PyTree = jax.tree.map(lambda x: x.copy(), place.shared)
      place = place._replace(shared=copies)

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
      for name, leaf in shared_state_lib.named_leaves(place.shared).items():
        for piece in pieces_lib.pieces(host.load(leaf)):
          yield name, piece

    self._place, self._node, self._pieces = place, node, pieces()
    self._is_over, self._names, self._digests = False, [], []

  def work(self, seconds: float) -> None:
    """Publishes for about so many seconds; sleeps if there is nothing to do.

    All ranks call it alike.
    """
    deadline = time.monotonic() + seconds
    while self.is_busy:
      match self._process_group.broadcast_from(
        0, 'publish', lambda: self._next(deadline)
      ):
        case x if x == _PIECE:
          self._take()
        case x if x == _INDEX:
          self._put_index()
        case _:
          break
    time.sleep(max(deadline - time.monotonic(), 0.0))

  def _next(self, deadline: float) -> str:
    """Returns what to do next, on rank 0."""
    waiting = [done for done in self._digests if not done.done()]
    if self._is_over and not waiting and time.monotonic() >= self._not_before:
      return _INDEX
    if self._is_over or time.monotonic() >= deadline or len(waiting) >= _PUTS:
      return _LATER
    return _PIECE

  def _take(self) -> None:
    """Gathers a piece; rank 0 starts to put it."""
    found = next(self._pieces, None)
    if found is None:
      self._is_over = True
      return
    name, piece = found
    self._names.append(name)
    if not self._process_group.index:
      self._digests.append(self._pool.submit(self._put, piece.tobytes()))

  def _put(self, data: bytes) -> bytes:
    """Puts a piece, again until it is there; returns its digest."""
    storage = self._storage.of_first
    digest = run_storage_lib.digest(data)
    while not self._closed.is_set():
      try:
        storage.put_once(storage.chunk_key(digest), data)
        break
      except (store_lib.StoreError, OSError) as e:
        self._failed(e)
      self._closed.wait(_PAUSE_SECONDS)
    return digest

  def _put_index(self) -> None:
    """Puts the index of the pieces; after a failure it is put later."""
    node, place = self._node, self._place
    assert node is not None and place is not None
    listed = self._process_group.broadcast_from(
      0, 'digests', lambda: b''.join(done.result() for done in self._digests)
    )
    files: dict[str, list[str]] = collections.defaultdict(list)
    for i, name in enumerate(self._names):
      files[name].append(listed[32 * i : 32 * i + 32].hex())
    try:
      published_checkpoint.put_index(
        self._storage, place, dict(files), node.chain.sign
      )
    except (chain_lib.ChainError, store_lib.StoreError) as e:
      self._failed(e)
      self._not_before = time.monotonic() + _PAUSE_SECONDS
    else:
      self._place = None

  def _failed(self, error: Exception) -> None:
    with self._lock:
      self.failures += 1
      self._error = f'{type(error).__name__}: {error}'

  def take_error(self) -> str:
    """Returns what failed since this was asked last; empty if nothing did."""
    with self._lock:
      error, self._error = self._error, ''
    return error

  def finish(
    self, waits: bool, stopping: Callable[[], bool], seconds: float
  ) -> None:
    """Ends; nothing can be published afterwards.

    Args:
      waits: True publishes until all is there, a stop, or a store that fails
        for long.
      stopping: returns True on all ranks if they are asked to stop.
      seconds: between two looks.
    """
    before = self.failures

    def is_hopeless() -> bool:
      return self.failures - before >= publishing.LAST_TRIES

    while waits and self.is_busy and not stopping():
      self.work(seconds)
      if self._process_group.broadcast_from(0, 'tries', is_hopeless):
        break
    self._closed.set()
    self._pool.shutdown(cancel_futures=True)


def publisher(
  process_group: multihost_lib.ProcessGroup,
  storage: run_storage_lib.RunStorage,
) -> RankedPublisher | None:
  """Returns the publisher of several ranks; None for one process."""
  if isinstance(storage, ranked.RankedStorage):
    return RankedPublisher(process_group, storage)
  return None
