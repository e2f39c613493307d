"""A validator: it checks, votes, applies, scores and keeps the history.

It fetches what miners committed (collect.py), votes on the chain for a
manifest, which the leader makes and the others verify (vote.py), rates who
contributed what and sets weights, and re-hosts what others need to
follow or to join. A `ValidatorPolicy` is what it does where validators may
differ; a dishonest one wraps a policy.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.data import tokens as tokens_lib
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import deployed_update
from covenant.gauntlet import incentives
from covenant.gauntlet import rating_update
from covenant.gauntlet import scores as scores_lib
from covenant.gauntlet import selection
from covenant.node import amend
from covenant.node import base as node_lib
from covenant.node import collect
from covenant.node import divergence
from covenant.node import follow
from covenant.node import publishing
from covenant.node import turns as turns_lib
from covenant.node import validator_role as role_lib
from covenant.node import vote as vote_lib
from covenant.optim import sparseloco
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_checkpoint
from covenant.protocol import round as round_lib
from covenant.train import placement as placement_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import lazy
from covenant.wire import manifest as manifest_lib

Collected = role_lib.Collected
Command = round_lib.Command
Judge = role_lib.Judge
Phase = round_lib.Phase
Validator = role_lib.Validator
ValidatorRole = role_lib.ValidatorRole
Verdict = role_lib.Verdict


def judge(
  config: config_lib.Config,
  shared_model: shared_state_lib.SharedModel,
  data: tokens_lib.TokenData,
  placement: placement_lib.Placement | None = None,
) -> Judge:
  """Returns the programs of validators under a config, on their devices."""
  abstract, method = shared_model.abstract_params, shared_model.method
  return Judge(
    checks_lib.Checker(abstract, method.compression),
    scores_lib.Scorer(config, method, abstract, placement),
    data.train,
    data.heldout,
  )


def warm_up(
  config: config_lib.Config,
  judge: Judge,
  shared_model: shared_state_lib.SharedModel,
  shared: shared_state_lib.SharedState,
) -> None:
  """Compiles the programs of scoring, on an empty message.

  The outer step of a sharded model is compiled in the first round: here it
  would need a second copy of the state.
  """
  compression = shared_model.method.compression
  shapes = sparseloco.abstract_message(
    shared_model.abstract_params, compression
  )
  message = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  if shared_model.mesh is None:
    shared_model.apply_round(shared, {0: message})
  ids = np.arange(config.gauntlet.sequences)
  tokens_NxL1 = judge.split.read(ids, config.data.context)
  evaluation = judge.scorer.open(
    shared.params, shared.params, {0: message}, tokens_NxL1
  )
  judge.scorer.score(evaluation, message, tokens_NxL1)


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


def _apply_round(node: Validator, command: Command, head: int) -> None:
  """Applies a round, and notes its history to be stored."""
  r, role, data = command.round, node.role, b''
  applied, digest = follow.next_state(node, r, head)
  if digest is not None:
    block = node.schedule.finalized(head)
    membership = membership_lib.read(node.chain, block, node.schedule)
    data = follow.fetch_manifest(node, membership, r, digest)
    for entry in manifest_lib.decode(data, node.chain.verify).entries:
      if (payload := node.payloads.get(entry.digest)) is not None:
        key = node.objects.key('payloads', r, entry.digest)
        role.to_keep.append((key, payload))
  role.to_keep.append((node.objects.key('history', r), data))
  turns_lib.pass_over(node, r, data)
  role.to_score, role.collected, role.scores = role.collected, None, None
  role.ballot = role_lib.Ballot()
  follow.move(node, applied, digest)


def _catch_up(node: Validator, command: Command, head: int) -> None:
  """Catches up without a gap in its history, which may be the only one left."""
  role, replayed = node.role, follow.catch_up(node, command, head)
  role.collected = role.to_score = role.scores = None
  role.ballot = role_lib.Ballot()
  for r, data in replayed.items():
    role.to_keep.append((node.objects.key('history', r), data))
    if r >= node.state.round - turns_lib.PASSED_ROUNDS:
      turns_lib.pass_over(node, r, data)
  if replayed:
    node.state = node.state._replace(kept=False)


def _keep(node: Validator, command: Command, head: int) -> None:
  """Stores the round's history and, when due, a checkpoint; deletes old ones.

  Objects that the store does not take now are stored a round later. A process
  publishes the checkpoint beside the rounds (publishing.py).
  """
  del command
  role, objects, publisher = node.role, node.objects, node.context.publisher
  divergence.watch(node, head)
  amend.keep(node, head)  # before checkpoints are deleted that it needs
  every, r = node.config.checkpoint.publish, node.state.round
  due = r % every == 0 or r == node.config.rounds
  in_ranks = node.context.publish_in_ranks
  if due and publisher is None and in_ranks is None:
    published_checkpoint.publish(
      objects, node.place, node.shared_model, node.chain.sign
    )
  while role.to_keep:
    objects.put_once(*role.to_keep[0])
    del role.to_keep[0]
  if due and in_ranks is not None:
    in_ranks(node)
  elif due and publisher is not None:
    publishing.start(node, publisher)
  elif due:
    publishing.cleaning(node, r)()


def score(node: Validator, command: round_lib.Command, head: int) -> None:
  """Scores, rates and sets weights; judges nothing that it did not see."""
  role = node.role
  if role.to_score is not None:
    _judge(node, command.round - 1, role.to_score)
    role.to_score = role.scores = None
  _check_weights(node, command.round, head)
  weights, role.weights = role.weights, None
  if weights:
    try:
      node.chain.set_weights(weights)
    except chain_lib.ChainUnreachableError:
      role.weights = weights  # retried, unlike weights that are rejected
      raise
    role.sent.append((head, weights))


def _check_weights(node: Validator, round_index: int, head: int) -> None:
  """Reports whether the weights that were sent are in force, once it is known.

  A chain that seals weights reveals them an epoch later. Then the last ones
  that were revealed are in force, so any of those sent may be.
  """
  sent = node.role.sent
  if not sent:
    return
  try:
    # Of the first ones it is known first.
    error, check = None, node.chain.check_weights
    for block, weights in reversed(sent):
      error = check(weights, block)
      if error == '':
        break
  except chain_lib.ChainError:
    return  # asked again in the next round
  if error is not None:
    sent.clear()
    event = node_lib.Event(head, round_index, node_lib.WEIGHTS, error)
    node.context.observe(event)


def _judge(node: Validator, round_index: int, collected: Collected) -> None:
  role, gauntlet = node.role, node.config.gauntlet
  report = _with_late(node, round_index, collected)
  is_deployed = gauntlet.rules == 'templar'
  update = deployed_update.update if is_deployed else rating_update.update
  if role.scores is None:
    role.scores = _scores(node, round_index, collected, report)
  role.standings, decisions = update(
    role.standings,
    round_index,
    role_lib.identities(collected.membership),
    report,
    role.scores,
    gauntlet,
  )
  weights = (
    deployed_update.weights(role.standings)
    if is_deployed
    else incentives.weights(role.standings, gauntlet)
  )
  for decision in decisions:
    decision['weight'] = weights.get(decision['uid'], 0.0)
  verdict = role_lib.Verdict(round_index, decisions, weights)
  role.announce(verdict)
  text = json.dumps(verdict._asdict())
  key = node.objects.key('verdicts', round_index)
  role.to_keep.append((key, text.encode()))
  if (round_index + 1) % gauntlet.weights_every == 0:
    role.weights = weights


def _with_late(
  node: Validator, round_index: int, collected: Collected
) -> checks_lib.CheckReport:
  """Returns the report with LATE for commitments after the window."""
  block = node.schedule.decision_block(round_index)
  try:
    after = membership_lib.read(node.chain, block, node.schedule)
  except chain_lib.ChainRejectedError:
    return collected.report  # this node is late, and the state is pruned
  checks = dict(collected.report.checks)
  for uid, check in checks.items():
    commitment = after.commitments.get(uid)
    if check.finding is checks_lib.CheckFinding.MISSING and commitment:
      if commitment.round == round_index:
        checks[uid] = check._replace(
          finding=checks_lib.CheckFinding.LATE, block=after.committed[uid]
        )
  return collected.report._replace(checks=checks)


def _scores(
  node: Validator,
  round_index: int,
  collected: Collected,
  report: checks_lib.CheckReport,
) -> Mapping[int, scores_lib.Score]:
  """Returns the scores of this round's turn of uids, between its states."""
  config, judge = node.config, node.role.judge
  r, context, split = round_index, config.data.context, judge.split
  lot = role_lib.lottery(node, r)
  uids = selection.to_evaluate(
    node.role.standings, report.valid, config.gauntlet.evaluate, r, lot
  )
  if not uids:
    return {}
  seed = node.chain.block_hash(node.schedule.assignment_block(r))
  total = split.population(context, r)
  everybody = min(max(collected.membership.peers) + 1, role_lib.seats(node))
  random = scores_lib.random_ids(config, everybody, r, total, seed, lot)
  found = collected.payloads
  weights = {u: node.shared_model.weigh(p.header) for u, p in found.items()}
  listed, listed_weights = node.messages, node.weights
  if not listed:
    listed = lazy.Messages({uid: p.message for uid, p in found.items()})
    listed_weights = weights
  random_NxL1 = split.read(random, context)
  own_NxL1 = {}
  for uid in uids:
    header = found[uid].header
    seed = node.chain.block_hash(node.schedule.assignment_block(r))
    population, claimed = split.population(context, r), header.sequences
    own = scores_lib.own_ids(config, uid, r, population, seed, lot, claimed)
    own_NxL1[uid] = split.read(own, context)
  # From here on nothing is asked of others: a second try would find the
  # parameters before the round changed. An empty round has made no others.
  before, after = collected.before.shared.params, node.shared.params
  try:
    evaluation = judge.scorer.open(
      before,
      after,
      listed,
      random_NxL1,
      listed_weights,
      consume=node.context.sole and before is not after,
    )
  except scores_lib.NotFiniteError as e:
    node.role.diverged = str(e)
    return {}
  node.role.diverged = ''
  scores = {}
  for uid in uids:
    message = lazy.unpacked(found[uid].message)
    score = judge.scorer.score(evaluation, message, own_NxL1[uid], weights[uid])
    work = scores_lib.work(config, found[uid].header.sequences)
    scores[uid] = dataclasses.replace(score, work=work)
  return scores


HONEST = ValidatorPolicy(vote_lib.proposal, vote_lib.publish, score)


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
