"""How a node that fell behind, or just came, gets the others' state.

It takes the newest state that it can verify, its own, a validator's checkpoint
or the beginning of the run, and replays the rounds since through the same code
that applied them for everybody. Histories and checkpoints may come from liars:
roots chain all manifests to the one that the validators vote for on the chain
now, so the whole of a history is checked before a byte of it is applied. How
the last round that anybody voted on was decided is read from the chain itself:
no history may have it yet, if all validators died after the vote.
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

_Base = Callable[[], apply.Place]


class _Source(NamedTuple):
  hotkey: str
  bucket: store_lib.Bucket


class _Anchor(NamedTuple):
  """How the last round went that anybody voted on, before the target."""

  round: int
  root: bytes  # before it
  manifest: bytes  # that held; b'' where nobody counted


class CatchUp:
  """One attempt, at one block.

  Args:
    chain: as seen by the node.
    objects: of the node.
    shared_model: of the run.
    plan: when.
    head: the newest block.
    rounds: of the run; there is nothing after them.

  Raises:
    ChainError: the chain cannot be read.
  """

  def __init__(
    self,
    chain: chain_lib.Chain,
    objects: run_storage_lib.Objects,
    shared_model: shared_state_lib.SharedModel,
    plan: round_lib.Schedule,
    head: int,
    rounds: int,
  ):
    self.replayed: dict[int, bytes] = {}  # manifests by round, as in a history
    self._chain = chain
    self._objects = objects
    self._shared_model = shared_model
    self._roster = membership_lib.read(chain, plan.finalized(head))
    self._plan = plan
    self._target = min(max(plan.round_at(head) - 1, 0), rounds)
    self._sources = [
      _Source(peer.hotkey, bucket)
      for peer in self._roster.validators
      if (location := self._roster.location(peer.uid))
      and (bucket := objects.bucket_at(location)) is not None
    ]

  def run(self, place: apply.Place | None) -> apply.Place:
    """The place of the others.

    All rounds are in it that were decided before the round of this block
    began; how the last one was decided can be read from the chain.

    Args:
      place: where the node stands; None if that is not to be trusted.

    Raises:
      agreement.OutOfSyncError: nothing that is to be had leads to what the chain says.
      StoreError: something is not to be had, for now.
    """
    reasons: list[Exception] = []
    for anchor in self._anchors():
      for base in self._bases(place):
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
    """The newest vote, and what to believe if that is a minority's lie.

    Raises:
      StoreError: nobody has the manifest that was voted for. Where a minority
        did, and nobody has voted since, it is waited for some rounds only.
    """
    membership = self._before_target()
    voted = {
      vote.round
      for peer in membership.validators
      if (vote := membership.commitments.get(peer.uid)) is not None
      and vote.round is not None
      and vote.round < self._target
    }
    for r in sorted(voted, reverse=True):
      held = self._decided(r, membership)
      # Votes that came too late still say which history they are for.
      late = self._decision(r, membership, membership.block, True)
      digest = held.digest if late is None else held.digest or late.digest
      assert digest is not None
      try:
        data = apply.fetch_manifest(self._objects, self._roster, r, digest)
        root = manifest_lib.decode(data, self._chain.verify).root
        yield _Anchor(r, root, b'' if held.digest is None else data)
      except manifest_lib.ManifestError:
        pass  # to everybody: nobody counts
      except store_lib.StoreError:
        if held.majority or self._target <= r + _PATIENCE:
          raise
      if held.majority:
        return
    yield _Anchor(0, manifest_lib.genesis(self._shared_model.run), b'')

  def _decided(
    self, round_index: int, membership: membership_lib.Membership
  ) -> round_lib.Decision:
    """How a round was decided that `roster` still has the votes of."""
    r, plan = round_index, self._plan
    held = self._decision(r, membership, plan.decision_block(r), False)
    held = held or self._decision(
      r, membership, plan.last_decision_block(r), True
    )
    assert held is not None  # as the last look leaves nothing open
    return held

  def _decision(
    self,
    round_index: int,
    membership: membership_lib.Membership,
    until: int,
    last: bool,
  ) -> round_lib.Decision | None:
    """By the votes that a block has seen."""
    stakes = {peer.uid: peer.stake for peer in membership.validators}
    votes = {
      uid: vote
      for uid, vote in membership.commitments.items()
      if membership.committed[uid] <= until
    }
    return round_lib.decide(round_index, votes, stakes, last)

  def _before_target(self) -> membership_lib.Membership:
    """When the last round before the target had been decided."""
    try:
      block = self._plan.last_decision_block(self._target - 1)
      return membership_lib.read(self._chain, block)
    except chain_lib.ChainRejectedError:  # too old: the run is over
      return self._roster

  def _bases(self, place: apply.Place | None) -> Iterator[_Base]:
    """What to start from, newest first.

    A validator whose bucket fails now is passed over.
    """
    found = []
    for source in self._sources:
      try:
        rounds = published_checkpoint.published(self._objects, source.bucket)
      except store_lib.StoreError:
        continue
      found += [(r, source) for r in rounds if r <= self._target]
    oldest = -1 if place is None else place.round
    for r, source in sorted(found, key=lambda item: -item[0]):
      if r > oldest:
        yield lambda r=r, source=source: self._load(r, source)
    if place is not None:
      yield lambda: place
    yield self._genesis

  def _load(self, round_index: int, source: _Source) -> apply.Place:
    index = published_checkpoint.read_index(
      self._objects,
      source.bucket,
      round_index,
      source.hotkey,
      self._chain.verify,
    )
    buckets = [other.bucket for other in self._sources if other != source]
    return published_checkpoint.load(
      self._objects, index, [source.bucket, *buckets], self._shared_model
    )

  def _genesis(self) -> apply.Place:
    root = manifest_lib.genesis(self._shared_model.run)
    return apply.Place(0, root, self._shared_model.init())

  def _replay(self, start: apply.Place, anchor: _Anchor) -> apply.Place:
    """The place of the target, if one history from `start` leads there."""
    error: Exception | None = None
    for first in range(max(len(self._sources), 1)):
      order = self._sources[first:] + self._sources[:first]
      try:
        manifests = self._history(order, start.round, anchor)
        self._verify(start, manifests, anchor)
        place = self._apply(start, manifests)
        self.replayed = dict(enumerate(manifests, start=start.round))
        return place
      except (apply.OutOfSyncError, store_lib.StoreError) as e:
        error = e
    assert error is not None
    raise error

  def _history(
    self, sources: list[_Source], start: int, anchor: _Anchor
  ) -> list[bytes]:
    """The manifest of every round from `start`; b'' where nobody counted."""
    manifests = []
    for r in range(start, self._target):
      # No vote of a later round was ever cast: nobody counted in it.
      data = anchor.manifest if r == anchor.round else b''
      if r < anchor.round:
        key = self._objects.key('history', r)
        for source in sources:
          try:
            data = source.bucket.get(key, manifest_lib.MAX_BYTES)
            break
          except store_lib.MissingObjectError:
            continue
      manifests.append(data)
    return manifests

  def _verify(
    self, start: apply.Place, manifests: list[bytes], anchor: _Anchor
  ) -> None:
    """Raises Lost unless the history leads to where the validators are."""
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

  def _apply(self, start: apply.Place, manifests: list[bytes]) -> apply.Place:
    place = start
    for r, data in enumerate(manifests, start=start.round):
      digest = run_storage_lib.digest(data) if data else None
      shared, links = place.shared, apply.kept_links(self._shared_model)
      if data:
        try:
          manifest = manifest_lib.decode(data, self._chain.verify)
        except manifest_lib.ManifestError as e:
          raise apply.OutOfSyncError(f'round {r}: {e}') from e
        fingerprint = self._shared_model.fingerprint(place.shared)
        apply.compare(manifest, place.root, fingerprint)
        payloads = apply.fetch_payloads(
          self._objects,
          self._roster,
          r,
          manifest.entries,
          self._shared_model.spec.payload_bytes,
          {},
        )
        applied = apply.outer_step(
          self._shared_model, self._chain, place, manifest.entries, payloads
        )
        shared = applied.shared
      place = place.after(digest, shared, links)
    return place


def _extend(root: bytes, round_index: int, manifest: bytes) -> bytes:
  digest = run_storage_lib.digest(manifest) if manifest else None
  return manifest_lib.extend(root, round_index, digest)
