"""Deaths of nodes in every phase: before it, within it and after it."""

from covenant.protocol import round as round_lib
from experiments.chaos import faults
from experiments.chaos import scenario as scenario_lib

Phase = round_lib.Phase
Kill = faults.Kill
LEADER, _, THIRD = scenario_lib.VALIDATORS

_MINER_POINTS = tuple(
  (phase, writes)
  for phase, points in {
    Phase.TRAIN: (0, -1),
    Phase.COMMIT: (0, 1, -1),
    Phase.UPLOAD: (0, 1, -1),
    Phase.DECIDE: (0, -1),
    Phase.APPLY: (0, -1),
    Phase.KEEP: (0, -1),
  }.items()
  for writes in points
)
_VALIDATOR_POINTS = tuple(
  (phase, writes)
  for phase, points in {
    Phase.COLLECT: (0, -1),
    Phase.VOTE: (0, 1, 2, -1),
    Phase.DECIDE: (0, -1),
    Phase.APPLY: (0, -1),
    Phase.SCORE: (0, 1, -1),
    Phase.KEEP: (0, 1, 3, 9, -1),
  }.items()
  for writes in points
)


HALF = len(_VALIDATOR_POINTS) // 2  # rounds of all deaths


def everywhere() -> tuple[Kill, ...]:
  """Returns deaths of a miner, the leader and a validator, in every phase.

  They die at the beginning of a phase, after each of its writes and at its end,
  at most twice per round.
  """
  kills = []
  for name, points in (
    ('0', _MINER_POINTS),
    (LEADER, _VALIDATOR_POINTS),
    (THIRD, _VALIDATOR_POINTS[::-1]),
  ):
    for i, (phase, writes) in enumerate(points):
      kills.append(Kill(name, 1 + i % HALF, phase, writes))
  return tuple(kills)
