"""Publishing checkpoints: by one validator at a time, beside the rounds.

Whose turn it is follows from the chain: publications go round the validators
that vote, by stake. The state of a round is an immutable tree of arrays; the
publisher holds it until its last tensor is in the store, while the node goes on
with later rounds. The last checkpoint of a run is published by all: there is no
later one that would replace it.
"""

from collections.abc import Callable

import jax

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.node import amend
from covenant.node import beside as beside_lib
from covenant.node import validator_role as role_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import rollback
from covenant.train import placement

Validator = role_lib.Validator
LAST_TRIES = 10  # of the last publication, which nothing replaces


def is_turn(node: Validator, round_index: int) -> bool:
  """Returns whether this node publishes the state before a round.

  Args:
    node: the validator.
    round_index: a round whose state is due.
  """
  config = node.config
  if round_index == config.rounds:
    return True
  order = _order(node, round_index)
  if not order:
    return order is not None
  turn = round_index // config.checkpoint.publish % len(order)
  return order[turn] == node.chain.hotkey


def _order(node: Validator, round_index: int) -> list[str] | None:
  """Returns who publish in turn; None if the chain has forgotten it."""
  if round_index == node.schedule.first:
    return []
  block = node.schedule.put_closes(round_index - 1)
  try:
    membership = membership_lib.read(node.chain, block, node.schedule)
  except chain_lib.ChainRejectedError:
    return None  # too long ago: a later one is due by now
  return [peer.hotkey for peer in membership.active(round_index - 1)]


def start(node: Validator, publisher: beside_lib.Beside) -> None:
  """Starts to publish the state of a node if it is its turn, and to clean up.

  A publication that is still under way goes on, and this turn is left out: the
  next validator has the next one. One that has failed is given up at the own
  next turn, for the newer state. The last one of a run waits for any. Own old
  objects are deleted at every turn, whoever publishes.
  """
  r = node.state.round
  is_last = r == node.config.rounds
  if publisher.is_busy and not (is_last or publisher.is_failing):
    return
  clean = cleaning(node, r, voters(node, r))
  if not is_turn(node, r):
    if not publisher.is_busy:
      publisher.submit(clean, tries=1)
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
    clean()

  publisher.submit(publish)


def voters(node: Validator, round_index: int) -> int:
  """Returns the number of validators that publish in turn, as far as known."""
  return len(_order(node, round_index) or ())


def finish(
  publisher: beside_lib.Beside, stop: Callable[[], bool], seconds: float
) -> None:
  """Waits for the last publication of a run.

  A stop ends the wait, and so does a store that fails again and again.

  Args:
    publisher: publishes it.
    stop: returns True if the process is asked to stop.
    seconds: between two looks.
  """
  before = publisher.failures
  while not publisher.wait(seconds):
    if stop() or publisher.failures - before >= LAST_TRIES:
      return


def cleaning(
  node: Validator, round_index: int, validators: int = 1
) -> Callable[[], None]:
  """Returns the deletion of own old checkpoints, and of what led to them.

  What it needs of the node is read here, in the thread of the rounds; the
  deletion itself may run beside them.

  Args:
    node: the validator.
    round_index: the round whose state is due.
    validators: those that publish in turn.
  """
  objects, config = node.objects, node.config.checkpoint
  keep = max(config.keep, 2)
  rollbacks = rollback.needed(
    [*node.amendments, *amend.wanted(node)],
    round_index - keep * config.publish,
  )
  longest = keep_rounds(node.config, max(validators, 1))

  def clean() -> None:
    kept = {target.round for target in tuple(node.role.targets)}
    left = published_checkpoint.prune(objects, config.keep, rollbacks | kept)
    # A node that is a little behind still needs what has just been applied. One
    # whose turn never comes has no checkpoint of its own.
    oldest = min(max(left, round_index - longest), round_index - 2)
    for kind in 'payloads', 'proposals', 'history', 'verdicts':
      objects.delete_before(kind, oldest)

  return clean


def keep_rounds(config: config_lib.Config, validators: int) -> int:
  """Returns the most rounds whose objects a validator keeps after cleaning.

  Its own checkpoints are as far apart as its turns.
  """
  return (max(config.checkpoint.keep, 2) + 1) * (
    config.checkpoint.publish * validators
  )
