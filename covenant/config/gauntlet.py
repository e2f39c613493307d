"""The section about evaluation and pay."""

import dataclasses

from covenant.config import schema


@dataclasses.dataclass(frozen=True)
class Gauntlet(schema.Section):
  """The evaluation of peers (covenant/gauntlet/, docs/gauntlet.md)."""

  contributors: int = schema.bounded(20, low=1, high=1023)  # peers per round
  probation: float = schema.fraction(0.25)  # share of these for newcomers
  # Peers evaluated per round; 0: none, and all valid peers are paid equally.
  evaluate: int = schema.bounded(20, low=0)
  # Sequences per evaluation, of a peer's own data and of random data each.
  sequences: int = schema.bounded(16, low=2)
  step_fraction: float = schema.positive(0.2)  # of the outer learning rate
  memory: int = schema.positive(20)  # evaluations in a moving average
  # Smallest similarity of two messages that makes the later one a copy.
  copy_similarity: float = schema.bounded(0.5, low=0.1, high=1.0)
  penalty_rounds: int = schema.positive(20)  # rounds after the last offence
  # Pay: gain ** power, or by rank (2:1, reserves halving).
  incentive: str = schema.bounded('gain', choices=('gain', 'ramp'))
  power: float = schema.bounded(2.0, low=1.0, high=4.0)
  burn: float = schema.fraction(0.0)  # share withheld and paid to burn_uid
  burn_uid: int = schema.bounded(0, low=0)
  weights_every: int = schema.positive(3)  # rounds between weights
