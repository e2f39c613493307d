"""The states that rollbacks return to, kept by every validator that wants them.

A checkpoint that only one validator has could be gone when the run returns to
it, and nobody could go on. So a validator puts the checkpoint of each rollback
that it or a majority supports into its own bucket, and votes for the rollback
only once it is there. It does so after a round, never while it votes.
"""

from collections.abc import Iterable

from covenant.node import base as node_lib
from covenant.node import follow
from covenant.node import validator_role as role_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import history as history_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import rollback
from covenant.store import interface as store_lib
from covenant.wire import amendment as amendment_lib

Validator = role_lib.Validator


def surroundings(
  node: Validator, membership: membership_lib.Membership
) -> rollback.Surroundings:
  """Returns where a validator looks for checkpoints."""
  sources = rollback.sources(node.objects, membership)
  return rollback.Surroundings(
    node.chain, node.objects, node.shared_model, sources
  )


def keep(
  node: Validator,
  membership: membership_lib.Membership,
  amendments: Iterable[amendment_lib.Amendment],
  head: int,
) -> None:
  """Puts the checkpoints that rollbacks return to into the own bucket.

  A process does so beside the rounds. What cannot be had now is tried again
  after the next round.

  Args:
    node: the validator.
    membership: of the newest final block.
    amendments: those that the validator wants; others are forgotten.
    head: the newest block.

  Raises:
    StoreError: the own bucket cannot be read.
    ChainError: the chain cannot be read.
  """
  role, r, first = node.role, node.state.round, node.schedule.first
  wanted = {
    target
    for amendment in amendments
    if (target := rollback.target(amendment)) and first < target.round <= r
  }
  role.targets.intersection_update(wanted)
  for target in sorted(wanted):
    why = _keep(node, surroundings(node, membership), target, head)
    if why:
      text = f'no vote for the rollback to round {target.round}: {why}'
      node.context.observe(node_lib.Event(head, r, node_lib.DIVERGED, text))


def _keep(
  node: Validator,
  around: rollback.Surroundings,
  target: rollback.Target,
  head: int,
) -> str:
  """Keeps the checkpoint of a state; returns why it does not."""
  role, publisher = node.role, node.context.publisher
  seconds = follow.patience(node, head, head + 2)
  if target not in role.targets and (
    why := _refusal(node, around, target, head, seconds)
  ):
    return why
  if rollback.is_held(around, node.chain.hotkey, target):
    role.targets.add(target)
    return ''
  role.targets.discard(target)
  index = rollback.find(around, target.round, {target.fingerprint}, seconds)
  if index is None:
    return f'no validator publishes its checkpoint, {target.fingerprint}'
  if publisher is None:
    return _mirror(node, around, index)
  if not publisher.is_busy:

    def mirror() -> None:
      _mirror(node, around, index)

    publisher.submit(mirror)
  return 'its checkpoint is being fetched'


def _refusal(
  node: Validator,
  around: rollback.Surroundings,
  target: rollback.Target,
  head: int,
  seconds: float,
) -> str:
  """Returns why a state is not that of the run, as far as the node knows."""
  try:
    known = node.role.prints.get(target.round) or _proven(
      node, around, target.round, head, seconds
    )
  except store_lib.StoreError as e:
    return f'its history cannot be had now ({e})'
  if known is None:
    return 'no published checkpoint of it is vouched for by the history'
  if known != target.fingerprint:
    return f'its fingerprint is {known}, not {target.fingerprint}'
  return ''


def _mirror(
  node: Validator,
  around: rollback.Surroundings,
  index: published_checkpoint.Index,
) -> str:
  """Puts a checkpoint into the own bucket; returns why it could not."""
  publisher = node.context.publisher
  check = publisher.check if publisher else lambda: None
  try:
    rollback.mirror(around, index, node.chain.sign, check)
  except store_lib.StoreError as e:
    return f'its checkpoint cannot be fetched now ({e})'
  node.role.targets.add(rollback.Target(index.round, index.fingerprint))
  return ''


def _proven(
  node: Validator,
  around: rollback.Surroundings,
  round_index: int,
  head: int,
  seconds: float,
) -> str | None:
  """Returns the fingerprint before a round that the node did not see."""
  genesis = node.context.shared_model
  view = history_lib.view(
    node.chain,
    node.objects,
    node.schedule,
    genesis.run,
    head,
    node.config.rounds,
    lambda r: amendments_lib.model(genesis, node.amendments, r).most_entries,
  )
  found = rollback.proven(around, view, round_index, seconds)
  return found.fingerprint if found else None
