"""The validator's memory of each uid: its rating, its gains, its penalties.

Plain numbers in frozen dataclasses: `rating_update.update` returns new ones,
and they survive a restart to the last bit.

A penalty is a factor on the score that lasts for some rounds. Only faults that
no honest node commits twice are punished. Being late, absent, unreachable or
out of step happens to honest nodes: it earns nothing while it lasts, no more.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant import files
from covenant import typing as ct
from covenant.gauntlet import checks as checks_lib
from covenant.gauntlet import findings

Finding = checks_lib.CheckFinding

FACTORS = {
  Finding.TWICE: 0.5,
  Finding.DIGEST: 0.5,
  Finding.REFUSED: 0.5,
  Finding.RECEIPT: 0.5,
  Finding.REPLAY: 0.25,
}
NEGATIVE, SIMILAR = 'NEGATIVE', 'SIMILAR'
NEGATIVE_FACTOR, SIMILAR_FACTOR = 0.5, 0.25
_WORST_FACTOR = 2.0**-10  # of one reason, however often
_TEXTS = {finding.name: finding.value for finding in Finding} | {
  NEGATIVE: 'its update recently made the model clearly worse, twice',
  SIMILAR: 'its messages resemble those of others, round after round',
}


class Penalty(NamedTuple):
  """A factor on the score, up to and including a round."""

  reason: str  # the name of a `checks.CheckFinding`, NEGATIVE or SIMILAR
  factor: float
  until: int  # last round

  @property
  def text(self) -> str:
    """The penalty for people, with its factor, its end and its reason."""
    return (
      f'x {self.factor:.3g} until round {self.until}: {_TEXTS[self.reason]}'
    )


def active_penalties(
  penalties: Iterable[Penalty], round_index: int
) -> tuple[Penalty, ...]:
  """Returns the penalties that last in a round."""
  return tuple(p for p in penalties if p.until >= round_index)


def penalty_factor(penalties: Iterable[Penalty], round_index: int) -> float:
  """Returns the product of the penalties that last in a round."""
  return float(
    np.prod([p.factor for p in active_penalties(penalties, round_index)])
  )


def add_penalty(
  penalties: Iterable[Penalty],
  reason: str,
  new_factor: float,
  round_index: int,
  config: config_lib.Gauntlet,
) -> tuple[Penalty, ...]:
  """Returns the active penalties and one more.

  The same offense again multiplies its factor and starts its rounds anew.
  """
  left = active_penalties(penalties, round_index)
  new_factor *= float(np.prod([p.factor for p in left if p.reason == reason]))
  new_factor = max(new_factor, _WORST_FACTOR)
  until = round_index + config.penalty_rounds
  others = (p for p in left if p.reason != reason)
  return (*others, Penalty(reason, new_factor, until))


SILENT = 3  # rounds without a valid message after which there is no pay
MU, SIGMA = 25.0, 25 / 3  # of a uid that was never rated
_LINES = 10  # last rounds of an explanation that get a line each


class Identity(NamedTuple):
  """The owner of a uid. A new owner inherits nothing."""

  hotkey: str
  registered: int  # block


@dataclasses.dataclass(frozen=True)
class Standing:
  """The record of one uid; plain numbers only."""

  hotkey: str
  registered: int  # block
  admitted: int  # first round
  mu: float = MU
  sigma: float = SIGMA
  # Average gain of a message, in what the same work usually gains.
  gain: float = 0.0
  gain_weight: float = 0.0  # decayed sum of the work that the average is of
  presence: float = 0.0  # average: 1 for a valid message, 0 for a missed round
  rounds: int = 0  # number of rounds in the average
  originality: float = 1.0  # average share in similar messages
  work: float = 1.0  # average declared work (`scores.work`)
  # Sums over evaluations with decaying weights: of the standard errors by which
  # own data gained more than other data, of the weights, and of the squared
  # weights, which is the variance of the first if it is pure noise.
  proof_sum: float = 0.0
  proof_weight: float = 0.0
  proof_variance: float = 0.0
  # Sums with the same weights, in noises of a unit: see `scores.Score`.
  parts_sum: tuple[float, ...] = ()
  level_sum: float = 0.0
  square_sum: float = 0.0
  gain_signs: tuple[int, ...] = ()  # 1 gained, -1 clearly lost, 0 neither
  evaluations: int = 0
  evaluated: int = -1  # last round evaluated; at first the one before admission
  misses: int = 0  # rounds since the last valid message
  similarity_avg: float = 0.0  # to messages that others sent no later
  penalties: tuple[Penalty, ...] = ()
  raw_score: float = 0.0  # the pay while nobody has proven any work
  score: float = 0.0  # from raw score and proof: the pay

  @property
  def ordinal(self) -> float:
    """A lower bound of the rating: mu - 3 sigma."""
    return self.mu - 3 * self.sigma

  @property
  def proof(self) -> float:
    """The extra gain on own data, in standard errors of one evaluation."""
    return self.proof_sum / self.proof_weight if self.proof_weight else 0.0

  @property
  def certainty(self) -> float:
    """The proof in its own standard errors, those of all evaluations."""
    if not self.proof_variance:
      return 0.0
    return self.proof_sum / self.proof_variance**0.5

  @property
  def trained_units(self) -> float:
    """The effective fraction of its units of work that it trained on.

    It is the square of their mean gain over their mean square, as Kish's
    effective sample size: w, if a fraction w gains alike and the others
    nothing, however much that is. A square lost in noise counts as whole.
    """
    level = max(self.level_sum, 0.0) ** 2
    square = self.square_sum * self.proof_weight
    return level / max(square, level) if level else 0.0

  @property
  def trained_parts(self) -> float:
    """The effective fraction of the positions of a sequence, likewise."""
    squares = sum(x * x for x in self.parts_sum) * len(self.parts_sum)
    level = max(sum(self.parts_sum), 0.0) ** 2
    return level / squares if squares else 0.0

  def factor(self, round_index: int) -> float:
    """Returns the product of the penalties of a round."""
    return penalty_factor(self.penalties, round_index)

  def punish(
    self,
    reason: str,
    factor: float,
    round_index: int,
    config: config_lib.Gauntlet,
  ) -> 'Standing':
    """Returns the record with one more penalty; see `add_penalty`."""
    penalties = add_penalty(self.penalties, reason, factor, round_index, config)
    return dataclasses.replace(self, penalties=penalties)


@dataclasses.dataclass(frozen=True)
class Ratings:
  """All standings after a round. Immutable; equal on equal validators."""

  round: int = -1  # last round counted
  standings: Mapping[int, Standing] = dataclasses.field(default_factory=dict)
  # True once enough uids had a score for it to be paid; stays so.
  has_proof: bool = False


def admit(
  ratings: Ratings, round_index: int, identities: Mapping[int, Identity]
) -> Ratings:
  """Returns the ratings of exactly the uids that are registered now.

  A uid that another hotkey took, or that registered again, begins anew. Call
  it before the selections of a round.
  """
  standings = {}
  for uid, identity in sorted(identities.items()):
    old = ratings.standings.get(uid)
    if old is None or (old.hotkey, old.registered) != identity:
      old = Standing(*identity, round_index, evaluated=round_index - 1)
    standings[uid] = old
  return dataclasses.replace(ratings, standings=standings)


def answering(ratings: Ratings) -> dict[int, float]:
  """Returns the usual work of the uids that were heard of lately.

  They sent a valid message in the last `SILENT` rounds.
  """
  return {
    uid: standing.work * standing.presence
    for uid, standing in ratings.standings.items()
    if standing.rounds and standing.misses < SILENT
  }


def to_json(ratings: Ratings) -> str:
  """Encodes ratings exactly: `from_json(to_json(x)) == x`, to the last bit."""
  return json.dumps(dataclasses.asdict(ratings), allow_nan=False)


def from_json(text: str) -> Ratings:
  """Decodes the ratings of `to_json`."""
  raw = json.loads(text)
  standings = {}
  for uid, fields in raw['standings'].items():
    fields['penalties'] = tuple(Penalty(*p) for p in fields['penalties'])
    fields['gain_signs'] = tuple(fields['gain_signs'])
    fields['parts_sum'] = tuple(fields.get('parts_sum', ()))
    standings[int(uid)] = Standing(**fields)
  return Ratings(raw['round'], standings, raw['has_proof'])


def read_decisions(path: pathlib.Path) -> list[ct.Json]:
  """Reads the decisions of the first validator in a verdicts.jsonl.

  Lines that cannot be read are left out.
  """
  verdicts = files.read_records(path, 'round', 'decisions').objects
  first = verdicts[0].get('validator') if verdicts else None
  return [
    decision
    for verdict in verdicts
    if verdict.get('validator') == first
    for decision in verdict['decisions']
  ]


def _factors(now: ct.Json) -> list[str]:
  """Returns the factors of a score, one line; none by the deployed rules."""
  if 'paid_work' not in now:
    return []
  whole = now['paid_work'] * now['penalty']
  proof = now['score'] / whole if whole else 0.0
  return [
    f'  = {now["paid_work"]:.3f} of the usual work (declared '
    f'{now["work"]:.2f}, present {now["presence"]:.0%}, gain {now["gain"]:.2f}'
    f' of what is usual) x penalties {now["penalty"]:.3g} x {proof:.2f} for '
    'proof of work'
  ]


def explain(decisions: Iterable[ct.Json], uid: int) -> str:
  """Explains the score of a uid: its standing, then its last rounds.

  Args:
    decisions: records of `rating_update.update`, oldest first, of any uids.
      Other fields are ignored, except `weight`, which is shown if present.
    uid: the uid to explain.
  """
  records = [d for d in decisions if d['uid'] == uid]
  if not records:
    return f'uid {uid}: no validator of this run has judged it.'
  last = records[-1]
  mine = [d for d in records if d['hotkey'] == last['hotkey']]
  now, weight = last['after'], last.get('weight')
  valid = sum(d['verdict'] in findings.VALID_NAMES for d in mine)
  lines = [
    f'uid {uid}, hotkey {last["hotkey"]}, after round {last["round"] + 1}:',
    f'  score {now["score"]:.3f}'
    + ('' if weight is None else f', weight {weight:.4f}'),
    *_factors(now),
    f'  rating {now["rating"]:.1f} ({now["mu"]:.1f} - 3 x {now["sigma"]:.1f}),'
    ' which decides whether it is heard',
    f'  {valid} of {len(mine)} rounds '
    f'valid, {sum(d["evaluation"] is not None for d in mine)} evaluated',
  ]
  if len(mine) < len(records):
    lines.append('  an earlier hotkey held this uid; nothing was inherited')
  lines.append('Last rounds:')
  for d in mine[-_LINES:]:
    moved = d['after']['score'] - d['before']['score']
    why = '; '.join(d['reasons']) or 'valid, not evaluated'
    lines.append(
      f'  {d["round"] + 1}: {d["after"]["score"]:.3f} ({moved:+.3f}) {why}'
    )
  return '\n'.join(lines)
