"""The validator's memory of each uid.

Plain numbers in frozen dataclasses: `rating_update.update` returns new ones,
and they survive a restart to the last bit.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple

from covenant import config as config_lib
from covenant.gauntlet import penalties as penalties_lib

Penalty = penalties_lib.Penalty

MU, SIGMA = 25.0, 25 / 3  # of a uid that was never rated


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
  gain: float = 0.0  # average, in medians of the evaluated peers
  gains: int = 0  # number of gains in the average
  # Sums over evaluations with decaying weights: of the standard errors by which
  # own data gained more than other data, of the weights, and of the squared
  # weights, which is the variance of the first if it is pure noise.
  proof_sum: float = 0.0
  proof_weight: float = 0.0
  proof_variance: float = 0.0
  gain_signs: tuple[int, ...] = ()  # 1 gained, -1 clearly lost, 0 neither
  evaluations: int = 0
  evaluated: int = -1  # last round evaluated; at first the one before admission
  work_fraction: float = 1.0  # declared part of the usual work, average
  waiting: int = 0  # rounds without a message that may still be answered for
  misses: int = 0  # rounds since the last valid message
  similarity_avg: float = 0.0  # to messages that others sent no later
  penalties: tuple[Penalty, ...] = ()
  raw_score: float = 0.0  # from gain and penalties
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

  def factor(self, round_index: int) -> float:
    """Returns the product of the penalties of a round."""
    return penalties_lib.factor(self.penalties, round_index)

  def punish(
    self,
    reason: str,
    factor: float,
    round_index: int,
    config: config_lib.Gauntlet,
  ) -> 'Standing':
    """Returns the record with one more penalty; see `penalties.add`."""
    penalties = penalties_lib.add(
      self.penalties, reason, factor, round_index, config
    )
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


def to_json(ratings: Ratings) -> str:
  """Encodes ratings exactly: `from_json(to_json(x)) == x`, to the last bit."""
  return json.dumps(dataclasses.asdict(ratings), allow_nan=False)


def from_json(text: str) -> Ratings:
  """Decodes the ratings of `to_json`."""
  raw = json.loads(text)
  standings = {}
  for uid, fields in raw['standings'].items():
    penalties = tuple(Penalty(*p) for p in fields.pop('penalties'))
    gain_signs = tuple(fields.pop('gain_signs'))
    standings[int(uid)] = Standing(
      **fields, penalties=penalties, gain_signs=gain_signs
    )
  return Ratings(raw['round'], standings, raw['has_proof'])
