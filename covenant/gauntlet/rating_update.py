"""The update of a validator's memory by a round.

Two memories answer two questions. Which uids are heard follows from a
Plackett-Luce rating of the ranks by gain, which a single wild number cannot
move far. Which uids are paid follows from the declared work, as far as the gain
is that of as much work: a larger gain than usual is not worth more, because it
is taken from what the others' next messages would gain (docs/gauntlet.md). Both
use data that no peer knew. A third memory, `proof`, says whether a peer trained
on all of its own data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from covenant import config as config_lib
from covenant import extras
from covenant import typing as ct
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import ratings as ratings_lib
from covenant.gauntlet import scores as scores_lib
from covenant.gauntlet import work as work_lib

with extras.needed('run'):
  from openskill.models import PlackettLuce

Finding = checks_lib.CheckFinding

_MODEL = PlackettLuce(
  mu=ratings_lib.MU, sigma=ratings_lib.SIGMA, beta=7.0, tau=0.1
)
# A gain counts as at most this many times what is usual for the same work, an
# evaluation as at most this many standard errors: one lucky draw must not carry
# a uid, and one strong message no rounds without work.
LARGEST_GAIN, LARGEST_PROOF = 1.5, 6.0
# Until one in so many parts of all raw scores is proven, raw scores are paid:
# the first to be certain, perhaps by luck, must not take all.
ENOUGH = 2
HISTORY = 8  # evaluations whose signs are remembered
# Honest peers resemble another by chance, but not for long. If all of them do,
# as dense gradients, a uid is punished from so many times the median on.
SIMILAR_ROUNDS, MOST_SIMILAR, MANY_TIMES = 8, 0.15, 3.0


class RatingsUpdate(NamedTuple):
  """The ratings after a round, with a JSON object per uid that explains them.

  docs/gauntlet.md describes these objects.
  """

  ratings: ratings_lib.Ratings
  decisions: list[ct.Json]


def update(
  old: ratings_lib.Ratings,
  round_index: int,
  identities: Mapping[int, ratings_lib.Identity],
  report: checks_lib.CheckReport,
  scores: Mapping[int, scores_lib.Score],
  config: config_lib.Gauntlet,
) -> RatingsUpdate:
  """Returns the ratings after a round, and their explanation.

  Args:
    old: the ratings after an earlier round; `Ratings()` before the first.
    round_index: the round, later than `old.round`.
    identities: all miners registered now, by uid.
    report: the checks of the round. Uids that it lacks stay as they were.
    scores: of the evaluated uids with a valid message, by uid.
    config: the section of the run's config.

  Raises:
    ValueError: the round was counted already.
  """
  if round_index <= old.round:
    raise ValueError(
      f'expected a round after {old.round}, the last one counted, got '
      f'{round_index}'
    )
  before = ratings_lib.admit(old, round_index, identities).standings
  judged = {u: c for u, c in sorted(report.checks.items()) if u in before}
  rated = _rate(before, judged, scores)
  scale = _scale(scores)
  after, reasons = dict(before), {u: [] for u in judged}
  for uid, check in judged.items():
    mu, sigma = rated.get(uid, (before[uid].mu, before[uid].sigma))
    new = dataclasses.replace(before[uid], mu=mu, sigma=sigma)
    score = scores.get(uid)
    after[uid] = _observe(
      new, round_index, check, score, scale, config, reasons[uid]
    )
  usual = work_lib.usual(after)
  limit = _similarity_limit([after[uid].similarity_avg for uid in judged])
  for uid, check in judged.items():
    similar = check.valid and after[uid].similarity_avg > limit
    # Punishment waits for a full memory: a miner whose training another repeats
    # may be unlucky for some rounds.
    known = after[uid].evaluations >= config.memory
    if known and similar and work_lib.lacks_proof(after[uid], usual):
      reasons[uid].append(
        f'average similarity {after[uid].similarity_avg:.2f} to others, now '
        f'to {check.twin}'
      )
      after[uid] = after[uid].punish(
        ratings_lib.SIMILAR, ratings_lib.SIMILAR_FACTOR, round_index, config
      )
    after[uid] = _settle(
      after[uid], round_index, check, usual, config, reasons[uid]
    )
  decisions = [
    {'round': round_index, 'uid': uid, 'hotkey': before[uid].hotkey}
    | findings_of(check, scores.get(uid))
    | {
      'median_gain': scale,
      'median_proof': usual.proof,
      'median_units': usual.units,
      'median_parts': usual.parts,
      'before': _numbers(before[uid], round_index),
      'after': _numbers(after[uid], round_index),
      'reasons': reasons[uid],
    }
    for uid, check in judged.items()
  ]
  # Pay counts, so uids that declare next to nothing have no influence.
  earning = sum(s.raw_score for s in after.values())
  scored = sum(s.raw_score for s in after.values() if s.score > 0)
  has_proof = old.has_proof or bool(0 < earning <= ENOUGH * scored)
  return RatingsUpdate(
    ratings_lib.Ratings(round_index, after, has_proof), decisions
  )


def findings_of(
  check: checks_lib.CheckResult, score: scores_lib.Score | None
) -> dict[str, ct.Json]:
  """Returns the fields of a decision that the checks and the score fill."""
  return {
    'verdict': check.finding.name,
    'detail': check.detail,
    'block': check.block,
    'relative_norm': check.relative_norm,
    'similarity': check.similarity,
    'twin': check.twin,
    'evaluation': None if score is None else dataclasses.asdict(score),
  }


def _similarity_limit(averages: Sequence[float]) -> float:
  """Returns the average similarity above which a uid is punished."""
  ordered = sorted(averages) or [0.0]
  median = ordered[(len(ordered) - 1) // 2]
  return max(MOST_SIMILAR, MANY_TIMES * median)


def _rate(
  standings: Mapping[int, ratings_lib.Standing],
  checks: Mapping[int, checks_lib.CheckResult],
  scores: Mapping[int, scores_lib.Score],
) -> dict[int, tuple[float, float]]:
  """Returns the new (mu, sigma) of the uids that were or should be evaluated.

  Uids without a valid message are last, tied. Without this it would pay to
  skip rounds that look bad.
  """
  values = {u: s.gain for u, s in scores.items() if u in standings}
  last = min(values.values(), default=0.0) - 1.0
  for uid, check in checks.items():
    absent = not check.valid and check.finding is not Finding.EXCUSED
    if absent and standings[uid].evaluations:
      values[uid] = last
  if not scores or len(values) < 2:
    return {}
  uids = sorted(values)
  teams = [
    [_MODEL.rating(mu=standings[u].mu, sigma=standings[u].sigma)] for u in uids
  ]
  rated = _MODEL.rate(teams, scores=[values[u] for u in uids])
  return {u: (t[0].mu, t[0].sigma) for u, t in zip(uids, rated, strict=True)}


def _scale(scores: Mapping[int, scores_lib.Score]) -> float | None:
  """Returns the median of the positive gains, per unit of declared work.

  None if no uid clearly gained: such a round says more about the model or the
  learning rates than about the peers, and counts against none of them.
  """
  if not any(
    s.gain > work_lib.SIGNIFICANT * s.gain_error for s in scores.values()
  ):
    return None
  return work_lib.median(
    (s.gain / s.work, s.work) for s in scores.values() if s.gain > 0
  )


def _observe(
  old: ratings_lib.Standing,
  round_index: int,
  check: checks_lib.CheckResult,
  score: scores_lib.Score | None,
  scale: float | None,
  config: config_lib.Gauntlet,
  reasons: list[str],
) -> ratings_lib.Standing:
  """Returns the record with the round's observations; extends `reasons`."""
  if check.finding is Finding.EXCUSED:
    # It costs nothing, but pays for no longer than any other silence.
    reasons.append(check.finding.value)
    return dataclasses.replace(old, misses=old.misses + 1)
  if not check.valid:
    reasons.append(': '.join(filter(None, (check.finding.value, check.detail))))
    new = _present(old, 0.0, config) if old.rounds else old
    new = dataclasses.replace(new, misses=old.misses + 1)
    factor = ratings_lib.FACTORS.get(check.finding)
    if factor is None:
      return new
    return new.punish(check.finding.name, factor, round_index, config)
  difference = (check.similarity or 0.0) - old.similarity_avg
  new = dataclasses.replace(
    old,
    misses=0,
    originality=old.originality
    + max(1 / (old.rounds + 1), 1 / SIMILAR_ROUNDS)
    * (check.originality - old.originality),
    similarity_avg=old.similarity_avg + difference / SIMILAR_ROUNDS,
  )
  new = _present(new, 1.0, config)
  if check.originality < 1:
    reasons.append(': '.join((check.finding.value, check.detail)))
  if score is None:
    return new
  return _evaluate(new, round_index, score, scale, config, reasons)


