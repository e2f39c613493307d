"""How a round changes what a validator remembers of each uid.

Two questions, two memories. Who is heard: a Plackett-Luce rating of the ranks
by gain, which a single wild number cannot move far. Who is paid: the average
gain itself, because only a quantity that adds up can be shared out so that
posing as many uids does not pay (incentives.py). Both are of data that no
peer knew; whether a peer trained on its own data is a third, `proof`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from openskill.models import PlackettLuce

from covenant import config as config_lib
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import scores as scores_lib
from covenant.gauntlet import standing as standing_lib

Identity = standing_lib.Identity
Penalty = standing_lib.Penalty
Standing = standing_lib.Standing
State = standing_lib.State
Verdict = checks_lib.Verdict
admit = standing_lib.admit
from_json = standing_lib.from_json
to_json = standing_lib.to_json

_MODEL = PlackettLuce(
  mu=standing_lib.MU, sigma=standing_lib.SIGMA, beta=7.0, tau=0.1
)
# A gain counts as at most this many of the round's median, one evaluation as
# at most this many standard errors: one lucky draw must not carry a uid.
LARGEST_GAIN, LARGEST_PROOF = 5.0, 6.0
SIGNIFICANT = 2.0  # standard errors
# Until one in so many uids with merit has proof, merit is paid: the first to
# be certain, perhaps by luck, must not take all.
ENOUGH = 2
NO_PROOF = 0.25  # of the usual proof: up to here it counts as none
HISTORY = 8  # evaluations whose signs are remembered
SILENT = 3  # rounds without a valid message after which there is no pay
# Faults that no honest node makes twice. Being late, absent, unreachable or
# out of step happens to the honest: it earns nothing while it lasts, no more.
FACTORS = {
  Verdict.TWICE: 0.5,
  Verdict.DIGEST: 0.5,
  Verdict.REFUSED: 0.5,
  Verdict.RECEIPT: 0.5,
  Verdict.TINY: 0.5,
  Verdict.HUGE: 0.5,
  Verdict.COPY: 0.25,
  Verdict.TWIN: 0.25,
}
_NOT_JUDGED = Verdict.EXCUSED, Verdict.AWAITED
_WORST_FACTOR = 2.0**-10  # of one reason, however often
NEGATIVE, ALIKE = 'NEGATIVE', 'ALIKE'
NEGATIVE_FACTOR, ALIKE_FACTOR = 0.5, 0.25
# Honest peers resemble another by chance, and not for long: of 36 in three
# mixed runs none was above 0.07 in the average of so many rounds. Where all do,
# as dense gradients, it takes so many times the median.
ALIKE_ROUNDS, MOST_ALIKE, MANY_TIMES = 8, 0.15, 3.0
_TEXTS = {v.name: v.value for v in Verdict} | {
  NEGATIVE: 'twice of late, its update made the model clearly worse',
  ALIKE: 'round after round its messages are too much like those of others',
}


class Update(NamedTuple):
  state: State
  decisions: list[dict[str, Any]]  # a JSON object a uid, see docs/gauntlet.md


def update(
  state: State,
  round_index: int,
  identities: Mapping[int, Identity],
  report: checks_lib.Report,
  scores: Mapping[int, scores_lib.Score],
  config: config_lib.Gauntlet,
  staleness: int = 0,
) -> Update:
  """The state after a round, and why.

  Args:
    state: after an earlier round; `State()` before the first.
    round_index: later than `state.round`.
    identities: all miners registered now, by uid.
    report: the checks of the round. A uid that it lacks is left as it was.
    scores: of those who were evaluated, by uid; valid ones only.
    config: the section of the run's config.
    staleness: by how many rounds a message may be late for its parameters. Who
      sends nothing is waited for as long, and answers for those rounds with a
      message that is as stale (and counts less); else they are misses after
      all. So it does not pay to stay away from rounds that look bad.
  """
  if round_index <= state.round:
    raise ValueError(
      f'round {round_index} was counted already: the state is of round '
      f'{state.round}'
    )
  before = admit(state, round_index, identities).standings
  judged = {
    uid: _awaited(check, before[uid], staleness)
    for uid, check in sorted(report.checks.items())
    if uid in before
  }
  ratings = _rate(before, judged, scores)
  scale = _scale(scores)
  after, reasons = dict(before), {u: [] for u in judged}
  for uid, check in judged.items():
    mu, sigma = ratings.get(uid, (before[uid].mu, before[uid].sigma))
    rated = dataclasses.replace(before[uid], mu=mu, sigma=sigma)
    score = scores.get(uid)
    after[uid] = _observe(
      rated, round_index, check, score, scale, config, reasons[uid]
    )
  usual = _usual_proof(after)
  alike = sorted(after[uid].alike for uid in judged) or [0.0]
  limit = max(MOST_ALIKE, MANY_TIMES * alike[(len(alike) - 1) // 2])
  decisions = []
  for uid, check in judged.items():
    if check.valid and after[uid].alike > limit:
      reasons[uid].append(
        f'{after[uid].alike:.2f} alike to others, {check.twin} now'
      )
      after[uid] = _punish(after[uid], ALIKE, ALIKE_FACTOR, round_index, config)
    after[uid] = _settle(
      after[uid], round_index, check, usual, config, reasons[uid]
    )
    score = scores.get(uid)
    decisions.append(
      {
        'round': round_index,
        'uid': uid,
        'hotkey': before[uid].hotkey,
        'verdict': check.verdict.name,
        'detail': check.detail,
        'block': check.block,
        'relative_norm': check.relative_norm,
        'similarity': check.similarity,
        'twin': check.twin,
        'evaluation': dataclasses.asdict(score) if score else None,
        'median_gain': scale,
        'median_proof': usual,
        'before': _numbers(before[uid], round_index),
        'after': _numbers(after[uid], round_index),
        'reasons': reasons[uid],
      }
    )
  merits = sum(s.merit > 0 for s in after.values())
  scored = sum(s.score > 0 for s in after.values())
  proven = state.proven or bool(0 < merits <= ENOUGH * scored)
  return Update(State(round_index, after, proven), decisions)


def _awaited(
  check: checks_lib.Check, standing: Standing, staleness: int
) -> checks_lib.Check:
  if check.verdict is Verdict.MISSING and standing.waiting < staleness:
    return check._replace(verdict=Verdict.AWAITED)
  return check


def _rate(
  standings: Mapping[int, Standing],
  checks: Mapping[int, checks_lib.Check],
  scores: Mapping[int, scores_lib.Score],
) -> dict[int, tuple[float, float]]:
  """New (mu, sigma) of who was evaluated, and of who should have sent.

  Who sent nothing valid is last, tied. Without this it would pay to stay
  away from rounds that look bad (reference/templar.md 10).
  """
  values = {u: s.gain for u, s in scores.items() if u in standings}
  last = min(values.values(), default=0.0) - 1.0
  for uid, check in checks.items():
    absent = not check.valid and check.verdict not in _NOT_JUDGED
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
  """The (lower) median of the gains above zero.

  None where nobody clearly gained: such a round says more of the model or of
  the rates than of the peers, and is held against none of them.
  """
  if not any(s.gain > SIGNIFICANT * s.gain_error for s in scores.values()):
    return None
  positive = sorted(s.gain for s in scores.values() if s.gain > 0)
  return positive[(len(positive) - 1) // 2]


def _observe(
  old: Standing,
  round_index: int,
  check: checks_lib.Check,
  score: scores_lib.Score | None,
  scale: float | None,
  config: config_lib.Gauntlet,
  reasons: list[str],
) -> Standing:
  """The standing with what the round showed; adds to `reasons`."""
  if check.verdict in _NOT_JUDGED:
    reasons.append(check.verdict.value)
    awaited = check.verdict is Verdict.AWAITED
    return dataclasses.replace(old, waiting=old.waiting + awaited)
  if not check.valid:
    reasons.append(': '.join(filter(None, (check.verdict.value, check.detail))))
    new = dataclasses.replace(old, misses=old.misses + 1)
    new = _average(new, 0.0, config) if old.gains else new
    factor = FACTORS.get(check.verdict)
    if factor is None:
      return new
    return _punish(new, check.verdict.name, factor, round_index, config)
  alike = old.alike + ((check.similarity or 0.0) - old.alike) / ALIKE_ROUNDS
  new = dataclasses.replace(old, misses=0, alike=alike, waiting=0)
  for _ in range(old.waiting - check.staleness):
    reasons.append('sent nothing in a round before, and answers for it now')
    new = _average(new, 0.0, config) if old.gains else new
  if score is None:
    return new
  decay = 1 - 1 / config.memory
  sign = int(score.gain > 0)
  if score.gain < -SIGNIFICANT * score.gain_error and scale is not None:
    sign = -1
  new = dataclasses.replace(
    new,
    proof_sum=decay * old.proof_sum
    + _errors(score.proof, score.proof_error, LARGEST_PROOF),
    proof_weight=decay * old.proof_weight + 1,
    proof_variance=decay**2 * old.proof_variance + 1,
    signs=(*old.signs, sign)[-HISTORY:],
    effort=old.effort
    + max(1 / (old.evaluations + 1), 1 / config.memory)
    * (score.effort - old.effort),
    evaluations=old.evaluations + 1,
    evaluated=round_index,
  )
  reasons.append(
    f'gained {score.gain:.2g} +- {score.gain_error:.1g} nats on random and '
    f'{score.own_gain:.2g} +- {score.own_gain_error:.1g} on its own data'
  )
  if scale is None:
    reasons.append('nobody clearly gained: not held against anybody')
    return new
  relative = score.gain / scale
  new = _average(new, min(max(relative, -1.0), LARGEST_GAIN), config)
  if sign < 0 and new.signs.count(-1) > 1:
    new = _punish(new, NEGATIVE, NEGATIVE_FACTOR, round_index, config)
  return new


def _settle(
  standing: Standing,
  round_index: int,
  check: checks_lib.Check,
  usual: float,
  config: config_lib.Gauntlet,
  reasons: list[str],
) -> Standing:
  """The standing with its merit and score; adds what was lost to `reasons`."""
  if not config.evaluate:
    equal = float(check.valid) or (
      standing.score if check.verdict in _NOT_JUDGED else 0.0
    )
    return dataclasses.replace(standing, merit=equal, score=equal)
  kept = tuple(p for p in standing.penalties if p.until >= round_index)
  for p in kept:
    reasons.append(
      f'x {p.factor:.3g} until round {p.until}: {_TEXTS[p.reason]}'
    )
  merit = max(standing.gain, 0.0) * standing.factor(round_index)
  if standing.effort < 1:
    # One worker under n uids that say an n-th each: all gain like the whole,
    # and are paid like one.
    effort = standing.effort ** (1 / config.power)
    merit *= effort
    reasons.append(
      f'x {effort:.2f}: it says that it trains on {standing.effort:.0%} of '
      'the usual sequences'
    )
  if standing.misses >= SILENT:
    merit = 0.0
    reasons.append(f'x 0: no valid message for {standing.misses} rounds')
  elif standing.evaluations and standing.gain <= 0:
    reasons.append('x 0: on average its updates do not help')
  proven = proven_share(standing, usual)
  if proven < 1 and standing.evaluations:
    reasons.append(
      f'x {proven:.2f}: own data gains {standing.proof:.2f} standard errors '
      f'more than other data, {usual:.2f} is usual; that is '
      f'{standing.certainty:.1f} over all evaluations, pay begins at '
      f'{SIGNIFICANT:g}'
    )
  return dataclasses.replace(
    standing, penalties=kept, merit=merit, score=merit * proven
  )


def _usual_proof(standings: Mapping[int, Standing]) -> float:
  """The (lower) median `proof` of those whose proof is certain; 0 if none."""
  proven = sorted(
    s.proof for s in standings.values() if s.certainty > SIGNIFICANT
  )
  return proven[(len(proven) - 1) // 2] if proven else 0.0


def proven_share(standing: Standing, usual: float) -> float:
  """How much of the usual work on own data is proven, 0 to 1.

  In proportion, not by a threshold: a worker that trains once on the data of
  n uids and sends the result under all of them proves an n-th with each, and
  a quarter is nothing. What is not yet certain fades in from 2 to 3 standard
  errors: a copier's certainty is a standard normal draw that wanders slowly.
  """
  if usual <= 0:
    return 0.0
  certain = min(max(standing.certainty - SIGNIFICANT, 0.0), 1.0)
  share = (standing.proof / usual - NO_PROOF) / (1 - NO_PROOF)
  return certain * min(max(share, 0.0), 1.0)


def _average(
  old: Standing, gain: float, config: config_lib.Gauntlet
) -> Standing:
  """A plain mean at first, then a moving one of `config.memory`."""
  weight = max(1 / (old.gains + 1), 1 / config.memory)
  return dataclasses.replace(
    old, gain=old.gain + weight * (gain - old.gain), gains=old.gains + 1
  )


def _punish(
  old: Standing,
  reason: str,
  factor: float,
  round_index: int,
  config: config_lib.Gauntlet,
) -> Standing:
  """A penalty more; the same offence again multiplies and begins anew."""
  active = [p for p in old.penalties if p.until >= round_index]
  factor *= float(np.prod([p.factor for p in active if p.reason == reason]))
  factor = max(factor, _WORST_FACTOR)
  until = round_index + config.penalty_rounds
  others = (p for p in active if p.reason != reason)
  return dataclasses.replace(
    old, penalties=(*others, Penalty(reason, factor, until))
  )


def _errors(value: float, error: float, largest: float) -> float:
  """`value` in standard errors, at most `largest` either way."""
  errors = value / max(error, 1e-12)
  return min(max(errors, -largest), largest)


def _numbers(s: Standing, round_index: int) -> dict[str, float]:
  return {
    'rating': s.ordinal,
    'mu': s.mu,
    'sigma': s.sigma,
    'gain': s.gain,
    'proof': s.proof,
    'certainty': s.certainty,
    'alike': s.alike,
    'penalty': s.factor(round_index),
    'merit': s.merit,
    'score': s.score,
  }
