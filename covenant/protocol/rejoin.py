"""Catching up with a run whose amendments are not known yet."""

from collections.abc import Sequence

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import catchup
from covenant.protocol import piece_files
from covenant.protocol import published_rules
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib


def follow(
  chain: chain_lib.Chain,
  storage: run_storage_lib.RunStorage,
  shared_model: shared_state_lib.SharedModel,
  head: int,
  refused: set[catchup.Refused],
  position: apply.Position | None,
  known: Sequence[amendment_lib.Amendment] = (),
) -> tuple[apply.Position, dict[int, bytes]]:
  """Returns the position of the others, and what led there from a base.

  The blocks of rounds depend on amendments, and which there are only the
  history tells. So the node begins with those that validators with more than
  half of the stake publish, or that it knows, and accepts a position only if
  its history adopted amendments by which the blocks are the same.

  Args:
    chain: the chain as the node sees it.
    storage: the storage of the node.
    shared_model: the model of the run, as it began.
    head: the newest block.
    refused: as for `catchup.CatchUp`.
    position: the position of the node; None if it cannot be trusted.
    known: the amendments that the node knows.

  Raises:
    apply.OutOfSyncError, StoreError, ChainError: as `catchup.CatchUp.run`.
  """
  genesis = shared_model.genesis
  amendments = published_rules.read(
    chain, storage, shared_model, head, tuple(known)
  )
  tried = []
  while amendments not in tried:
    tried.append(amendments)
    attempt = attempt_with(
      chain, storage, shared_model, head, refused, amendments
    )
    place = attempt.run(position)
    if _same_blocks(genesis, amendments, place.amendments):
      if position is None or place.round > position.round:
        piece_files.clear(storage)  # of a checkpoint that is not needed now
      return place, attempt.replayed
    amendments = place.amendments
  raise apply.OutOfSyncError(
    'cannot catch up: no history that is published adopts the amendments by '
    'which its rounds have their blocks'
  )


def attempt_with(
  chain: chain_lib.Chain,
  storage: run_storage_lib.RunStorage,
  shared_model: shared_state_lib.SharedModel,
  head: int,
  refused: set[catchup.Refused],
  amendments: Sequence[amendment_lib.Amendment],
) -> catchup.CatchUp:
  """Returns an attempt with the blocks and rounds by some amendments."""
  genesis = shared_model.genesis
  return catchup.CatchUp(
    chain,
    storage,
    shared_model,
    amendments_lib.schedule(genesis, amendments),
    head,
    amendments_lib.last_config(genesis, amendments).rounds,
    refused,
    amendments,
  )


def _same_blocks(
  genesis: config_lib.Config,
  tried: Sequence[amendment_lib.Amendment],
  found: Sequence[amendment_lib.Amendment],
) -> bool:
  """Returns whether rounds have the same blocks, and end with the same one."""
  rounds = [
    amendments_lib.last_config(genesis, x).rounds for x in (tried, found)
  ]
  schedules = [amendments_lib.schedule(genesis, x) for x in (tried, found)]
  return rounds[0] == rounds[1] and schedules[0] == schedules[1]
