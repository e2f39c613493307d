"""Catch-up: a node that joins or fell behind gets the state of the others.

The node starts from its own state, a validator's checkpoint, or the initial
state of the run, and replays the later rounds through the code that applied
them on every other node. Histories and checkpoints may come from liars. The
history is proven from the chain (history.py), and a checkpoint is used only if
a later manifest of this history names its fingerprint, which is known before a
byte of it is fetched. A checkpoint of the newest round is not used before a
majority votes on that round; the one before it is, and the rounds since are
replayed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.protocol import ahead as ahead_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import history as history_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import rollback
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib

Source = history_lib.Source

_OWN, _GENESIS = 'own', 'genesis'


class Refused(NamedTuple):
  """A state that has led a node to a mismatch, which it does not try again."""

  origin: str  # hotkey of the validator that published it, or 'own'
  round: int


class _Base(NamedTuple):
  """A state to replay from."""

  name: Refused
  root: bytes
  load: Callable[[], apply.Position]


class CatchUp:
  """One attempt to catch up, at one block.

  Args:
    chain: the chain as the node sees it.
    storage: the storage of the node.
    shared_model: the model of the run.
    schedule: the blocks of the phases.
    head: the newest block.
    rounds: the number of rounds of the run.
    refused: what the node has found wrong in earlier attempts; this one adds
      to it.
    amendments: those that the schedule and the rounds are by. A position with
      others may be wrong, see rejoin.py.

  Attributes:
    target: the round to reach: all rounds before it are decided.
    replayed: the manifests that `run` applied, by round, as in a history.

  Raises:
    ChainError: the chain cannot be read.
  """

  def __init__(
    self,
    chain: chain_lib.Chain,
    storage: run_storage_lib.RunStorage,
    shared_model: shared_state_lib.SharedModel,
    schedule: round_lib.Schedule,
    head: int,
    rounds: int,
    refused: set[Refused] | None = None,
    amendments: Sequence[amendment_lib.Amendment] = (),
  ):
    self.replayed: dict[int, bytes] = {}
    self._chain = chain
    self._storage = storage
    self._shared_model = shared_model
    self._refused = set() if refused is None else refused
    self._view = history_lib.view(
      chain,
      storage,
      schedule,
      shared_model.run,
      head,
      rounds,
      lambda r: amendments_lib.model(shared_model, amendments, r).most_entries,
    )
    self.target = self._view.target
    self._listed: dict[int, list[Source]] | None = None
    self._indexes: dict[int, list[tuple[Source, published_checkpoint.Index]]]
    self._indexes = {}

  def run(self, position: apply.Position | None) -> apply.Position:
    """Returns the position of the others.

    It includes all rounds that were decided before the round of this block
    began. The chain says how the last of them was decided.

    Args:
      position: the position of the node; None if it cannot be trusted.

    Raises:
      apply.OutOfSyncError: no available history leads to the root that the
        chain vouches for.
      StoreError: an object cannot be had now.
    """
    reasons: list[Exception] = []
    for anchor in history_lib.anchors(self._view):
      history = history_lib.History(self._view, anchor)
      for base in self._bases(history, position):
        try:
          place = self._replay(base, history)
          self._refused.discard(Refused(_OWN, place.round))
          return place
        except (apply.OutOfSyncError, store_lib.StoreError) as e:
          reasons.append(e)
      reasons += history.unavailable
      if any(isinstance(e, store_lib.StoreError) for e in reasons):
        raise store_lib.StoreUnavailableError(
          f'cannot catch up: {_joined(reasons)}'
        )
      reasons.append(
        apply.OutOfSyncError(
          f'no state that is here or published leads to the root '
          f'{anchor.root.hex()} that validators have in round {anchor.round}'
        )
      )
    raise apply.OutOfSyncError(f'cannot catch up: {_joined(reasons)}')

  def published(self) -> list[int]:
    """Returns the rounds up to the target that checkpoints are listed for."""
    return sorted(self._sources_of_rounds())

  def checkpoint(self, round_index: int) -> apply.Position | None:
    """Returns the published state before a round.

    None is returned if no manifest that the chain vouches for names the
    fingerprint of a checkpoint of this round.

    Raises:
      StoreError: it cannot be had now.
    """
    for anchor in history_lib.anchors(self._view):
      history = history_lib.History(self._view, anchor)
      for base in self._checkpoints(history, round_index):
        return base.load()
    return None

  def _bases(
    self, history: history_lib.History, position: apply.Position | None
  ) -> Iterator[_Base]:
    """Yields states of a history, in the order in which they are tried.

    The own state comes first: what it lacks is less than a checkpoint.
    """
    if position is not None and position.round <= self.target:
      own = Refused(_OWN, position.round)
      if own not in self._refused:
        yield _Base(own, position.root, lambda: position)
    for r in sorted(self._sources_of_rounds(), reverse=True):
      yield from self._checkpoints(history, r)
    root = manifest_lib.genesis(self._shared_model.run)
    first = self._shared_model.genesis.first_round
    yield _Base(Refused(_GENESIS, first), root, self._genesis)

  def _checkpoints(
    self, history: history_lib.History, round_index: int
  ) -> Iterator[_Base]:
    """Yields the checkpoints of a round that a later manifest vouches for.

    All of them have the same pieces, which are fetched from whoever has them.
    """
    r = round_index
    fitting = []
    for source, index in self._read(r):
      name = Refused(source.hotkey, r)
      if not history.leads_from(r, bytes.fromhex(index.root)):
        continue
      vouched = history.fingerprint(r)
      if vouched == index.fingerprint:
        fitting.append((name, source, index))
      elif vouched is not None:
        self._refused.add(name)
    if fitting:
      name, _, index = fitting[0]
      first = [source for _, source, _ in fitting]
      rest = [source for source in self._view.sources if source not in first]
      buckets = [source.bucket for source in (*first, *rest)]
      yield _Base(
        name,
        bytes.fromhex(index.root),
        lambda: published_checkpoint.load(
          self._storage, index, buckets, self._shared_model
        ),
      )

  def _sources_of_rounds(self) -> dict[int, list[Source]]:
    """Returns the validators that list a checkpoint, by round.

    A validator whose bucket fails now is skipped, and of one that lists many
    the newest are looked at.
    """
    if self._listed is None:
      self._listed = {}
      buckets = [source.bucket for source in self._view.sources]
      lists = self._storage.rounds_of_each('checkpoints', buckets)
      for source, rounds in zip(self._view.sources, lists, strict=True):
        if isinstance(rounds, store_lib.StoreError):
          continue
        past = [r for r in rounds if r <= self.target]
        for r in past[-published_checkpoint.MOST_ROUNDS :]:
          self._listed.setdefault(r, []).append(source)
    return self._listed

  def _read(
    self, round_index: int
  ) -> list[tuple[Source, published_checkpoint.Index]]:
    """Returns the well-formed indexes of a round; remembers the others."""
    r = round_index
    if r not in self._indexes:
      self._indexes[r] = []
      sources = [
        source
        for source in self._sources_of_rounds().get(r, [])
        if Refused(source.hotkey, r) not in self._refused
      ]
      layout = published_checkpoint.layout(self._shared_model)
      got = self._storage.fetch_each(
        self._storage.key('checkpoints', r),
        [source.bucket for source in sources],
        layout.index_bytes,
      )
      for source, data in zip(sources, got, strict=True):
        if isinstance(data, store_lib.ObjectTooLargeError):
          self._refused.add(Refused(source.hotkey, r))
        if isinstance(data, store_lib.StoreError):
          continue
        try:
          index = published_checkpoint.decode(
            data, layout, source.hotkey, self._chain.verify
          )
          if index.round != r:
            raise apply.OutOfSyncError(f'of round {index.round}, not {r}')
          self._indexes[r].append((source, index))
        except apply.OutOfSyncError:
          self._refused.add(Refused(source.hotkey, r))
    return self._indexes[r]

  def _genesis(self) -> apply.Position:
    root = manifest_lib.genesis(self._shared_model.run)
    first = self._shared_model.genesis.first_round
    return apply.Position(first, root, self._shared_model.init())

  def _replay(
    self, base: _Base, history: history_lib.History
  ) -> apply.Position:
    """Returns the target's position, if the history leads there from a base."""
    name, r = base.name, base.name.round
    if not history.leads_from(r, base.root):
      raise apply.OutOfSyncError(
        f'the history from round {r} ({name.origin}) leads to another root '
        f'than {history.anchor.root.hex()}, which validators have in round '
        f'{history.anchor.round}'
      )
    manifests = history.manifests(r, self.target)
    try:
      # The own state stays, for the case that this one leads nowhere.
      is_own = name.origin == _OWN
      position = self._apply(base.load(), manifests, keep=is_own)
    except apply.OutOfSyncError:
      self._refused.add(name)
      raise
    self.replayed = dict(enumerate(manifests, start=r))
    return position

  def _apply(
    self, start: apply.Position, manifests: list[bytes], keep: bool
  ) -> apply.Position:
    """Returns the position after some rounds, by their manifests.

    While a round is applied the payloads of the next one are fetched.

    Args:
      start: the position before them.
      manifests: those of the rounds from there on.
      keep: True if `start` is still needed; else it is changed in place.
    """
    position, ahead = start, ahead_lib.Ahead(lambda have: None)
    for r, data in enumerate(manifests, start=start.round):
      have, following = ahead.result(), manifests[r - start.round + 1 :][:1]
      ahead = self._fetch_ahead(r + 1, following)
      digest = run_storage_lib.digest(data) if data else None
      shared = position.shared
      adoption = None
      if data:
        try:
          manifest = manifest_lib.decode(data, self._chain.verify)
        except manifest_lib.ManifestError as e:
          raise apply.OutOfSyncError(f'round {r}: {e}') from e
        fingerprint = apply.fingerprint(self._shared_model, position)
        apply.check_matches(manifest, position.root, fingerprint)
        consume = not (keep and position.shared is start.shared)
        shared = self._outer_step(position, manifest.entries, have, consume)
        adoption = manifest.adoption
      position = position.advance(digest, shared, adoption)
      if target := rollback.due(position):
        position = position._replace(shared=self._restored(target))
    return position

  def _restored(self, target: rollback.Target) -> shared_state_lib.SharedState:
    model, sources = self._shared_model, self._view.sources
    around = rollback.Surroundings(self._chain, self._storage, model, sources)
    return rollback.load(around, target)

  def _outer_step(
    self,
    position: apply.Position,
    entries: Sequence[manifest_lib.Entry],
    have: dict[bytes, bytes],
    consume: bool,
  ) -> shared_state_lib.SharedState:
    """Returns the state after a round; fetches payloads that are not there."""
    adopted, chain = position.amendments, self._chain
    model = amendments_lib.model(self._shared_model, adopted, position.round)
    incoming = apply.Incoming(model, chain, position, entries)
    payloads = self._payloads(position.round, entries, have, incoming.take)
    return apply.outer_step(
      model, chain, position, entries, payloads, None, consume, incoming
    ).shared

  def _fetch_ahead(
    self, round_index: int, manifests: Sequence[bytes]
  ) -> ahead_lib.Ahead:
    """Starts to fetch the payloads of the next round, by its manifest.

    Those that do not come are no error: they are asked for again.
    """
    if not self._storage.in_threads:
      manifests = ()

    def fetch(have: dict[bytes, bytes]) -> None:
      for data in filter(None, manifests):
        entries = manifest_lib.decode(data, self._chain.verify).entries
        self._payloads(round_index, entries, have)

    return ahead_lib.Ahead(fetch)

  def _payloads(
    self,
    round_index: int,
    entries: Sequence[manifest_lib.Entry],
    have: dict[bytes, bytes],
    take: Callable[[bytes, bytes], None] = lambda digest, data: None,
  ) -> dict[bytes, bytes]:
    limit, schedule = self._shared_model.spec.payload_bytes, self._view.schedule
    # A node that needs longer than a round for a round would never catch up.
    blocks = schedule.put_opens(1) - schedule.put_opens(0)
    seconds = max(
      self._storage.longest(len(entries) * limit),
      blocks * self._chain.block_seconds,
    )
    return apply.fetch_payloads(
      self._storage,
      self._view.membership,
      round_index,
      entries,
      limit,
      have,
      seconds,
      take,
    )


def _joined(reasons: list[Exception]) -> str:
  return '; '.join(dict.fromkeys(map(str, reasons)))
