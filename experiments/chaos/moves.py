"""Attacks by uids that change hands and by locations that never stay."""

from collections.abc import Callable, Mapping
from typing import Any

from covenant.gauntlet import findings
from covenant.node import connect
from covenant.store import location as location_lib
from covenant.wire import commitment as commitment_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario as scenario_lib

Kind = faults.Kind
Network = network_lib.Network
Scenario = scenario_lib.Scenario
LEADER, ROUND = scenario_lib.VALIDATORS[0], scenario_lib.ROUND
ROUNDS = 7
_OPENS, _COLLECTED = 14, 25  # blocks after a round starts
_ALL = list(range(len(scenario_lib.MINERS)))
_SOLD = len(scenario_lib.EVERYBODY)  # the uid of the first stranger
_HANDS, _MOVERS = 3, 3


def _register(network: Network, name: str) -> int:
  network.faults.struck(Kind.STRANGER)
  key = connect.local_key(network.config.seed, name)
  return network.host.chain.register(key.address, 0.0, False)


def _deregister(network: Network, name: str) -> None:
  key = connect.local_key(network.config.seed, name)
  network.host.chain.deregister(key.address)


def _commit(network: Network, name: str, r: int, place: str) -> None:
  """Commits to a payload that nobody has, in a bucket of this name."""
  location = location_lib.Location.parse(f'memory://{place}').to_bytes()
  new = commitment_lib.Commitment(
    commitment_lib.Role.MINER,
    location,
    r,
    commitment_lib.digest(place.encode()),
  )
  key = connect.local_key(network.config.seed, name)
  network.host.chain.seen_by(key).commit(commitment_lib.encode(new))


def _sell(r: int, hand: int) -> Callable[[Network], None]:
  """Returns an action: a uid gets another hotkey, which commits once."""

  def action(network: Network) -> None:
    if hand:
      _deregister(network, f'{r}-{hand - 1}')
    assert _register(network, f'{r}-{hand}') == _SOLD
    _commit(network, f'{r}-{hand}', r, f'sold-{r}-{hand}')

  return action


def _look(r: int) -> Callable[[Network], None]:
  """Returns an action: notes what was found of the uid, and frees it."""

  def action(network: Network) -> None:
    role: Any = network.nodes[LEADER].role
    role.notes[r] = role.collected.report.checks[_SOLD].finding
    _deregister(network, f'{r}-{_HANDS - 1}')

  return action


def _is_absent(network: Network, counted: Mapping[int, list[int]]) -> str:
  """Checks that no hotkey is blamed for the commitment of another."""
  role: Any = network.nodes[LEADER].role
  for r in range(1, ROUNDS - 1):
    if role.notes.get(r) != findings.CheckFinding.ABSENT:
      return f'round {r}: expected ABSENT, got {role.notes.get(r)}'
  everybody = {r: _ALL for r in range(ROUNDS)}
  return scenario_lib.counts(everybody)(network, counted)


def _begin_to_move(network: Network) -> None:
  for i in range(_MOVERS):
    _register(network, f'mover-{i}')


def _move(network: Network) -> None:
  """Lets each mover commit to a new location."""
  r = network.plan.round_at(network.block)
  for i in range(_MOVERS):
    network.faults.struck(Kind.ATTACK)
    _commit(network, f'mover-{i}', r, f'place-{i}-{network.block}')


def _is_bounded(network: Network, counted: Mapping[int, list[int]]) -> str:
  """Checks that nodes forget the locations that nobody has any more."""
  most = len(scenario_lib.EVERYBODY) + 2 * _MOVERS
  for name, node in network.live.items():
    if (known := len(node.objects._directory)) > most:
      return f'{name} knows {known} locations, {most} at most expected'
  everybody = {r: _ALL for r in range(ROUNDS)}
  return scenario_lib.counts(everybody)(network, counted)


def scenarios() -> list[Scenario]:
  """Returns the attacks."""
  sales = {
    r * ROUND + _OPENS + 1 + hand: _sell(r, hand)
    for r in range(1, ROUNDS - 1)
    for hand in range(_HANDS)
  }
  return [
    Scenario(
      'attack: a uid changes hands twice in every put window',
      script={
        **sales,
        **{r * ROUND + _COLLECTED: _look(r) for r in range(1, ROUNDS - 1)},
      },
      rounds=ROUNDS,
      check=_is_absent,
    ),
    Scenario(
      'attack: 3 miners are at a new location in every block',
      script={
        3: _begin_to_move,
        **{block: _move for block in range(4, ROUNDS * ROUND)},
      },
      rounds=ROUNDS,
      check=_is_bounded,
    ),
  ]
