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
  pending = [*node.amendments, *role.supports]
  if rollback.needed(pending, r):
    return  # it is under way
  amendment = _proposal(node, head)
  if amendment is None:
    return
  chain, run = node.chain, node.shared_model.run
  amend.support(
    node.objects, run, amendment, chain.hotkey, chain.sign, chain.verify, r
  )
  text = f'{why}; it proposes that the state of round '
  text += f'{amendment.values[fields.RESTORE][0]} holds again from round '
  text += f'{amendment.round} on'
  node.context.observe(node_lib.Event(head, r, node_lib.DIVERGED, text))


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

  The beginning of the run needs no checkpoint.
  """
  block = node.schedule.finalized(head)
  membership = membership_lib.read(node.chain, block, node.schedule)
  sources = rollback.sources(node.objects, membership)
  around = rollback.Surroundings(
    node.chain, node.objects, node.shared_model, sources
  )
  lists = node.objects.rounds_of_each(
    'checkpoints', [source.bucket for source in sources]
  )
  listed = {
    r for rounds in lists if not isinstance(rounds, store_lib.StoreError)
    for r in rounds
  }  # fmt: skip
  prints = node.role.prints
  for r in sorted(listed & prints.keys(), reverse=True):
    if rollback.find(around, r, {prints[r]}) is not None:
      values = {fields.RESTORE: [r, prints[r]]}
      first = node.state.round + _AHEAD
      return amendment_lib.make(node.shared_model.run, first, values)
  return None
