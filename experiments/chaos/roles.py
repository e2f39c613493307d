"""Scenarios of stakes and permits that change without the run's consent.

Permits go to stake, so hotkeys that run nothing hold them, and miners gain
them; validators fall silent and come back.
"""

from collections.abc import Callable, Collection, Mapping

from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario as scenario_lib

Kill = faults.Kill
Network = network_lib.Network
Phase = round_lib.Phase
Scenario = scenario_lib.Scenario
LEADER, SECOND, THIRD = scenario_lib.VALIDATORS
ROUND = scenario_lib.ROUND
ALL = list(range(len(scenario_lib.MINERS)))  # uids


def scenarios() -> list[Scenario]:
  """Returns what stake and permits do on a chain, without the run's consent.

  Silent permit holders count in round 0 only, which is empty if they have most
  of the stake. While most of the validators' stake is away, rounds are empty.
  """
  # Blocks in which a stake may matter: in training, at the close of the put
  # window, between the votes and the decision, and after it.
  jumps = (ROUND + 3, 2 * ROUND - 1, 2 * ROUND + 3, 3 * ROUND + 5)
  agreed = _agreed(7)
  return [
    *(
      Scenario(
        f'silent permit holders with the most stake: {count}',
        script={
          0: lambda network, count=count: network.register_silent(count, 5000.0)
        },
        rounds=5,
        check=_agreed(5, empty=(0,)),
      )
      for count in (1, 3, 10)
    ),
    Scenario(
      'silent permit holders with the most stake: 10, in mid-run',
      script={
        2 * ROUND + 9: lambda network: network.register_silent(10, 5000.0)
      },
      rounds=7,
      check=agreed,
    ),
    Scenario(
      'a miner gains a permit and the most stake in mid-run',
      script={2 * ROUND + 5: lambda network: network.give_permit('0', 5000.0)},
      rounds=7,
      check=agreed,
    ),
    Scenario(
      'a miner gains a permit, is killed and comes back',
      kills=(Kill('0', 3, Phase.COMMIT, 0, 1),),
      script={2 * ROUND + 5: lambda network: network.give_permit('0', 5000.0)},
      rounds=7,
      check=agreed,
    ),
    Scenario(
      'the leader goes silent for 5 rounds and comes back',
      kills=(Kill(LEADER, 1, Phase.COLLECT, 0, 5 * ROUND),),
      rounds=9,
      check=_agreed(9),
    ),
    Scenario(
      'all validators but the last go silent for 5 rounds',
      kills=tuple(
        Kill(name, 1, Phase.COLLECT, 0, 5 * ROUND) for name in (LEADER, SECOND)
      ),
      rounds=9,
      check=_agreed(9, empty=range(1, 6)),
    ),
    Scenario(
      'a stake jumps: that of the last validator',
      script={
        block: lambda network, stake=stake: network.set_stake(THIRD, stake)
        for block, stake in zip(jumps, (5e3, 1.0, 9e3, 2e3), strict=True)
      },
      rounds=7,
      check=agreed,
    ),
  ]


def _agreed(rounds: int, empty: Collection[int] = ()) -> Callable[..., str]:
  """Returns a check that all miners counted, and by whose votes.

  More than half of the stake must stand behind the manifest of every round; in
  the `empty` rounds nobody may count.
  """
  count = scenario_lib.counts(
    {r: [] if r in empty else ALL for r in range(rounds)}
  )

  def check(network: Network, counted: Mapping[int, list[int]]) -> str:
    for r in set(range(rounds)) - {*empty}:
      block = network.plan.last_decision_block(r)
      now = membership_lib.read(network.host.chain, block, network.plan)
      held = round_lib.decide(r, now.commitments, now.stakes(r), last=True)
      if held is None or not held.majority:
        return f'round {r}: expected a majority of {now.stakes(r)}, got {held}'
    return count(network, counted)

  return check