def _evaluate(
  old: ratings_lib.Standing,
  round_index: int,
  score: scores_lib.Score,
  scale: float | None,
  config: config_lib.Gauntlet,
  reasons: list[str],
) -> ratings_lib.Standing:
  """Returns the record with the evaluation of a valid message."""
  decay = 1 - 1 / config.memory
  sign = int(score.gain > 0)
  if (
    score.gain < -work_lib.SIGNIFICANT * score.gain_error and scale is not None
  ):
    sign = -1
  new = dataclasses.replace(
    old,
    # Weighted by work: a round of little work proves little of the rest.
    proof_sum=decay * old.proof_sum
    + score.work * _errors(score.proof, score.proof_error, LARGEST_PROOF),
    proof_weight=decay * old.proof_weight + score.work,
    proof_variance=decay**2 * old.proof_variance + score.work**2,
    **_moments(old, score, decay),
    gain_signs=(*old.gain_signs, sign)[-HISTORY:],
    work=old.work
    + max(1 / (old.evaluations + 1), 1 / config.memory)
    * (score.work - old.work),
    evaluations=old.evaluations + 1,
    evaluated=round_index,
  )
  reasons.append(
    f'gained {score.gain:.2g} +- {score.gain_error:.1g} nats on random and '
    f'{score.own_gain:.2g} +- {score.own_gain_error:.1g} on its own data'
  )
  if scale is None:
    reasons.append('no uid clearly gained: this counts against none')
    return new
  relative = score.gain / (scale * score.work)
  relative = min(max(relative, -1.0), LARGEST_GAIN)
  weight = decay * old.gain_weight + score.work
  gain = old.gain + score.work / weight * (relative - old.gain)
  new = dataclasses.replace(new, gain=gain, gain_weight=weight)
  if sign < 0 and new.gain_signs.count(-1) > 1:
    new = new.punish(
      ratings_lib.NEGATIVE, ratings_lib.NEGATIVE_FACTOR, round_index, config
    )
  return new


