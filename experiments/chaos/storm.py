"""Random faults of all kinds at once."""

from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario as scenario_lib

Fault = faults.Fault
Kind = faults.Kind
Network = network_lib.Network
Scenario = scenario_lib.Scenario
EVERYBODY, ROUND = scenario_lib.EVERYBODY, scenario_lib.ROUND


def storm(seed: int = 0, rounds: int = 8, rate: float = 0.03) -> Scenario:
  """Returns random faults of all kinds in all but the last two rounds."""
  blocks = range(ROUND, (rounds - 2) * ROUND)
  kinds = {
    Kind.UNREACHABLE: 0,
    Kind.LAG: 2,
    Kind.FORK: 0,
    Kind.ORPHAN: 0,
    Kind.ANSWER: 0,
    Kind.DOWN: 0,
    Kind.SLOW: 2,
    Kind.CORRUPT: 0,
    Kind.STALE: 0,
    Kind.MISSING: 0,
    Kind.FULL: 0,
    Kind.DISK: 0,
  }
  deaths = [
    (name, block, 1 + int(10 * faults.draw(seed, 'down', name, block)))
    for name in EVERYBODY
    for block in blocks
    if faults.draw(seed, 'kill', name, block) < rate / 2
  ]

  script = {}
  for block in blocks:
    if now := [(n, d) for n, b, d in deaths if b == block]:

      def action(network: Network, now: list[tuple[str, int]] = now) -> None:
        for name, down in now:
          network.kill(name, down)

      script[block] = action
  return Scenario(
    'everything at once, by chance',
    tuple(
      Fault(kind, blocks, amount=amount, rate=rate)
      for kind, amount in kinds.items()
    ),
    script=script,
    rounds=rounds,
  )
