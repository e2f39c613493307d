"""Publishing checkpoints: by one validator at a time, beside the rounds.

Whose turn it is follows from the chain: publications go round the validators
that vote, by stake. The state of a round is an immutable tree of arrays; the
publisher holds it until its last tensor is in the store, while the node goes on
with later rounds. The last checkpoint of a run is published by all: there is no
later one that would replace it.
"""

import jax

from covenant.chain import interface as chain_lib
from covenant.node import amend
from covenant.node import beside as beside_lib
from covenant.node import validator_role as role_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import rollback
from covenant.train import placement

Validator = role_lib.Validator


def is_turn(node: Validator, round_index: int) -> bool:
  """Returns whether this node publishes the state before a round.

  Args:
    node: the validator.
    round_index: a round whose state is due.
  """
  config = node.config
  if round_index == config.rounds or not round_index:
    return True
  block = node.schedule.put_closes(round_index - 1)
  try:
    membership = membership_lib.read(node.chain, block, node.schedule)
  except chain_lib.ChainRejectedError:
    return False  # too long ago: a later one is due by now
  order = [peer.hotkey for peer in membership.active(round_index - 1)]
  if node.chain.hotkey not in order:
    return not order
  turn = round_index // config.checkpoint.publish % len(order)
  return order[turn] == node.chain.hotkey


def start(node: Validator, publisher: beside_lib.Beside) -> None:
  """Starts to publish the state of a node if it is its turn.

  A publication that is still under way goes on, and this turn is left out: the
  next validator has the next one. The last one of a run waits for it.
  """
  r = node.state.round
  if not is_turn(node, r) or (publisher.is_busy and r < node.config.rounds):
    return
  place = node.place
  # Arrays on devices are changed in place; those of the host are loaded first.
  if node.context.sole and not placement.is_offloaded(place.shared):
    copies = jax.tree.map(lambda x: x.copy(), place.shared)
    place = place._replace(shared=copies)

  def publish() -> None:
    published_checkpoint.publish(
      node.objects,
      place,
      node.shared_model,
      node.chain.sign,
      publisher.check,
    )
    forget(node, r)

  publisher.submit(publish)


def forget(node: Validator, round_index: int) -> None:
  """Deletes own checkpoints but the newest ones, and what led to them."""
  objects, keep = node.objects, node.config.checkpoint.keep
  rollbacks = rollback.needed(
    [*node.amendments, *amend.wanted(node)],
    round_index - max(keep, 2) * node.config.checkpoint.publish,
  )
  left = published_checkpoint.prune(objects, keep, rollbacks)
  # A node that is a little behind still needs what has just been applied.
  oldest = min(left, round_index - 2)
  for kind in 'payloads', 'proposals', 'history', 'verdicts':
    objects.delete_before(kind, oldest)
