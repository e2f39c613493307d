"""What a validator remembers of each uid.

Plain numbers in frozen dataclasses: a function takes a state and returns a
new one (ratings.py), and a state survives a restart to the last bit.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

MU, SIGMA = 25.0, 25 / 3  # of a uid that was never rated


class Identity(NamedTuple):
  """Who holds a uid. Another one inherits nothing."""

  hotkey: str
  registered: int  # block


class Penalty(NamedTuple):
  """Multiplies the score up to and including a round, whatever is measured."""

  reason: str  # a `checks.Verdict`'s name, or 'NEGATIVE'
  factor: float
  until: int


@dataclasses.dataclass(frozen=True)
class Standing:
  """What is known of one uid; plain numbers only."""

  hotkey: str
  registered: int
  admitted: int  # first round
  mu: float = MU
  sigma: float = SIGMA
  gain: float = 0.0  # average, in medians of the evaluated peers
  gains: int = 0  # how many it is of
  # Sums over evaluations, older ones count less: of the standard errors by
  # which own data gained more than other data, of their weights, and of the
  # weights' squares, the variance of the first if there is nothing in it.
  proof_sum: float = 0.0
  proof_weight: float = 0.0
  proof_variance: float = 0.0
  signs: tuple[int, ...] = ()  # 1 gained, -1 clearly lost, 0 neither
  evaluations: int = 0
  evaluated: int = -1  # last round; before the first, the one before admission
  # How much of the usual work it said it did, averaged as the gain.
  effort: float = 1.0
  waiting: int = 0  # rounds that it sent nothing, and may yet answer for
  misses: int = 0  # rounds since the last valid message
  # How alike its messages have been to those that others sent no later.
  alike: float = 0.0
  penalties: tuple[Penalty, ...] = ()
  merit: float = 0.0  # gain and penalties
  score: float = 0.0  # merit and proof: what is paid for

  @property
  def ordinal(self) -> float:
    """The rating that is all but certain: mu - 3 sigma."""
    return self.mu - 3 * self.sigma

  @property
  def proof(self) -> float:
    """How much more own data gains, in standard errors of one evaluation."""
    return self.proof_sum / self.proof_weight if self.proof_weight else 0.0

  @property
  def certainty(self) -> float:
    """`proof` in its own standard errors, those of all evaluations."""
    if not self.proof_variance:
      return 0.0
    return self.proof_sum / self.proof_variance**0.5

  def factor(self, round_index: int) -> float:
    """What the penalties of a round leave."""
    factors = [p.factor for p in self.penalties if p.until >= round_index]
    return float(np.prod(factors))


@dataclasses.dataclass(frozen=True)
class State:
  """All standings after a round. Immutable; equal on equal validators."""

  round: int = -1  # the last one that was counted
  standings: Mapping[int, Standing] = dataclasses.field(default_factory=dict)
  # Whether enough uids had a score for it to be what is paid; stays so.
  proven: bool = False


def admit(
  state: State, round_index: int, identities: Mapping[int, Identity]
) -> State:
  """The state with exactly the uids registered now.

  A uid that another hotkey took, or the same one registered again, begins
  anew. Call it before the selections of a round.
  """
  standings = {}
  for uid, identity in sorted(identities.items()):
    old = state.standings.get(uid)
    if old is None or (old.hotkey, old.registered) != identity:
      old = Standing(*identity, round_index, evaluated=round_index - 1)
    standings[uid] = old
  return dataclasses.replace(state, standings=standings)


def to_json(state: State) -> str:
  """Exact: `from_json(to_json(state)) == state`, to the last bit."""
  return json.dumps(dataclasses.asdict(state), allow_nan=False)


def from_json(text: str) -> State:
  raw = json.loads(text)
  standings = {}
  for uid, fields in raw['standings'].items():
    penalties = tuple(Penalty(*p) for p in fields.pop('penalties'))
    signs = tuple(fields.pop('signs'))
    standings[int(uid)] = Standing(**fields, penalties=penalties, signs=signs)
  return State(raw['round'], standings, raw['proven'])
