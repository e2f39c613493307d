"""The work that a uid is paid for: its declared work, gain and proof."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from covenant.gauntlet import ratings as ratings_lib

# Fractions of what is usual from which on the average gain and the proof are
# paid in full: most honest ones must be there in spite of the noise.
FULL_GAIN, FULL_PROOF = 0.85, 0.8
NO_PROOF = 0.5  # fraction of the usual proof up to which it counts as none
AUTHOR = 0.9  # fraction of the usual proof that an author is sure to have
SIGNIFICANT = 2.0  # standard errors
# Pay falls by more than the work that is left out, since what is measured of
# the latter is less where the rest gains more evenly than usual.
STRICTNESS = 1.5


def paid_work(standing: ratings_lib.Standing) -> float:
  """Returns the work that a uid is paid for if it is proven.

  That is the declared work of the rounds in which it sent a message, reduced if
  its gain is less than usual. More than usual is not worth more: a message that
  gains more takes it from what the others' next messages would gain.
  """
  quality = min(max(standing.gain / FULL_GAIN, 0.0), 1.0)
  return standing.work * standing.presence * quality


class Usual(NamedTuple):
  """Medians by work, over the uids whose proof is certain; zeros if none is."""

  proof: float = 0.0
  units: float = 0.0  # `Standing.trained_units`
  parts: float = 0.0  # `Standing.trained_parts`


def usual(standings: Mapping[int, ratings_lib.Standing]) -> Usual:
  """Returns what is usual for the proof of the standings."""
  certain = [s for s in standings.values() if s.certainty > SIGNIFICANT]
  works = [s.work * s.presence for s in certain]
  columns = zip(
    *((s.proof, s.trained_units, s.trained_parts) for s in certain),
    strict=True,
  )
  return Usual(*(median(zip(of, works, strict=True)) for of in columns))


def proof_share(standing: ratings_lib.Standing, usual: Usual) -> float:
  """Returns the proven fraction of the usual work on own data, 0 to 1.

  The fraction is proportional, not a threshold: a worker that trains once on
  the data of n uids and sends the result under all of them proves 1/n with
  each, and next to no proof counts as none. An uncertain proof fades in from 2
  to 3 standard errors: a copier's certainty is a standard normal draw that
  changes slowly.
  """
  if usual.proof <= 0:
    return 0.0
  certain = min(max(standing.certainty - SIGNIFICANT, 0.0), 1.0)
  share = (standing.proof / usual.proof - NO_PROOF) / (FULL_PROOF - NO_PROOF)
  paid = trained(standing, usual) ** STRICTNESS
  return certain * min(max(share, 0.0), 1.0) * paid


def trained(standing: ratings_lib.Standing, usual: Usual) -> float:
  """Returns the fraction of its data that a uid trained on, 0 to 1.

  Training harder on a part of the data proves more, but not that there is more
  of it. It is the product of two fractions: of units of work, as they were
  drawn, and of stretches of positions, over all evaluations.
  """
  fraction = 1.0
  for own, other in (
    (standing.trained_units, usual.units),
    (standing.trained_parts, usual.parts),
  ):
    if other > 0:
      fraction *= min(own / other, 1.0)
  return fraction


def lacks_proof(standing: ratings_lib.Standing, usual: Usual) -> bool:
  """Returns whether its proof is below that of an author of all its message.

  An honest miner whose training another repeats has the usual proof. One that
  copies has none, and one that sends what it agreed upon with others has less.
  """
  if not standing.proof_weight:
    return False
  error = standing.proof_variance**0.5 / standing.proof_weight
  return standing.proof + error < AUTHOR * usual.proof


def median(values: Iterable[tuple[float, float]]) -> float:
  """Returns the (lower) median of (value, weight); 0 if there are none.

  By work, not by uids: a worker that splits its work over many is not many.
  """
  ordered = sorted(values)
  half = sum(weight for _, weight in ordered) / 2
  passed = 0.0
  for value, weight in ordered:
    passed += weight
    if passed >= half:
      return value
  return 0.0
