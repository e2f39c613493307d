"""Penalties: factors on a score that last for some rounds.

Only faults that no honest node commits twice are punished. Being late, absent,
unreachable or out of step happens to honest nodes: it earns nothing while it
lasts, no more.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from covenant import config as config_lib
from covenant.gauntlet import checks as checks_lib

Finding = checks_lib.CheckFinding

FACTORS = {
  Finding.TWICE: 0.5,
  Finding.DIGEST: 0.5,
  Finding.REFUSED: 0.5,
  Finding.RECEIPT: 0.5,
  Finding.TINY: 0.5,
  Finding.HUGE: 0.5,
  Finding.COPY: 0.25,
  Finding.TWIN: 0.25,
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


def active(
  penalties: Iterable[Penalty], round_index: int
) -> tuple[Penalty, ...]:
  """Returns the penalties that last in a round."""
  return tuple(p for p in penalties if p.until >= round_index)


def factor(penalties: Iterable[Penalty], round_index: int) -> float:
  """Returns the product of the penalties that last in a round."""
  return float(np.prod([p.factor for p in active(penalties, round_index)]))


def add(
  penalties: Iterable[Penalty],
  reason: str,
  new_factor: float,
  round_index: int,
  config: config_lib.Gauntlet,
) -> tuple[Penalty, ...]:
  """Returns the active penalties and one more.

  The same offense again multiplies its factor and starts its rounds anew.
  """
  left = active(penalties, round_index)
  new_factor *= float(np.prod([p.factor for p in left if p.reason == reason]))
  new_factor = max(new_factor, _WORST_FACTOR)
  until = round_index + config.penalty_rounds
  others = (p for p in left if p.reason != reason)
  return (*others, Penalty(reason, new_factor, until))
