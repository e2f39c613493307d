"""The fault matrix: all known faults, as scenarios.

`docs/reliability.md` has the table that `experiments/reliability.py` prints.
"""

from collections.abc import Callable, Mapping
from typing import Any

from covenant.protocol import round as round_lib
from experiments.chaos import attacks
from experiments.chaos import equivocators
from experiments.chaos import faults
from experiments.chaos import forged_checkpoints
from experiments.chaos import kills
from experiments.chaos import moves
from experiments.chaos import network as network_lib
from experiments.chaos import roles
from experiments.chaos import scenario as scenario_lib
from experiments.chaos import storm

Phase = round_lib.Phase
Kind = faults.Kind
Fault = faults.Fault
Kill = faults.Kill
Network = network_lib.Network
Scenario = scenario_lib.Scenario
MINERS, VALIDATORS = scenario_lib.MINERS, scenario_lib.VALIDATORS
EVERYBODY, ROUND = scenario_lib.EVERYBODY, scenario_lib.ROUND
counts = scenario_lib.counts
LEADER, SECOND, THIRD = VALIDATORS
_OPENS, _DECIDES = 14, 24  # blocks after a round starts


def _in(first: int, last: int) -> range:
  """Returns the blocks of some rounds, the last included."""
  return range(first * ROUND, (last + 1) * ROUND)


def _names(*names: str) -> frozenset[str]:
  return frozenset(names)


def _down(names: tuple[str, ...], block: int, blocks: int) -> dict[int, Any]:
  def action(network: Network) -> None:
    for name in names:
      network.kill(name, blocks)

  return {block: action}


def _equal_stakes(network: Network) -> None:
  for name in LEADER, SECOND:
    network.host.chain.set_stake(network.nodes[name].chain.hotkey, 1000.0)


def _churn(network: Network) -> None:
  for name in '0', '1':
    network.leave(name)
  for name in '10', '11':
    network.join(name)


def _says(text: str, *names: str) -> Callable[..., str]:
  """Returns a check that each of some nodes had an event with this error."""

  def check(network: Network, counted: Mapping[int, list[int]]) -> str:
    said = {seen.name for seen in network.errors(text)}
    silent = set(names) - said
    return f'no event of {sorted(silent)} says "{text}"' if silent else ''

  return check


def _store(kind: Kind, name: str, blocks: range, **fault: Any) -> Scenario:
  return Scenario(name, (Fault(kind, blocks, **fault),))


_ALL = list(range(6))  # uids
_LEADERS, _TWO = _names(LEADER), _names('0', '1')
_LIES = Kind.CORRUPT, Kind.STALE, Kind.MISSING
_WINDOW = range(2 * ROUND + _OPENS, 2 * ROUND + _DECIDES + 4)


def _deaths() -> list[Scenario]:
  """Returns the scenarios in which processes are killed."""
  return [
    Scenario(
      'kill -9 in every phase',
      kills=kills.everywhere(),
      rounds=kills.HALF + 3,
      undisturbed=True,
    ),
    Scenario(
      'kill -9 while catching up',
      kills=tuple(
        Kill(name, r, phase, writes, down)
        for name in ('0', LEADER, THIRD)
        for r, phase, writes, down in (
          (1, Phase.DECIDE, 0, 3 * ROUND),
          (1, Phase.CATCH_UP, 0, 1),
          (1, Phase.CATCH_UP, -1, 1),
        )
      ),
      rounds=7,
    ),
    Scenario(
      'everybody killed at once, back at once',
      script=_down(EVERYBODY, 2 * ROUND + 3, 1),
      undisturbed=True,
    ),
    Scenario(
      'everybody down for 4 rounds, from training on',
      script=_down(EVERYBODY, 2 * ROUND + 3, 4 * ROUND),
      rounds=9,
      check=counts({0: _ALL, 1: []}),  # the leader alone had voted
    ),
    Scenario(
      'everybody down for 4 rounds, from the vote on',
      kills=tuple(
        Kill(name, 2, Phase.DECIDE, 0, 4 * ROUND) for name in EVERYBODY
      ),
      rounds=9,
      check=counts({2: _ALL}),
    ),
    Scenario(
      'validators down for 3 rounds, from the vote on',
      kills=tuple(
        Kill(name, 2, Phase.DECIDE, 0, 3 * ROUND) for name in VALIDATORS
      ),
      rounds=8,
      check=counts({2: _ALL}),
    ),
  ]


