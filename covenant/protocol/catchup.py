"""Catch-up: a node that joins or fell behind gets the state of the others.

The node takes the newest state that it can verify: its own, a validator's
checkpoint, or the initial state of the run. It replays the later rounds
through the code that applied them on every other node. Histories and
checkpoints may come from liars. Roots chain all manifests to the one that the
validators vote for on the chain now, so a whole history is checked before a
byte of it is applied. The decision about the last round with a vote is read
from the chain itself, because no history has it if all validators died after
the vote.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib

_PATIENCE = 2  # rounds

_Base = Callable[[], apply.Position]


class _Source(NamedTuple):
  hotkey: str
  bucket: store_lib.Bucket


class _Anchor(NamedTuple):
  """The last round before the target that any validator voted on."""

  round: int
  root: bytes  # history root before the round
  manifest: bytes  # the manifest that was decided; b'' if none was


class CatchUp:
  """One attempt to catch up, at one block.

  Args:
    chain: the chain as the node sees it.
    storage: the storage of the node.
    shared_model: the model of the run.
    schedule: the blocks of the phases.
    head: the newest block.
    rounds: the number of rounds of the run.

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
  ):
    self.replayed: dict[int, bytes] = {}  # manifests by round, as in a history
    self._chain = chain
    self._storage = storage
    self._shared_model = shared_model
    self._schedule = schedule
    self._membership = membership_lib.read(
      chain, schedule.finalized(head), schedule
    )
    self._target = min(max(schedule.round_at(head) - 1, 0), rounds)
    self._sources = [
      _Source(peer.hotkey, bucket)
      for peer in self._membership.candidates
      if (location := self._membership.location(peer.uid))
      and (bucket := storage.bucket_at(location)) is not None
    ]

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
    for anchor in self._anchors():
      for base in self._bases(position):
        try:
          return self._replay(base(), anchor)
        except (apply.OutOfSyncError, store_lib.StoreError) as e:
          reasons.append(e)
      for e in reasons:
        if isinstance(e, store_lib.StoreError):
          raise store_lib.StoreUnavailableError(f'cannot catch up: {e}')
    raise apply.OutOfSyncError(
      f'cannot catch up: {"; ".join(map(str, reasons))}'
    )

  def _anchors(self) -> Iterator[_Anchor]:
    """Yields the newest vote, then older ones in case a minority lied.

    Raises:
      StoreError: no validator has the manifest that was voted for. If only a
        minority voted for it, and none voted since, the node waits for it for
        some rounds only.
    """
    membership = self._before_target()
    voted = {
      membership.votes[peer.uid]
      for peer in membership.candidates
      if membership.votes.get(peer.uid, self._target) < self._target
    }
    for r in sorted(voted, reverse=True):
      held = self._decided(r, membership)
      # Votes that came too late still name their history.
      late = self._decision(r, membership, membership.block, True)
      digest = held.digest if late is None else held.digest or late.digest
      assert digest is not None
      try:
        data = apply.fetch_manifest(self._storage, self._membership, r, digest)
        root = manifest_lib.decode(data, self._chain.verify).root
        yield _Anchor(r, root, b'' if held.digest is None else data)
      except manifest_lib.ManifestError:
        pass  # malformed for every node: no message counts
      except store_lib.StoreError:
        if held.majority or self._target <= r + _PATIENCE:
          raise
      if held.majority:
        return
    yield _Anchor(0, manifest_lib.genesis(self._shared_model.run), b'')

  def _decided(
    self, round_index: int, membership: membership_lib.Membership
  ) -> round_lib.Decision:
    """Returns the decision about a round whose votes `membership` has."""
    r, schedule = round_index, self._schedule
    held = self._decision(r, membership, schedule.decision_block(r), False)
    held = held or self._decision(
      r, membership, schedule.last_decision_block(r), True
    )
    assert held is not None  # the last decision block leaves nothing open
    return held

  def _decision(
    self,
    round_index: int,
    membership: membership_lib.Membership,
    until: int,
    last: bool,
  ) -> round_lib.Decision | None:
    """Returns the decision by the votes that were cast until a block."""
    stakes = membership.stakes(round_index)
    votes = {
      uid: vote
      for uid, vote in membership.commitments.items()
      if membership.committed[uid] <= until
    }
    return round_lib.decide(round_index, votes, stakes, last)

  def _before_target(self) -> membership_lib.Membership:
    """Returns the membership at the decision of the round before the target."""
    try:
      block = self._schedule.last_decision_block(self._target - 1)
      return membership_lib.read(self._chain, block, self._schedule)
    except chain_lib.ChainRejectedError:  # too old: the run is over
      return self._membership

  def _bases(self, position: apply.Position | None) -> Iterator[_Base]:
    """Yields loaders of the positions to replay from, newest first.

    A validator whose bucket fails now is skipped.
    """
    found = []
    for source in self._sources:
      try:
        rounds = published_checkpoint.published(self._storage, source.bucket)
      except store_lib.StoreError:
        continue
      found += [(r, source) for r in rounds if r <= self._target]
    oldest = -1 if position is None else position.round
    for r, source in sorted(found, key=lambda item: -item[0]):
      if r > oldest:
        yield lambda r=r, source=source: self._load(r, source)
    if position is not None:
      yield lambda: position
    yield self._genesis

  def _load(self, round_index: int, source: _Source) -> apply.Position:
    index = published_checkpoint.read_index(
      self._storage,
      source.bucket,
      round_index,
      source.hotkey,
      self._chain.verify,
    )
    buckets = [other.bucket for other in self._sources if other != source]
    return published_checkpoint.load(
      self._storage, index, [source.bucket, *buckets], self._shared_model
    )

  def _genesis(self) -> apply.Position:
    root = manifest_lib.genesis(self._shared_model.run)
    return apply.Position(0, root, self._shared_model.init())

  def _replay(self, start: apply.Position, anchor: _Anchor) -> apply.Position:
    """Returns the target's position, if a history from `start` leads there."""
    error: Exception | None = None
    for first in range(max(len(self._sources), 1)):
      order = self._sources[first:] + self._sources[:first]
      try:
        manifests = self._history(order, start.round, anchor)
        self._verify(start, manifests, anchor)
        position = self._apply(start, manifests)
        self.replayed = dict(enumerate(manifests, start=start.round))
        return position
      except (apply.OutOfSyncError, store_lib.StoreError) as e:
        error = e
    assert error is not None
    raise error

  def _history(
    self, sources: list[_Source], start: int, anchor: _Anchor
  ) -> list[bytes]:
    """Returns the manifest of every round from `start`; b'' for none."""
    manifests = []
    for r in range(start, self._target):
      # No vote on a later round was ever cast, so no message counted in it.
      data = anchor.manifest if r == anchor.round else b''
      if r < anchor.round:
        key = self._storage.key('history', r)
        for source in sources:
          try:
            data = source.bucket.get(key, manifest_lib.MAX_BYTES)
            break
          except store_lib.MissingObjectError:
            continue
      manifests.append(data)
    return manifests

  def _verify(
    self, start: apply.Position, manifests: list[bytes], anchor: _Anchor
  ) -> None:
    """Raises OutOfSyncError unless the history leads to the voted root."""
    root = start.root
    for r, data in enumerate(manifests, start=start.round):
      root = _extend(root, r, data)
    goal = anchor.root
    for r in range(anchor.round, self._target):
      goal = _extend(goal, r, anchor.manifest if r == anchor.round else b'')
    if root != goal:
      raise apply.OutOfSyncError(
        f'the history from round {start.round} leads to the root {root.hex()} '
        f'in round {self._target}, where validators have {goal.hex()}'
      )

  def _apply(
    self, start: apply.Position, manifests: list[bytes]
  ) -> apply.Position:
    position = start
    for r, data in enumerate(manifests, start=start.round):
      digest = run_storage_lib.digest(data) if data else None
      shared, links = position.shared, apply.kept_links(self._shared_model)
      if data:
        try:
          manifest = manifest_lib.decode(data, self._chain.verify)
        except manifest_lib.ManifestError as e:
          raise apply.OutOfSyncError(f'round {r}: {e}') from e
        fingerprint = self._shared_model.fingerprint(position.shared)
        apply.check_matches(manifest, position.root, fingerprint)
        payloads = apply.fetch_payloads(
          self._storage,
          self._membership,
          r,
          manifest.entries,
          self._shared_model.spec.payload_bytes,
          {},
        )
        applied = apply.outer_step(
          self._shared_model, self._chain, position, manifest.entries, payloads
        )
        shared = applied.shared
      position = position.advance(digest, shared, links)
    return position


def _extend(root: bytes, round_index: int, manifest: bytes) -> bytes:
  digest = run_storage_lib.digest(manifest) if manifest else None
  return manifest_lib.extend(root, round_index, digest)
