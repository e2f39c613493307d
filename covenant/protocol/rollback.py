"""Rollback: an amendment by which the state of an earlier round holds again.

All nodes take that state from a published checkpoint when they come to the
round of the amendment. The rounds between stay in the history, without effect.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import history as history_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import pieces as pieces_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib

Target = amendments_lib.Target
_PIECES = 8  # that are fetched at the same time


class Surroundings(NamedTuple):
  """The chain, the storage and the peers that may have a checkpoint."""

  chain: chain_lib.Chain
  storage: run_storage_lib.RunStorage
  shared_model: shared_state_lib.SharedModel
  sources: Sequence[history_lib.Source]


def target(amendment: amendment_lib.Amendment) -> Target | None:
  """Returns the state that an amendment returns to; None for malformed ones.

  A run that adopted a malformed one needs a release that knows what it means.
  """
  try:
    return amendments_lib.restored(amendment)
  except amendment_lib.AmendmentError:
    return None


def due(position: apply.Position) -> Target | None:
  """Returns the state that replaces that of a position just reached, if any."""
  found = None
  for amendment in position.amendments:
    if amendment.round == position.round:
      found = target(amendment) or found
  return found


def between(position: apply.Position, first: int) -> bool:
  """Returns whether a rollback fell into the rounds from one to a position."""
  return any(
    first < amendment.round <= position.round and target(amendment)
    for amendment in position.amendments
  )


def needed(
  amendments: Iterable[amendment_lib.Amendment], oldest: int
) -> set[int]:
  """Returns the rounds whose checkpoints rollbacks after a round return to."""
  return {
    found.round
    for amendment in amendments
    if amendment.round >= oldest and (found := target(amendment))
  }


def sources(
  storage: run_storage_lib.RunStorage, membership: membership_lib.Membership
) -> list[history_lib.Source]:
  """Returns the buckets of all that may be validators."""
  return [
    history_lib.Source(peer.hotkey, bucket)
    for peer in membership.candidates
    if (location := membership.location(peer.uid))
    and (bucket := storage.bucket_at(location)) is not None
  ]


def indexes(
  around: Surroundings, round_index: int, seconds: float | None = None
) -> Iterator[published_checkpoint.Index]:
  """Yields the indexes of a checkpoint that anybody publishes.

  Args:
    around: where they are looked for.
    round_index: the round of the checkpoint.
    seconds: the longest wait for all of them.
  """
  layout = published_checkpoint.layout(around.shared_model)
  got = around.storage.fetch_each(
    around.storage.key('checkpoints', round_index),
    [source.bucket for source in around.sources],
    layout.index_bytes,
    seconds,
  )
  for source, data in zip(around.sources, got, strict=True):
    if isinstance(data, store_lib.StoreError):
      continue
    try:
      index = published_checkpoint.decode(
        data, layout, source.hotkey, around.chain.verify
      )
    except apply.OutOfSyncError:
      continue
    if index.round == round_index:
      yield index


def find(
  around: Surroundings,
  round_index: int,
  fingerprints: Collection[str],
  seconds: float | None = None,
) -> published_checkpoint.Index | None:
  """Returns the first index of a checkpoint with one of some fingerprints."""
  for index in indexes(around, round_index, seconds):
    if index.fingerprint in fingerprints:
      return index
  return None


def proven(
  around: Surroundings,
  view: history_lib.View,
  round_index: int,
  seconds: float | None = None,
) -> Target | None:
  """Returns the published state before a round that the history vouches for.

  The next manifest names the fingerprint of the state (history.py), so nothing
  that a stranger publishes is believed.

  Raises:
    StoreError: nobody has the manifest that holds.
    ChainError: the chain cannot be read.
  """
  published = [*indexes(around, round_index, seconds)]
  for anchor in history_lib.anchors(view) if published else ():
    history = history_lib.History(view, anchor)
    for index in published:
      if not history.leads_from(round_index, bytes.fromhex(index.root)):
        continue
      if history.fingerprint(round_index) == index.fingerprint:
        return Target(round_index, index.fingerprint)
  return None


def is_held(around: Surroundings, hotkey: str, target: Target) -> bool:
  """Returns whether the own bucket has the checkpoint of a state.

  Raises:
    StoreError: the own bucket cannot be read.
  """
  layout = published_checkpoint.layout(around.shared_model)
  key = around.storage.key('checkpoints', target.round)
  try:
    data = around.storage.bucket.get(key, layout.index_bytes + 64)
    index = published_checkpoint.decode(
      data, layout, hotkey, around.chain.verify
    )
  except (store_lib.MissingObjectError, apply.OutOfSyncError):
    return False
  return (index.round, index.fingerprint) == target


def mirror(
  around: Surroundings,
  index: published_checkpoint.Index,
  sign: ct.Sign,
  check: Callable[[], None] = lambda: None,
) -> None:
  """Puts a checkpoint of others into the own bucket, an own index last.

  Args:
    around: whose sources may have the pieces.
    index: the index, see `published_checkpoint.decode`.
    sign: signs the own index.
    check: called before each group of pieces; what it raises ends it.

  Raises:
    StoreError: a piece cannot be had, or not be stored.
  """
  storage = around.storage
  buckets = [source.bucket for source in around.sources]
  names = {name for digests in index.files.values() for name in digests}
  wanted = [bytes.fromhex(name) for name in sorted(names - storage.chunks())]
  limit = pieces_lib.PIECE_BYTES
  for i in range(0, len(wanted), _PIECES):
    check()
    some = wanted[i : i + _PIECES]
    for digest, data in storage.fetch_chunks(some, buckets, limit).items():
      storage.put_once(storage.chunk_key(digest), data)
  body = published_checkpoint.encode(index)
  storage.bucket.put(
    storage.key('checkpoints', index.round), body + sign(body), replace=True
  )


def load(around: Surroundings, target: Target) -> shared_state_lib.SharedState:
  """Returns the state that a rollback returns to.

  Raises:
    StoreError: no validator has it now.
    apply.OutOfSyncError: what was loaded is another state.
  """
  model = around.shared_model
  if target.round == model.genesis.first_round:
    return model.init()
  index = find(around, target.round, {target.fingerprint})
  if index is None:
    raise store_lib.StoreUnavailableError(
      f'no validator has the checkpoint of round {target.round} with the '
      f'fingerprint {target.fingerprint}, to which the run returns'
    )
  buckets = [source.bucket for source in around.sources]
  return published_checkpoint.load(around.storage, index, buckets, model).shared