def _stores() -> list[Scenario]:
  """Returns the faults of buckets."""
  return [
    _store(Kind.DOWN, 'store down, in and after the put window', _WINDOW),
    _store(Kind.DOWN, 'store down, for two rounds', _in(1, 2)),
    _store(Kind.DOWN, "leader's bucket down", _in(1, 2), owners=_LEADERS),
    _store(Kind.SLOW, 'store slow: nothing within 3 blocks', _WINDOW, amount=3),
    _store(
      Kind.SLOW, 'every second answer too slow', _in(1, 2), amount=1, rate=0.5
    ),
    *(
      _store(kind, f'{kind.value}: 2 miners lie', _in(1, 2), owners=_TWO)
      for kind in _LIES
    ),
    *(
      _store(kind, f'{kind.value}: leader lies', _in(1, 2), owners=_LEADERS)
      for kind in _LIES
    ),
    *(
      Scenario(
        f'{kind.value}: 2 miners lie to the leader',
        (Fault(kind, _in(1, 2), _LEADERS, _TWO),),
      )
      for kind in _LIES
    ),
  ]


def _chains() -> list[Scenario]:
  """Returns the faults of the chain."""
  return [
    _store(
      Kind.LAG,
      'chain 3 blocks late: a miner',
      _in(1, 2),
      names=_names('0'),
      amount=3,
    ),
    _store(
      Kind.LAG,
      'chain 3 blocks late: the leader',
      _in(1, 2),
      names=_LEADERS,
      amount=3,
    ),
    _store(
      Kind.LAG,
      'chain 9 blocks late: a third',
      _in(1, 2),
      names=_names('0', '1', THIRD),
      amount=9,
    ),
    Scenario(
      'newest block taken back, every block',
      (Fault(Kind.FORK, _in(1, 3)),),
      undisturbed=True,
    ),
    _store(
      Kind.ORPHAN,
      'commitments taken back: a miner, the leader',
      _in(2, 2),
      names=_names('0', LEADER),
    ),
    Scenario(
      'commitments without an answer: everybody',
      (Fault(Kind.ANSWER, _in(1, 3)),),
      undisturbed=True,
    ),
    _store(
      Kind.UNREACHABLE,
      'chain unreachable for 2 minutes, in the put window',
      range(2 * ROUND + _OPENS - 4, 2 * ROUND + _OPENS + 6),
    ),
    _store(
      Kind.UNREACHABLE,
      'chain unreachable for 2 minutes, at the vote',
      range(3 * ROUND, 3 * ROUND + 10),
    ),
    _store(
      Kind.UNREACHABLE,
      'chain unreachable for the leader, 2 rounds',
      _in(2, 3),
      names=_LEADERS,
    )._replace(rounds=6),
  ]


def _leaders() -> list[Scenario]:
  """Returns the faults of the leader."""
  return [
    Scenario(
      'leader dead for 2 rounds',
      kills=(Kill(LEADER, 1, Phase.COLLECT, 0, 2 * ROUND),),
      check=counts({1: _ALL, 2: _ALL}),
    ),
    Scenario(
      'leader dead for ever',
      kills=(Kill(LEADER, 1, Phase.COLLECT, 0, network_lib.FOR_EVER),),
      check=counts({r: _ALL for r in range(1, 5)}),
    ),
    Scenario(
      'leader dead for ever, then a miner joins',
      kills=(Kill(LEADER, 1, Phase.KEEP, 0, network_lib.FOR_EVER),),
      script={3 * ROUND + 5: lambda network: network.join('10')},
      rounds=6,
      check=counts({5: [*_ALL, 9]}),
    ),
    Scenario(
      'two leaders: equal stakes, split votes',
      (Fault(Kind.MISSING, _in(1, 3), _names(SECOND), _LEADERS),),
      kills=(Kill(THIRD, 1, Phase.COLLECT, 0, 2 * ROUND),),
      script={3: _equal_stakes},
      check=counts({1: _ALL, 2: _ALL}),
    ),
    *(
      Scenario(
        f'leader equivocates: {what}',
        dishonest={LEADER: wrap},
        check=counts({r: _ALL for r in range(5)}),
      )
      for what, wrap in {
        'two manifests': equivocators.equivocator,
        'commits one, serves the other': equivocators.liar,
        'withholds the bytes': equivocators.withholder,
      }.items()
    ),
  ]


