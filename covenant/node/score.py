"""A validator's last phase: score, rate, set weights."""

import dataclasses
import json
from collections.abc import Mapping

from covenant.chain import interface as chain_lib
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import incentives
from covenant.gauntlet import rating_update
from covenant.gauntlet import scores as scores_lib
from covenant.gauntlet import selection
from covenant.node import validator_role as role_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib

Collected = role_lib.Collected
Validator = role_lib.Validator


def score(node: Validator, command: round_lib.Command, head: int) -> None:
  """Scores, rates and sets weights; judges nothing that it did not see."""
  del head
  role = node.role
  collected, role.to_score = role.to_score, None
  if collected is not None:
    _judge(node, command.round - 1, collected)
  weights, role.weights = role.weights, None
  if weights:
    try:
      node.chain.set_weights(weights)
    except chain_lib.ChainUnreachableError:
      role.weights = weights  # retried, unlike weights that are rejected
      raise


def _judge(node: Validator, round_index: int, collected: Collected) -> None:
  role, gauntlet = node.role, node.config.gauntlet
  report = _with_late(node, round_index, collected)
  role.standings, decisions = rating_update.update(
    role.standings,
    round_index,
    role_lib.identities(collected.membership),
    report,
    _scores(node, round_index, collected, report),
    gauntlet,
    node.config.optim.staleness,
  )
  weights = incentives.weights(role.standings, gauntlet)
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
  after = membership_lib.read(node.chain, block, node.schedule)
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
  """Returns the scores of this round's turn of uids, on the state before it."""
  config, judge = node.config, node.role.judge
  r, context, split = round_index, config.data.context, judge.split
  lot = role_lib.lottery(node, r)
  uids = selection.to_evaluate(
    node.role.standings, report.valid, config.gauntlet.evaluate, r, lot
  )
  if not uids:
    return {}
  seed = node.chain.block_hash(node.schedule.assignment_block(r))
  total = split.num_sequences(context)
  everybody = max(collected.membership.peers) + 1
  random = scores_lib.random_ids(config, everybody, r, total, seed, lot)
  found = collected.payloads
  weights = {u: node.shared_model.weigh(p.header) for u, p in found.items()}
  listed, listed_weights = node.messages, node.weights
  if not listed:
    listed = {uid: p.message for uid, p in found.items()}
    listed_weights = weights
  evaluation = judge.scorer.open(
    collected.before.shared.params,
    listed,
    split.read(random, context),
    listed_weights,
  )
  scores = {}
  for uid in uids:
    header = found[uid].header
    claimed, began = header.sequences, r - header.staleness
    seed = node.chain.block_hash(node.schedule.assignment_block(began))
    own = scores_lib.own_ids(config, uid, began, total, seed, lot, claimed)
    score = judge.scorer.score(
      evaluation, found[uid].message, split.read(own, context), weights[uid]
    )
    work_fraction = scores_lib.work_fraction(config, claimed)
    scores[uid] = dataclasses.replace(score, work_fraction=work_fraction)
  return scores
