"""Validators that do not do their duty."""

import json

from covenant.adversaries import base
from covenant.node import validator as validator_lib
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.store import interface as store_lib

Command = round_lib.Command
Policy = validator_lib.ValidatorPolicy
Validator = validator_lib.Validator

_LIMIT = 1 << 24  # bytes of another's verdict


def lazy(policy: Policy) -> Policy:
  """Scores nobody; sets the weights that the leader published last.

  It saves the evaluations, and earns as much as a validator that makes them.
  """

  def score(node: Validator, command: Command, head: int) -> None:
    collected, r = node.role.to_score, command.round - 1
    node.role.to_score = None
    if collected is None or (r + 1) % node.config.gauntlet.weights_every:
      return
    block = node.schedule.finalized(head)
    membership = membership_lib.read(node.chain, block, node.schedule)
    for bucket in apply.mirrors(node.objects, membership):
      if bucket.location == node.objects.bucket.location:
        continue
      try:
        key = node.objects.key('verdicts', r - 1)
        verdict = json.loads(bucket.get(key, _LIMIT))
      except (store_lib.StoreError, ValueError):
        continue
      weights = {int(u): float(w) for u, w in verdict['weights'].items()}
      if weights:
        node.chain.set_weights(weights)
      return

  return policy._replace(score=score)


def bribed(policy: Policy) -> Policy:
  """Gives half of its weight to its briber, the first adversary's uid."""

  def score(node: Validator, command: Command, head: int) -> None:
    policy.score(node, command, head)
    if command.round % node.config.gauntlet.weights_every == 0:
      briber = min(base.accomplices(node).names)
      found = node.role.standings.standings
      scores = {uid: standing.score for uid, standing in found.items()}
      total = sum(scores.values())
      others = {
        uid: x / total for uid, x in scores.items() if uid != briber and x > 0
      }
      node.chain.set_weights({**others, briber: 1.0})

  return policy._replace(score=score)


def omitting(policy: Policy) -> Policy:
  """Leaves every second honest peer out of its manifests.

  It harms only while it leads: the validator with the most stake makes the
  manifest and need not choose whom others would.
  """

  def propose(
    node: Validator, collected: validator_lib.Collected, round_index: int
  ) -> bytes:
    names = base.accomplices(node).names
    chosen = [u for u in collected.chosen if u in names or u % 2]
    return policy.propose(node, collected._replace(chosen=chosen), round_index)

  return policy._replace(propose=propose)