def _is_back(network: Network, counted: Mapping[int, list[int]]) -> str:
  """Checks that uid 0 misses round 2 and counts at the end.

  Others may miss a round by their scores.
  """
  if counted[2] != _ALL[1:] or 0 not in counted[9]:
    return f'counted in rounds 2 and 9: {counted[2]} and {counted[9]}'
  return ''


def _members() -> list[Scenario]:
  """Returns wrong clocks, a slow miner and churn."""
  return [
    Scenario(
      'clocks 30 s off, half of them late',
      tuple(
        Fault(Kind.SKEW, _in(0, 5), _names(*EVERYBODY[i::2]), amount=seconds)
        for i, seconds in enumerate((30.0, -30.0))
      ),
      undisturbed=True,
    ),
    Scenario(
      'a miner ten times slower',
      (Fault(Kind.BUSY, _in(1, 3), _names('0'), amount=6 * ROUND),),
      rounds=10,
      check=_is_back,
    ),
    Scenario(
      'a third of the miners leaves, as many join',
      script={2 * ROUND + 5: _churn},
      rounds=6,
      check=counts({1: _ALL, 5: _ALL}),
    ),
  ]


def _disks() -> list[Scenario]:
  """Returns the scenarios with full disks."""
  return [
    _store(
      Kind.FULL, 'disk full: no bucket takes anything', _in(2, 2)
    )._replace(rounds=6, check=_says('no space left', *EVERYBODY)),
    Scenario(
      'disk full: nothing can be saved, then everybody killed',
      (Fault(Kind.DISK, _in(1, 3)),),
      script=_down(EVERYBODY, 3 * ROUND + 10, 1),
      rounds=6,
    ),
    Scenario(
      'disk full at the leader, bucket and saves',
      (
        Fault(Kind.FULL, _in(1, 2), _LEADERS),
        Fault(Kind.DISK, _in(1, 2), _LEADERS),
      ),
      check=_says('no space left', LEADER),
    ),
  ]


def _states() -> list[Scenario]:
  """Returns partitions, flipped bits and a round without payloads."""
  return [
    *(
      Scenario(
        f'network partition: {who}, 2 rounds',
        tuple(
          Fault(kind, range(2 * ROUND + 2, last), _names(name))
          for kind, last in (  # the buckets are back later
            (Kind.UNREACHABLE, 4 * ROUND + 2),
            (Kind.DOWN, 4 * ROUND + 6),
          )
        ),
        rounds=6,
        check=counts({r: _ALL for r in range(6)}),
      )
      for who, name in {'a validator': THIRD, 'the leader': LEADER}.items()
    ),
    *(
      Scenario(
        f'a bit of the parameters flips: {who}',
        (Fault(Kind.FLIP, range(block, block + 1), _names(name)),),
        rounds=6,
        check=_says('OutOfSyncError: ', name),
      )
      for who, name, block in (
        ('a miner', '0', 2 * ROUND + 5),
        ('a validator', THIRD, 2 * ROUND + 5),
        ('the leader', LEADER, 2 * ROUND + 5),
      )
    ),
    _store(
      Kind.FULL,
      'no valid payload in a round',
      range(2 * ROUND, 3 * ROUND + 2),  # until they are collected
      names=_names(*MINERS),
    )._replace(check=counts({1: _ALL, 2: [], 3: _ALL})),
  ]


def scenarios() -> list[Scenario]:
  """Returns the matrix."""
  return [
    *_deaths(),
    *_stores(),
    *_chains(),
    *_leaders(),
    *roles.scenarios(),
    *attacks.scenarios(),
    *moves.scenarios(),
    *_members(),
    *_disks(),
    *_states(),
    *forged_checkpoints.scenarios(),
    storm.storm(),
  ]
