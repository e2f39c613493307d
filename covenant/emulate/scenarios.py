"""The fault matrix: what goes wrong, and what must hold all the same.

After each scenario every live honest node is at one history root with one
fingerprint; a replay from what was put into buckets leads there too, so every
payload that an agreed manifest lists was applied by everybody; payloads count
again at the end; and whatever was to be injected was.

`docs/reliability.md` has the table that `experiments/reliability.py` prints.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from covenant import config as config_lib
from covenant.data import dataset
from covenant.emulate import faults
from covenant.emulate import host as host_lib
from covenant.emulate import network as network_lib
from covenant.node import objects as objects_lib
from covenant.node import round as round_lib
from covenant.node import validator as validator_lib
from covenant.wire import manifest as manifest_lib

Do = round_lib.Do
Kind = faults.Kind
Fault = faults.Fault
Kill = faults.Kill
Network = network_lib.Network

MINERS = ('0', '1', '2', '3', '4', '5')
LEADER, SECOND, THIRD = '6', '7', '8'  # by stake; no majority without two
VALIDATORS = (LEADER, SECOND, THIRD)
EVERYBODY = MINERS + VALIDATORS
ROUND = 20  # blocks
OPENS, DECIDES = 14, 24  # blocks after a round starts


class Scenario(NamedTuple):
  """What goes wrong in a run of some rounds, and what is expected of it."""

  name: str
  plan: tuple[Fault, ...] = ()
  kills: tuple[Kill, ...] = ()
  script: Mapping[int, Callable[[Network], None]] = {}
  dishonest: Mapping[str, type[validator_lib.Validator]] = {}
  rounds: int = 5
  # Every node ends with the bits that it has when nothing goes wrong.
  undisturbed: bool = False
  # Returns what is wrong, or '': of the network and who counted in each round.
  check: Callable[[Network, Mapping[int, list[int]]], str] = (
    lambda network, counted: ''
  )


class Result(NamedTuple):
  """What became of a scenario."""

  name: str
  injected: Mapping[str, int]  # by what
  rounds: int
  payloads: int  # that counted, of miners x rounds
  equal_roots: bool
  equal_parameters: bool
  undisturbed: bool  # every bit of every node is what it is without faults
  wrong: str  # what does not hold; empty: all does

  @property
  def passed(self) -> bool:
    return not self.wrong


def get_config(base: config_lib.Config) -> config_lib.Config:
  """The network of the scenarios, from configs/tiny.py."""
  return dataclasses.replace(
    base,
    rounds=100,
    miners=len(MINERS),
    validators=len(VALIDATORS),
    phases=config_lib.Phases(
      round_blocks=ROUND, put_blocks=6, select_blocks=4, takeover_blocks=3
    ),
    checkpoint=config_lib.Checkpoint(every=1, keep=2, publish=4),
    gauntlet=dataclasses.replace(base.gauntlet, weights_every=1),
  )


class Suite:
  """Runs scenarios one after another, compiled once."""

  def __init__(self, base: config_lib.Config):
    self.config = get_config(base)
    self.host = host_lib.Host(self.config, dataset.load(self.config))
    self._bits: dict[int, dict[str, str]] = {}  # by rounds and name

  def network(self, scenario: Scenario, seed: int = 0) -> Network:
    world = faults.Faults(scenario.plan, scenario.kills, seed)
    return Network(
      self.config,
      self.host,
      world,
      dict(scenario.script),
      dict(scenario.dishonest),
    )

  def run(self, scenario: Scenario, seed: int = 0) -> Result:
    expected = self.undisturbed(scenario.rounds)
    network = self.network(scenario, seed)
    network.run(scenario.rounds)
    nodes = network.live.values()
    same = {n: network_lib.digest(node) for n, node in network.nodes.items()}
    wrong, counted = '', {}
    try:
      counted = network_lib.audit(network)
      wrong = _wrong(scenario, network, counted)
      if not wrong and scenario.undisturbed and same != expected:
        other = [name for name in expected if same.get(name) != expected[name]]
        wrong = f'other bits than without faults: {other}'
    except AssertionError as e:
      wrong = str(e)
    return Result(
      scenario.name,
      {k.value: n for k in Kind if (n := network.faults.count[k])},
      scenario.rounds,
      sum(map(len, counted.values())),
      len({(node.state.round, node.root) for node in nodes}) == 1,
      len({node.fingerprint() for node in nodes}) == 1,
      same == expected,
      wrong,
    )

  def undisturbed(self, rounds: int) -> dict[str, str]:
    """The digest of every node after so many rounds without a fault."""
    if rounds not in self._bits:
      network, most = Network(self.config, self.host), max(rounds, 5)
      for r in range(1, most + 1):
        network.run(r)
        self._bits[r] = {
          name: network_lib.digest(node) for name, node in network.nodes.items()
        }
    return self._bits[rounds]


def _wrong(
  scenario: Scenario, network: Network, counted: Mapping[int, list[int]]
) -> str:
  world = network.faults
  if world.kills:
    return f'who was to be killed was not: {world.kills}'
  for fault in scenario.plan:
    if not world.count[fault.kind]:
      return f'never injected: {fault}'
  if not sum(world.count.values()) and not scenario.dishonest:
    return 'nothing was injected'
  if missing := set(EVERYBODY) & set(network.nodes) - set(network.live):
    missing -= set(scenario.dishonest)
    if missing - _gone(scenario):
      return f'still down: {missing}'
  for r in (scenario.rounds - 2, scenario.rounds - 1):
    if not counted[r]:
      return f'nobody counted in round {r}'
  return scenario.check(network, counted)


def _gone(scenario: Scenario) -> set[str]:
  return {k.name for k in scenario.kills if k.down >= network_lib.FOR_EVER}


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
    Do.TRAIN: (0, -1),
    Do.PUBLISH: (0, 1, 2, -1),
    Do.DECIDE: (0, -1),
    Do.APPLY: (0, -1),
    Do.KEEP: (0, -1),
  }.items()
  for writes in points
)
_VALIDATOR_POINTS = tuple(
  (phase, writes)
  for phase, points in {
    Do.COLLECT: (0, -1),
    Do.VOTE: (0, 1, 2, -1),
    Do.DECIDE: (0, -1),
    Do.APPLY: (0, -1),
    Do.SCORE: (0, 1, -1),
    Do.KEEP: (0, 1, 3, 9, -1),
  }.items()
  for writes in points
)


def kills_everywhere() -> tuple[Kill, ...]:
  """A miner, the leader and another validator, once in each of their phases.

  At its beginning, after each of its writes and at its end, one a round.
  """
  kills = []
  for name, points in (
    ('0', _MINER_POINTS),
    (LEADER, _VALIDATOR_POINTS),
    (THIRD, _VALIDATOR_POINTS[::-1]),
  ):
    for r, (phase, writes) in enumerate(points, start=1):
      kills.append(Kill(name, r, phase, writes))
  return tuple(kills)


class _Equivocator(validator_lib.Validator):
  """Signs two manifests, and commits to one of them."""

  def _two(self, r: int, data: bytes) -> tuple[bytes, bytes]:
    manifest = manifest_lib.decode(data, self.chain.verify)
    other = manifest._replace(entries=manifest.entries[1:])
    return data, manifest_lib.encode(other, self.chain.sign)

  def _stand_for(self, r: int, data: bytes, head: int) -> None:
    one, two = self._two(r, data)
    self.chain.faults.struck(Kind.TWO)
    self._publish(r, one, two)
    self.commit(r, objects_lib.digest(one), head)

  def _publish(self, r: int, one: bytes, two: bytes) -> None:
    for data in one, two:
      key = self.objects.key('proposals', r, objects_lib.digest(data))
      self.objects.keep(key, data)


class _Liar(_Equivocator):
  """Commits to one manifest, and serves the other in its place."""

  def _publish(self, r: int, one: bytes, two: bytes) -> None:
    self.objects.keep(
      self.objects.key('proposals', r, objects_lib.digest(one)), two
    )


class _Withholder(_Equivocator):
  """Commits to a manifest that nobody ever sees."""

  def _publish(self, r: int, one: bytes, two: bytes) -> None:
    pass


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


def _store(
  kind: Kind, name: str, blocks: range, **fault: Any
) -> Scenario:
  return Scenario(name, (Fault(kind, blocks, **fault),))


def scenarios() -> list[Scenario]:
  """The matrix."""
  all_uids, leaders = list(range(6)), _names(LEADER)
  two = _names('0', '1')
  lies = Kind.CORRUPT, Kind.STALE, Kind.MISSING
  window = range(2 * ROUND + OPENS, 2 * ROUND + DECIDES + 4)
  return [
    Scenario(
      'kill -9 in every phase',
      kills=kills_everywhere(),
      rounds=len(_VALIDATOR_POINTS) + 2,
      undisturbed=True,
    ),
    Scenario(
      'kill -9 while catching up',
      kills=tuple(
        Kill(name, r, phase, writes, down)
        for name in ('0', LEADER, THIRD)
        for r, phase, writes, down in (
          (1, Do.DECIDE, 0, 3 * ROUND),
          (1, Do.CATCH_UP, 0, 1),
          (1, Do.CATCH_UP, -1, 1),
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
        Kill(name, 2, Do.DECIDE, 0, 4 * ROUND) for name in EVERYBODY
      ),
      rounds=9,
      check=_counts({2: all_uids}),
    ),
    Scenario(
      'validators down for 3 rounds, from the vote on',
      kills=tuple(
        Kill(name, 2, Do.DECIDE, 0, 3 * ROUND) for name in VALIDATORS
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
      Kind.LAG, 'chain 3 blocks late: a miner', _in(1, 2), names=_names('0'),
      amount=3,
    ),
    _store(
      Kind.LAG, 'chain 3 blocks late: the leader', _in(1, 2), names=leaders,
      amount=3,
    ),
    _store(
      Kind.LAG, 'chain 9 blocks late: a third', _in(1, 2),
      names=_names('0', '1', THIRD), amount=9,
    ),
    Scenario(
      'newest block taken back, every block',
      (Fault(Kind.FORK, _in(1, 3)),),
      undisturbed=True,
    ),
    _store(
      Kind.ORPHAN, 'commitments taken back: a miner, the leader', _in(2, 2),
      names=_names('0', LEADER),
    ),
    Scenario(
      'commitments without an answer: everybody',
      (Fault(Kind.ANSWER, _in(1, 3)),),
      undisturbed=True,
    ),
    _store(
      Kind.UNREACHABLE, 'chain unreachable for 2 minutes, in the put window',
      range(2 * ROUND + OPENS - 4, 2 * ROUND + OPENS + 6),
    ),
    _store(
      Kind.UNREACHABLE, 'chain unreachable for 2 minutes, at the vote',
      range(3 * ROUND, 3 * ROUND + 10),
    ),
    _store(
      Kind.UNREACHABLE, 'chain unreachable for the leader, 2 rounds', _in(2, 3),
      names=leaders,
    )._replace(rounds=6),
    Scenario(
      'leader dead for 2 rounds',
      kills=(Kill(LEADER, 1, Do.COLLECT, 0, 2 * ROUND),),
      check=_counts({1: all_uids, 2: all_uids}),
    ),
    Scenario(
      'leader dead for ever',
      kills=(Kill(LEADER, 1, Do.COLLECT, 0, network_lib.FOR_EVER),),
      check=_counts({r: all_uids for r in range(1, 5)}),
    ),
    Scenario(
      'leader dead for ever, then a miner joins',
      kills=(Kill(LEADER, 1, Do.KEEP, 0, network_lib.FOR_EVER),),
      script={3 * ROUND + 5: lambda network: network.join('10')},
      rounds=6,
      check=_counts({5: [*all_uids, 9]}),
    ),
    Scenario(
      'two leaders: equal stakes, split votes',
      (Fault(Kind.MISSING, _in(1, 3), _names(SECOND), leaders),),
      kills=(Kill(THIRD, 1, Do.COLLECT, 0, 2 * ROUND),),
      script={3: _equal_stakes},
      check=_counts({1: all_uids, 2: all_uids}),
    ),
    *(
      Scenario(
        f'leader equivocates: {what}',
        dishonest={LEADER: make},
        check=_counts({r: all_uids for r in range(5)}),
      )
      for what, make in {
        'two manifests': _Equivocator,
        'commits one, serves the other': _Liar,
        'withholds the bytes': _Withholder,
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
      (Fault(Kind.LAG, _in(1, 1), _names('5'), amount=1),),
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
        check=_says('Lost: ', name),
      )
      for who, name, block in (
        ('a miner', '0', 2 * ROUND + 5),
        ('a validator', THIRD, 2 * ROUND + 5),
        ('the leader', LEADER, 2 * ROUND + 5),
      )
    ),
    _store(
      Kind.FULL, 'no valid payload in a round', _in(2, 2),
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
