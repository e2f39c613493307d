"""The history of a run, proven from a vote on the chain backwards.

A node that was away knows nothing but the chain. The chain has the digest of
the newest manifest that more than half of the stake stands for. That manifest
names the root before its round, and a root is the hash of the manifest before
it and of the root before that. So every older manifest is proven by itself,
whoever sent it, before the next one is asked for; who lies delays nobody.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.protocol import apply
from covenant.protocol import manifest_check
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.wire import manifest as manifest_lib

# Rounds in a row of which nobody may have a manifest that fits, so that
# liars cannot send a node back to the beginning of a long run.
_MOST_EMPTY = 64
_SLOW_SECONDS = 10.0


class Source(NamedTuple):
  """A validator that may have histories and checkpoints."""

  hotkey: str
  bucket: store_lib.Bucket


class Anchor(NamedTuple):
  """The last round before the target that validators decided."""

  round: int
  root: bytes  # history root before the round
  manifest: bytes  # the manifest that was decided; b'' if none was


@dataclasses.dataclass(frozen=True)
class View:
  """The surroundings of a node that catches up, at one block.

  Attributes:
    chain: as the node sees it.
    storage: of the node.
    schedule: the blocks of the phases.
    run: the id of the run.
    membership: the peers at the newest final block.
    sources: the validators' buckets, the leader's first.
    target: the first round that may not be decided yet.
    most_entries: round -> the most payloads that count in it.
  """

  chain: chain_lib.Chain
  storage: run_storage_lib.RunStorage
  schedule: round_lib.Schedule
  run: bytes
  membership: membership_lib.Membership
  sources: Sequence[Source]
  target: int
  most_entries: Callable[[int], int] = lambda _: manifest_lib.MAX_ENTRIES


def view(
  chain: chain_lib.Chain,
  storage: run_storage_lib.RunStorage,
  schedule: round_lib.Schedule,
  run: bytes,
  head: int,
  rounds: int,
  most_entries: Callable[[int], int] = lambda _: manifest_lib.MAX_ENTRIES,
) -> View:
  """Returns what a node sees at block `head` of a run of so many rounds.

  Raises:
    ChainError: the chain cannot be read.
  """
  block = max(schedule.finalized(head), 0)
  membership = membership_lib.read(chain, block, schedule)
  sources = [
    Source(peer.hotkey, bucket)
    for peer in membership.candidates
    if (location := membership.location(peer.uid))
    and (bucket := storage.bucket_at(location)) is not None
  ]
  target = min(max(schedule.round_at(head) - 1, 0), rounds)
  return View(
    chain, storage, schedule, run, membership, sources, target, most_entries
  )


class History:
  """The manifests before the target, as far as they are proven.

  Args:
    view: what the node sees.
    anchor: where the proof begins.
  """

  def __init__(self, view: View, anchor: Anchor):
    self.anchor = anchor
    self.unavailable: list[store_lib.StoreError] = []  # what came instead
    self._view = view
    self._sources = list(view.sources)
    self._next = _next(view)
    self._low = anchor.round  # the lowest round whose root is proven
    self._empty = 0  # rounds below without a manifest that fits
    self._roots = {anchor.round: anchor.root}
    # Bytes by round; b'' for rounds in which no message counted.
    self._manifests: dict[int, bytes] = {}
    root = anchor.root
    for r in range(anchor.round, view.target):
      # No later round has a majority, so no message counted in it.
      data = anchor.manifest if r == anchor.round else b''
      root = _extend(root, r, data)
      self._manifests[r], self._roots[r + 1] = data, root

  def leads_from(self, round_index: int, root: bytes) -> bool:
    """Returns whether a position is one of this history.

    Manifests that are missing are fetched, from the newest to the oldest.
    """
    tried = None
    while round_index < self._low:
      if tried != self._low and self._connects(round_index, root):
        self._prove(round_index, root, b'')
        break
      tried = self._low
      if not self._go_back(round_index):
        return False
    return self._roots.get(round_index) == root

  def root(self, round_index: int) -> bytes | None:
    """Returns the root before a round, None while it is not proven."""
    return self._roots.get(round_index)

  def manifests(self, start: int, stop: int) -> list[bytes]:
    """Returns proven manifests of the rounds in [start, stop)."""
    return [self._manifests[r] for r in range(start, stop)]

  def fingerprint(self, round_index: int) -> str | None:
    """Returns the fingerprint of the state before a round.

    The next manifest names it, which may be that of the target round if more
    than half of the stake stands for it by now. None is returned if none has
    been decided since.
    """
    for r in range(round_index, self._view.target):
      if data := self._manifests[r]:
        return manifest_lib.decode(data, self._view.chain.verify).fingerprint
    following = self._next
    if following and following.root == self._roots[self._view.target]:
      return following.fingerprint
    return None

  def _connects(self, round_index: int, root: bytes) -> bool:
    """Returns whether empty rounds lead from a root to the lowest proven."""
    for r in range(round_index, self._low):
      root = manifest_lib.extend(root, r, None)
    return root == self._roots[self._low]

  def _prove(self, round_index: int, root: bytes, data: bytes) -> None:
    """Adds a round, and the empty rounds between it and the lowest proven."""
    self._roots[round_index] = root
    for r in range(round_index, self._low):
      self._manifests[r] = data if r == round_index else b''
      root = _extend(root, r, self._manifests[r])
      self._roots[r + 1] = root
    self._low, self._empty = round_index, 0

  def _go_back(self, until: int) -> bool:
    """Looks at one more round; returns False if there is no sense in it."""
    r = self._low - self._empty - 1
    if r < until or self._empty >= _MOST_EMPTY:
      return False
    first, others = self._sources[:1], self._sources[1:]
    if not (self._ask(r, first) or self._ask(r, others)):
      self._empty += 1
    return True

  def _ask(self, round_index: int, sources: list[Source]) -> bool:
    """Asks validators for a manifest; returns whether one has it."""
    key = self._view.storage.key('history', round_index)
    buckets = [source.bucket for source in sources]
    limit, began = manifest_lib.MAX_BYTES, time.monotonic()
    got = self._view.storage.fetch_each(key, buckets, limit)
    is_slow = time.monotonic() - began > _SLOW_SECONDS
    for source, data in zip(sources, got, strict=True):
      if isinstance(data, store_lib.StoreError):
        if not isinstance(data, store_lib.MissingObjectError):
          self.unavailable.append(data)
          if is_slow:
            self._sources.remove(source)  # not waited for again
        continue
      root = self._root_before(round_index, data)
      if root is not None:
        self._prove(round_index, root, data)
        # A source that has one has the others.
        self._sources.remove(source)
        self._sources.insert(0, source)
        return True
    return False

  def _root_before(self, round_index: int, data: bytes) -> bytes | None:
    """Returns the root that a manifest names, if it is the right manifest."""
    try:
      manifest = manifest_lib.decode(data, self._view.chain.verify)
    except manifest_lib.ManifestError:
      return None
    root = _extend(manifest.root, round_index, data)
    return manifest.root if self._connects(round_index + 1, root) else None


def _next(view: View) -> manifest_lib.Manifest | None:
  """Returns the manifest of the target round that a majority votes for."""
  r, membership = view.target, view.membership
  decision = _decision(r, membership, membership.block, False)
  if decision is None or decision.digest is None:
    return None
  try:
    data = apply.fetch_manifest(view.storage, membership, r, decision.digest)
    manifest = manifest_lib.decode(data, view.chain.verify)
  except (manifest_lib.ManifestError, store_lib.StoreError):
    return None
  return manifest if (manifest.run, manifest.round) == (view.run, r) else None


def anchors(view: View) -> list[Anchor]:
  """Returns where a proof may begin: one anchor.

  That is the last round before the target for whose manifest more than half of
  the stake voted, by the states of the chain at the times of the decisions. If
  the chain has forgotten these, it is the newest vote that it has. Before the
  first vote it is the beginning of the run.

  Raises:
    StoreError: nobody has the manifest that holds.
    ChainError: the chain cannot be read.
  """
  membership = view.membership
  for r in range(view.target - 1, view.schedule.first - 1, -1):
    try:
      block = view.schedule.last_decision_block(r)
      membership = membership_lib.read(view.chain, block, view.schedule)
    except chain_lib.ChainRejectedError:
      break  # too old: the run is over, or was at rest
    anchor = _anchor(view, membership, r)
    if anchor is not None:
      return [anchor]
  # Votes that came too late still name their history.
  voted = {r for r in membership.votes.values() if r < view.target}
  for r in sorted(voted, reverse=True):
    anchor = _anchor(view, membership, r)
    if anchor is not None:
      return [anchor]
  return [Anchor(view.schedule.first, manifest_lib.genesis(view.run), b'')]


def _anchor(
  view: View, membership: membership_lib.Membership, round_index: int
) -> Anchor | None:
  """Returns the anchor by the votes on a round, None if none names a root."""
  r, schedule = round_index, view.schedule
  first = schedule.decision_block(r)
  try:
    # The view of nodes that followed the round: a vote may have changed since.
    then = membership_lib.read(view.chain, first, schedule)
  except chain_lib.ChainRejectedError:
    then = membership
  held = _decision(r, then, first, False)
  held = held or _decision(r, membership, schedule.last_decision_block(r), True)
  late = _decision(r, membership, membership.block, True)
  assert held is not None and late is not None
  if held.digest is None and not late.majority:
    return None  # a minority that was late says nothing about the others
  digest = held.digest or late.digest
  assert digest is not None
  try:
    data = apply.fetch_manifest(view.storage, view.membership, r, digest)
    manifest = manifest_lib.decode(data, view.chain.verify)
  except manifest_lib.ManifestError:
    return None  # malformed for every node: no message counts
  if (manifest.run, manifest.round) != (view.run, r):
    return None
  void = held.digest is None or _is_void(view, manifest)
  return Anchor(r, manifest.root, b'' if void else data)


def _is_void(view: View, manifest: manifest_lib.Manifest) -> bool:
  """Returns whether the chain tells that a manifest counts nobody."""
  block = view.schedule.put_closes(manifest.round)
  try:
    closing = membership_lib.read(view.chain, block, view.schedule)
    most = view.most_entries(manifest.round)
    manifest_check.check_entries(manifest, closing, view.schedule, most)
  except chain_lib.ChainRejectedError:
    return False  # the chain has forgotten that block
  except manifest_lib.ManifestError:
    return True
  return False


def _decision(
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


def _extend(root: bytes, round_index: int, manifest: bytes) -> bytes:
  digest = run_storage_lib.digest(manifest) if manifest else None
  return manifest_lib.extend(root, round_index, digest)
