"""The fault matrix: all that is known to go wrong, as scenarios.

`docs/reliability.md` has the table that `experiments/reliability.py` prints.
"""

from collections.abc import Callable, Mapping
from typing import Any

from covenant.protocol import round as round_lib
from experiments.chaos import equivocators
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario as scenario_lib

Phase = round_lib.Phase
Kind = faults.Kind
Fault = faults.Fault
Kill = faults.Kill
Network = network_lib.Network
Scenario = scenario_lib.Scenario
MINERS, VALIDATORS = scenario_lib.MINERS, scenario_lib.VALIDATORS
EVERYBODY, ROUND = scenario_lib.EVERYBODY, scenario_lib.ROUND
LEADER, SECOND, THIRD = VALIDATORS
_OPENS, _DECIDES = 14, 24  # blocks after a round starts


def _in(first: int, last: int) -> range:
  """The blocks of some rounds, the last included."""
  return range(first * ROUND, (last + 1) * ROUND)


def _names(*names: str) -> frozenset[str]:
  return frozenset(names)


def _all_but(*names: str) -> frozenset[str]:
  return frozenset(EVERYBODY) - set(names)


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


_HALF = len(_VALIDATOR_POINTS) // 2


def kills_everywhere() -> tuple[Kill, ...]:
  """A miner, the leader and another validator, in each of their phases.

  At its beginning, after each of its writes and at its end. Everybody dies
  twice a round at most.
  """
  kills = []
  for name, points in (
    ('0', _MINER_POINTS),
    (LEADER, _VALIDATOR_POINTS),
    (THIRD, _VALIDATOR_POINTS[::-1]),
  ):
    for i, (phase, writes) in enumerate(points):
      kills.append(Kill(name, 1 + i % _HALF, phase, writes))
  return tuple(kills)


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
  """A check that each of some nodes said so in an event."""

  def check(network: Network, counted: Mapping[int, list[int]]) -> str:
    said = {seen.name for seen in network.errors(text)}
    silent = set(names) - said
    return f'no event of {sorted(silent)} says "{text}"' if silent else ''

  return check


def _counts(expected: Mapping[int, list[int]]) -> Callable[..., str]:
  """A check of who counted in some rounds."""

  def check(network: Network, counted: Mapping[int, list[int]]) -> str:
    for r, uids in expected.items():
      if counted[r] != uids:
        return f'round {r}: expected the uids {uids}, not {counted[r]}'
    return ''

  return check


def _store(kind: Kind, name: str, blocks: range, **fault: Any) -> Scenario:
  return Scenario(name, (Fault(kind, blocks, **fault),))


def scenarios() -> list[Scenario]:
  """The matrix."""
  all_uids, leaders = list(range(6)), _names(LEADER)
  two = _names('0', '1')
  lies = Kind.CORRUPT, Kind.STALE, Kind.MISSING
  window = range(2 * ROUND + _OPENS, 2 * ROUND + _DECIDES + 4)
  return [
    Scenario(
      'kill -9 in every phase',
      kills=kills_everywhere(),
      rounds=_HALF + 3,
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
      check=_counts({1: all_uids}),
    ),
    Scenario(
      'everybody down for 4 rounds, from the vote on',
      kills=tuple(
        Kill(name, 2, Phase.DECIDE, 0, 4 * ROUND) for name in EVERYBODY
      ),
      rounds=9,
      check=_counts({2: all_uids}),
    ),
    Scenario(
      'validators down for 3 rounds, from the vote on',
      kills=tuple(
        Kill(name, 2, Phase.DECIDE, 0, 3 * ROUND) for name in VALIDATORS
      ),
      rounds=8,
      check=_counts({2: all_uids}),
    ),
    _store(Kind.DOWN, 'store down, in and after the put window', window),
    _store(Kind.DOWN, 'store down, for two rounds', _in(1, 2)),
    _store(Kind.DOWN, "leader's bucket down", _in(1, 2), owners=leaders),
    _store(Kind.SLOW, 'store slow: nothing within 3 blocks', window, amount=3),
    _store(
      Kind.SLOW, 'every second answer too slow', _in(1, 2), amount=1, rate=0.5
    ),
    *(
      _store(kind, f'{kind.value}: 2 miners lie', _in(1, 2), owners=two)
      for kind in lies
    ),
    *(
      _store(kind, f'{kind.value}: leader lies', _in(1, 2), owners=leaders)
      for kind in lies
    ),
    *(
      Scenario(
        f'{kind.value}: 2 miners lie to the leader',
        (Fault(kind, _in(1, 2), leaders, two),),
      )
      for kind in lies
    ),
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
      names=leaders,
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
      names=leaders,
    )._replace(rounds=6),
    Scenario(
      'leader dead for 2 rounds',
      kills=(Kill(LEADER, 1, Phase.COLLECT, 0, 2 * ROUND),),
      check=_counts({1: all_uids, 2: all_uids}),
    ),
    Scenario(
      'leader dead for ever',
      kills=(Kill(LEADER, 1, Phase.COLLECT, 0, network_lib.FOR_EVER),),
      check=_counts({r: all_uids for r in range(1, 5)}),
    ),
    Scenario(
      'leader dead for ever, then a miner joins',
      kills=(Kill(LEADER, 1, Phase.KEEP, 0, network_lib.FOR_EVER),),
      script={3 * ROUND + 5: lambda network: network.join('10')},
      rounds=6,
      check=_counts({5: [*all_uids, 9]}),
    ),
    Scenario(
      'two leaders: equal stakes, split votes',
      (Fault(Kind.MISSING, _in(1, 3), _names(SECOND), leaders),),
      kills=(Kill(THIRD, 1, Phase.COLLECT, 0, 2 * ROUND),),
      script={3: _equal_stakes},
      check=_counts({1: all_uids, 2: all_uids}),
    ),
    *(
      Scenario(
        f'leader equivocates: {what}',
        dishonest={LEADER: wrap},
        check=_counts({r: all_uids for r in range(5)}),
      )
      for what, wrap in {
        'two manifests': equivocators.equivocator,
        'commits one, serves the other': equivocators.liar,
        'withholds the bytes': equivocators.withholder,
      }.items()
    ),
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
      check=_counts({2: all_uids[1:], 9: all_uids}),
    ),
    Scenario(
      'a third of the miners leaves, as many join',
      script={2 * ROUND + 5: _churn},
      rounds=6,
      check=_counts({1: all_uids, 5: all_uids}),
    ),
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
        Fault(Kind.FULL, _in(1, 2), leaders),
        Fault(Kind.DISK, _in(1, 2), leaders),
      ),
      check=_says('no space left', LEADER),
    ),
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
        check=_counts({r: all_uids for r in range(6)}),
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
    )._replace(check=_counts({1: all_uids, 2: [], 3: all_uids})),
    storm(),
  ]


def storm(seed: int = 0, rounds: int = 8, rate: float = 0.03) -> Scenario:
  """Everything at once, by chance, all but in the last two rounds."""
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
  kills = [
    (name, block, 1 + int(10 * faults.draw(seed, 'down', name, block)))
    for name in EVERYBODY
    for block in blocks
    if faults.draw(seed, 'kill', name, block) < rate / 2
  ]

  script = {}
  for block in blocks:
    if now := [(n, d) for n, b, d in kills if b == block]:

      def action(network: Network, now: Any = now) -> None:
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