def _moments(
  old: ratings_lib.Standing, score: scores_lib.Score, decay: float
) -> dict[str, Any]:
  """Returns the sums that tell on how much of its data a uid trained."""
  scale = score.work / score.noise if score.noise else 0.0
  before = old.parts_sum or (0.0,) * len(score.parts)
  return {
    'parts_sum': tuple(
      decay * x + scale * part
      for x, part in zip(before, score.parts, strict=True)
    ),
    'level_sum': decay * old.level_sum + scale * score.level,
    'square_sum': decay * old.square_sum + scale * score.square,
  }


def _settle(
  standing: ratings_lib.Standing,
  round_index: int,
  check: checks_lib.CheckResult,
  usual: work_lib.Usual,
  config: config_lib.Gauntlet,
  reasons: list[str],
) -> ratings_lib.Standing:
  """Returns the record with its scores; adds each deduction to `reasons`."""
  if not config.evaluate:
    equal = float(check.valid) or (
      standing.score if check.finding is Finding.EXCUSED else 0.0
    )
    return dataclasses.replace(standing, raw_score=equal, score=equal)
  kept = ratings_lib.active_penalties(standing.penalties, round_index)
  reasons.extend(penalty.text for penalty in kept)
  paid = work_lib.paid_work(standing)
  raw_score = paid * standing.factor(round_index)
  if standing.evaluations and paid < 1:
    reasons.append(
      f'paid for {paid:.2f} of the usual work: it declares '
      f'{standing.work:.2f}, sent a message in {standing.presence:.0%} of its '
      f'rounds, and gains {standing.gain:.2f} of what as much work does'
    )
  if standing.misses >= ratings_lib.SILENT:
    raw_score = 0.0
    reasons.append(f'x 0: no valid message for {standing.misses} rounds')
  elif standing.evaluations and standing.gain <= 0:
    reasons.append('x 0: on average its updates do not help')
  share = work_lib.proof_share(standing, usual)
  if share < 1 and standing.evaluations:
    trained = work_lib.trained(standing, usual)
    reasons.append(
      f'x {share:.2f}: own data gains {standing.proof:.2f} standard errors '
      f'more than other data, {usual.proof:.2f} is usual; that is '
      f'{standing.certainty:.1f} over all evaluations, pay begins at '
      f'{work_lib.SIGNIFICANT:g}; {trained:.2f} of it gains as usual, which '
      f'counts as {trained**work_lib.STRICTNESS:.2f}'
    )
  # Until proofs say whose work it is, similar messages share the pay of one.
  return dataclasses.replace(
    standing,
    penalties=kept,
    raw_score=raw_score * standing.originality,
    score=raw_score * share,
  )


def _present(
  old: ratings_lib.Standing, present: float, config: config_lib.Gauntlet
) -> ratings_lib.Standing:
  """Adds a round to the presence, a moving average of `config.memory`."""
  weight = max(1 / (old.rounds + 1), 1 / config.memory)
  presence = old.presence + weight * (present - old.presence)
  return dataclasses.replace(old, presence=presence, rounds=old.rounds + 1)


def _errors(value: float, error: float, largest: float) -> float:
  """Returns a value in standard errors, clipped to +- `largest`."""
  errors = value / max(error, 1e-12)
  return min(max(errors, -largest), largest)


def _numbers(s: ratings_lib.Standing, round_index: int) -> dict[str, float]:
  """Returns the numbers of a decision's 'before' and 'after'."""
  return {
    'rating': s.ordinal,
    'mu': s.mu,
    'sigma': s.sigma,
    'gain': s.gain,
    'work': s.work,
    'presence': s.presence,
    'paid_work': work_lib.paid_work(s),
    'proof': s.proof,
    'certainty': s.certainty,
    'trained_units': s.trained_units,
    'trained_parts': s.trained_parts,
    'similarity_avg': s.similarity_avg,
    'penalty': s.factor(round_index),
    'raw_score': s.raw_score,
    'score': s.score,
  }
