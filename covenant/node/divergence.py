"""A validator's rule for proposing a rollback.

After every round it compares the held-out loss with the median of the last
rounds that were well. If it is higher by `gauntlet.rollback_rise`, or is not
finite, the validator supports a rollback to the newest published checkpoint of
a round that was well. The rule is the same for all validators, so they support
the same amendment; more than half of their stake adopts it.
"""

import math
import statistics

from covenant.config import amend as fields
from covenant.data import assignment
from covenant.node import amend
from covenant.node import base as node_lib
from covenant.node import follow
from covenant.node import targets
from covenant.node import validator_role as role_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import rollback
from covenant.store import interface as store_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib

Validator = role_lib.Validator

MEMORY = 8  # losses whose median is compared with
_BATCHES = 4  # of the sequences of an evaluation of the Gauntlet
_PRINTS = 64  # rounds
# Until the supports of all are read, and a manifest adopts the amendment.
_AHEAD = 1 + manifest_lib.NOTICE


def watch(node: Validator, head: int) -> None:
  """Looks at the model after a round, and supports a rollback if need be.

  Raises:
    StoreError, ChainError: tried again at the next block.
  """
  role, r = node.role, node.state.round
  if r in role.prints:
    return
  why = role.diverged or _rise(node)
  if not why:
    role.prints[r] = node.fingerprint()
    for old in [old for old in role.prints if old <= r - _PRINTS]:
      del role.prints[old]
    return
  if rollback.needed(_pending(node), r):
    return  # it is under way
  amendment = _proposal(node, head)
  if amendment is None:
    return
  chain, run = node.chain, node.shared_model.run
  oldest = r + manifest_lib.NOTICE  # earlier ones cannot be adopted any more
  try:
    amend.support(
      node.objects, run, amendment, chain.hotkey, chain.sign, chain.verify,
      oldest,
    )  # fmt: skip
  except amend.AmendmentError as e:
    text = f'{why}; it can propose no rollback: {e}'
  else:
    text = f'{why}; it proposes that the state of round '
    text += f'{amendment.values[fields.RESTORE][0]} holds again from round '
    text += f'{amendment.round} on'
  node.context.observe(node_lib.Event(head, r, node_lib.DIVERGED, text))


def _pending(node: Validator) -> list[amendment_lib.Amendment]:
  """Returns the amendments that make another proposal needless.

  They are adopted, or soon will be: what a minority supports, or for much
  later, does not keep a validator from its own proposal.
  """
  r, adoptable = node.state.round, amend.wanted(node)
  soon = range(r + manifest_lib.NOTICE, r + _AHEAD + 1)
  return [*node.amendments, *(a for a in adoptable if a.round in soon)]


def _rise(node: Validator) -> str:
  """Returns why the model has diverged by its held-out loss; else empty."""
  role, rise = node.role, node.config.gauntlet.rollback_rise
  heldout, context = role.judge.heldout, node.config.data.context
  if not rise or heldout is None:
    return ''
  count = min(node.config.gauntlet.sequences, assignment.per_miner(node.config))
  ids_N = assignment.evaluation(
    heldout.num_sequences(context), _BATCHES * count
  )
  losses = [
    role.judge.scorer.loss(
      node.shared.params, heldout.read(ids_N[i : i + count], context)
    )
    for i in range(0, len(ids_N) - count + 1, count)
  ]
  loss = sum(losses) / max(len(losses), 1)
  if not math.isfinite(loss):
    return 'the held-out loss is not finite'
  usual = statistics.median_low(role.losses) if role.losses else loss
  if loss > (1 + rise) * usual:
    return (
      f'the held-out loss is {loss:.4g}, more than {1 + rise:g} times the '
      f'median of the last rounds, {usual:.4g}'
    )
  role.losses = [*role.losses, loss][-MEMORY:]
  return ''


def _proposal(node: Validator, head: int) -> amendment_lib.Amendment | None:
  """Returns the rollback to the newest checkpoint that was well, if any.

  Those that validators with more than half of the stake list come first: who
  lists what it then does not serve cannot divide the others for long, as each
  puts the checkpoint that it proposes into its own bucket.
  """
  block, now = node.schedule.finalized(head), node.state.round
  membership = membership_lib.read(node.chain, block, node.schedule)
  around = targets.surroundings(node, membership)
  lists = node.objects.rounds_of_each(
    'checkpoints', [source.bucket for source in around.sources]
  )
  prints, holders = node.role.prints, dict[int, list[str]]()
  for source, rounds in zip(around.sources, lists, strict=True):
    if not isinstance(rounds, store_lib.StoreError):
      for r in prints.keys() & {*rounds}:
        holders.setdefault(r, []).append(source.hotkey)
  common = {
    r: membership.is_majority(hotkeys, max(now - 1, 0))
    for r, hotkeys in holders.items()
  }
  seconds = follow.patience(node, head, head + 2)
  for r in sorted(holders, key=lambda r: (common[r], r), reverse=True):
    if rollback.find(around, r, {prints[r]}, seconds) is not None:
      values = {fields.RESTORE: [r, prints[r]]}
      return amendment_lib.make(node.shared_model.run, now + _AHEAD, values)
  return None
