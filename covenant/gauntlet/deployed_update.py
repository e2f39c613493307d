"""Scores and pays by the deployed rules: `gauntlet.rules='templar'`.

For comparison: the same adversaries can be run under both rules. A standing's
proof is then the moving average of own-beats-random, and its score the deployed
final score. Checks, the selection of contributors and who is evaluated are
ours; the synchronization score is 1 for peers that started from the right
parameters.
"""

import dataclasses
from collections.abc import Mapping

from covenant import config as config_lib
from covenant import typing as ct
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import deployed
from covenant.gauntlet import rating_update
from covenant.gauntlet import ratings as ratings_lib
from covenant.gauntlet import scores as scores_lib


def update(
  old: ratings_lib.Ratings,
  round_index: int,
  identities: Mapping[int, ratings_lib.Identity],
  report: checks_lib.CheckReport,
  scores: Mapping[int, scores_lib.Score],
  config: config_lib.Gauntlet,
) -> rating_update.RatingsUpdate:
  """Returns the ratings after a round; see `rating_update.update`."""
  del config
  before = ratings_lib.admit(old, round_index, identities).standings
  checks = {u: c for u, c in sorted(report.checks.items()) if u in before}
  relative = {
    uid: deployed.gradient_score(s.loss_random, s.loss_random - s.gain)
    for uid, s in scores.items()
    if uid in before
  }
  rated = _rate(before, checks, relative)
  spared = deployed.spared(list(relative.values()))
  success = len(report.valid) / max(len(checks), 1)
  after = dict(before)
  for uid, check in checks.items():
    mu, sigma = rated.get(uid, (before[uid].mu, before[uid].sigma))
    new = dataclasses.replace(before[uid], mu=mu, sigma=sigma)
    if uid in relative:
      negative = relative[uid] < 0 and not spared
      after[uid] = _evaluate(new, round_index, scores[uid], negative)
    elif check.valid:
      after[uid] = dataclasses.replace(new, misses=0)
    elif check.finding is not checks_lib.CheckFinding.EXCUSED:
      after[uid] = _miss(new, success)
  decisions: list[ct.Json] = [
    {
      'round': round_index,
      'uid': uid,
      'hotkey': before[uid].hotkey,
      'before': _numbers(before[uid], round_index),
      'after': _numbers(after[uid], round_index),
      'reasons': [],
    }
    | rating_update.findings_of(check, scores.get(uid))
    for uid, check in checks.items()
  ]
  return rating_update.RatingsUpdate(
    ratings_lib.Ratings(round_index, after, True), decisions
  )


def weights(state: ratings_lib.Ratings) -> dict[int, float]:
  """Returns the weights of the uids that were ever evaluated.

  Without the half that goes to the owner: only shares among miners compare.
  """
  beyond = deployed.BURN_UID + 1  # the owner's uid is a miner's here
  paid = deployed.weights(
    {u + beyond: s.score for u, s in state.standings.items() if s.evaluations}
  )
  paid.pop(deployed.BURN_UID, None)
  total = sum(paid.values())
  return {uid - beyond: weight / total for uid, weight in paid.items()}


def _rate(
  standings: Mapping[int, ratings_lib.Standing],
  checks: Mapping[int, checks_lib.CheckResult],
  relative: Mapping[int, float],
) -> dict[int, tuple[float, float]]:
  """Returns (mu, sigma) after the round; peers without a message are last."""
  values = dict(relative)
  for uid, check in checks.items():
    if not check.valid and standings[uid].evaluations:
      values[uid] = deployed.MISSING_SCORE
  if len(values) < 2:
    return {}
  uids = sorted(values)
  found = deployed.plackett_luce(
    [(standings[u].mu, standings[u].sigma) for u in uids],
    [values[u] for u in uids],
    ties='inflate',
  )
  return dict(zip(uids, found, strict=True))


def _evaluate(
  old: ratings_lib.Standing,
  round_index: int,
  score: scores_lib.Score,
  negative: bool,
) -> ratings_lib.Standing:
  own = score.own_gain / score.loss_own
  average = deployed.moving_average(
    old.proof, own, score.gain / score.loss_random
  )
  signs = (*old.gain_signs, -1 if negative else 1)[-deployed.HISTORY :]
  peer = deployed.Peer(average=average, mu=old.mu, sigma=old.sigma, sync=1.0)
  final = deployed.final_score(peer, round_index - old.admitted)
  final *= deployed.negative_factor([sign < 0 for sign in signs])
  return dataclasses.replace(
    old,
    gain=1.0,  # nobody is left out for a small gain
    proof_sum=average,
    proof_weight=1.0,
    gain_signs=signs,
    evaluations=old.evaluations + 1,
    evaluated=round_index,
    misses=0,
    raw_score=final,
    score=final,
  )


def _miss(old: ratings_lib.Standing, success: float) -> ratings_lib.Standing:
  misses = old.misses + 1
  peer = deployed.Peer(final=old.score, average=old.proof)
  peer = deployed.slash(peer, deployed.missing_factor(misses, success))
  return dataclasses.replace(
    old,
    misses=misses,
    proof_sum=peer.average,
    raw_score=peer.final,
    score=peer.final,
  )


def _numbers(s: ratings_lib.Standing, round_index: int) -> dict[str, float]:
  return {
    'rating': s.ordinal,
    'mu': s.mu,
    'sigma': s.sigma,
    'gain': s.gain,
    'proof': s.proof,
    'penalty': s.factor(round_index),
    'raw_score': s.raw_score,
    'score': s.score,
  }
