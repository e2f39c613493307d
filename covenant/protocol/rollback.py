"""Rollback: an amendment by which the state of an earlier round holds again.

All nodes take that state from a published checkpoint when they come to the
round of the amendment. The rounds between stay in the history, without effect.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from covenant.chain import interface as chain_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import history as history_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib

Target = amendments_lib.Target


class Surroundings(NamedTuple):
  """Where checkpoints are looked for."""

  chain: chain_lib.Chain
  storage: run_storage_lib.RunStorage
  shared_model: shared_state_lib.SharedModel
  sources: Sequence[history_lib.Source]


def due(position: apply.Position) -> Target | None:
  """Returns the state that replaces that of a position just reached, if any."""
  found = None
  for amendment in position.amendments:
    if amendment.round == position.round:
      found = amendments_lib.restored(amendment) or found
  return found


def between(position: apply.Position, first: int) -> bool:
  """Returns whether a rollback fell into the rounds from one to a position."""
  return any(
    first < amendment.round <= position.round
    and amendments_lib.restored(amendment)
    for amendment in position.amendments
  )


def needed(
  amendments: Iterable[amendment_lib.Amendment], oldest: int
) -> set[int]:
  """Returns the rounds whose checkpoints rollbacks after a round return to."""
  return {
    target.round
    for amendment in amendments
    if amendment.round >= oldest
    and (target := amendments_lib.restored(amendment))
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


def find(
  around: Surroundings,
  round_index: int,
  fingerprints: Collection[str] | None = None,
) -> published_checkpoint.Index | None:
  """Returns the first index of a checkpoint, with one of some fingerprints."""
  layout = published_checkpoint.layout(around.shared_model)
  got = around.storage.fetch_each(
    around.storage.key('checkpoints', round_index),
    [source.bucket for source in around.sources],
    layout.index_bytes,
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
    is_wanted = fingerprints is None or index.fingerprint in fingerprints
    if index.round == round_index and is_wanted:
      return index
  return None


def load(around: Surroundings, target: Target) -> shared_state_lib.SharedState:
  """Returns the state that a rollback returns to.

  Raises:
    StoreError: no validator has it now.
    apply.OutOfSyncError: what was loaded is another state.
  """
  model = around.shared_model
  if not target.round:
    return model.init()
  index = find(around, target.round, {target.fingerprint})
  if index is None:
    raise store_lib.StoreUnavailableError(
      f'no validator has the checkpoint of round {target.round} with the '
      f'fingerprint {target.fingerprint}, to which the run returns'
    )
  buckets = [source.bucket for source in around.sources]
  return published_checkpoint.load(around.storage, index, buckets, model).shared
