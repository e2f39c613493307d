"""A validator: it checks, votes, applies, scores and keeps the history.

It fetches what miners committed (collect.py), votes on the chain for a
manifest, which the leader makes and the others verify (vote.py), rates who
contributed what and sets weights (score.py), and re-hosts what others need to
follow or to join. A `ValidatorPolicy` is what it does where validators may
differ; a dishonest one wraps a policy.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from covenant.node import base as node_lib
from covenant.node import collect
from covenant.node import follow
from covenant.node import score as score_lib
from covenant.node import validator_role as role_lib
from covenant.node import vote as vote_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.wire import manifest as manifest_lib

Collected = role_lib.Collected
Command = round_lib.Command
Judge = role_lib.Judge
Phase = round_lib.Phase
Validator = role_lib.Validator
ValidatorRole = role_lib.ValidatorRole
Verdict = role_lib.Verdict


class ValidatorPolicy(NamedTuple):
  """The choices of a validator; every field is a plain function.

  Attributes:
    propose: makes the manifest of a round, from what it collected.
    stand_for: publishes a manifest and votes for it: node, round, manifest,
      head.
    score: rates the miners of the last round and sets weights.
  """

  propose: vote_lib.Propose
  stand_for: vote_lib.StandFor
  score: Callable[[Validator, Command, int], None]


HONEST = ValidatorPolicy(vote_lib.proposal, vote_lib.publish, score_lib.score)


def handlers(policy: ValidatorPolicy = HONEST) -> node_lib.Handlers:
  """Returns the handlers of a validator that acts by a policy."""
  return {
    **follow.HANDLERS,
    Phase.COLLECT: collect.collect,
    Phase.VOTE: functools.partial(
      vote_lib.vote, policy.propose, policy.stand_for
    ),
    Phase.APPLY: _apply_round,
    Phase.SCORE: policy.score,
    Phase.KEEP: _keep,
    Phase.CATCH_UP: _catch_up,
  }


def _apply_round(node: Validator, command: Command, head: int) -> None:
  """Applies a round, and notes its history to be stored."""
  r, role, data = command.round, node.role, b''
  applied, digest = follow.next_state(node, r, head)
  if digest is not None:
    block = node.schedule.decision_block(r)
    membership = membership_lib.read(node.chain, block, node.schedule)
    data = follow.fetch_manifest(node, membership, r, digest)
    for entry in manifest_lib.decode(data, node.chain.verify).entries:
      if (payload := node.payloads.get(entry.digest)) is not None:
        key = node.objects.key('payloads', r, entry.digest)
        role.to_keep.append((key, payload))
  role.to_keep.append((node.objects.key('history', r), data))
  role.to_score, role.collected = role.collected, None
  follow.move(node, applied, digest)


def _catch_up(node: Validator, command: Command, head: int) -> None:
  """Catches up without a gap in its history, which may be the only one left."""
  role, replayed = node.role, follow.catch_up(node, command, head)
  role.collected = role.to_score = None
  for r, manifest in replayed.items():
    role.to_keep.append((node.objects.key('history', r), manifest))
  if replayed:
    node.state = node.state._replace(kept=False)


def _keep(node: Validator, command: Command, head: int) -> None:
  """Stores the round's history and, when due, a checkpoint; deletes old ones.

  What the store does not take now is stored a round later.
  """
  del command, head
  role, objects = node.role, node.objects
  every, r = node.config.checkpoint.publish, node.state.round
  due = r % every == 0 or r == node.config.rounds
  if due:
    published_checkpoint.publish(
      objects, node.place, node.fingerprint(), node.chain.sign
    )
  while role.to_keep:
    objects.put_once(*role.to_keep[0])
    del role.to_keep[0]
  if due:
    keep = node.config.checkpoint.keep
    # A node that is a little behind still needs what has just been applied.
    oldest = min(published_checkpoint.prune(objects, keep), r - 2)
    for kind in 'payloads', 'proposals', 'history', 'verdicts':
      objects.delete_before(kind, oldest)
