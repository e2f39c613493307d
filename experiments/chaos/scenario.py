"""A run in which something goes wrong, and what must hold all the same.

After each scenario every live honest node is at one history root with one
fingerprint; a replay from what was put into buckets leads there too, so every
payload that an agreed manifest lists was applied by everybody; payloads count
again at the end; and whatever was to be injected was.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from covenant import config as config_lib
from covenant.data import dataset
from covenant.emulate import host as host_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib

Kind = faults.Kind
Fault = faults.Fault
Kill = faults.Kill
Network = network_lib.Network

MINERS = ('0', '1', '2', '3', '4', '5')
VALIDATORS = ('6', '7', '8')  # by stake; no majority without two
EVERYBODY = MINERS + VALIDATORS
ROUND = 20  # blocks


class Scenario(NamedTuple):
  """The faults of a run of some rounds, and the expected result."""

  name: str
  plan: tuple[Fault, ...] = ()
  kills: tuple[Kill, ...] = ()
  script: Mapping[int, Callable[[Network], None]] = {}
  dishonest: Mapping[str, host_lib.Wrap] = {}
  rounds: int = 5
  # Every node ends with the bits that it has when nothing goes wrong.
  undisturbed: bool = False
  # Returns what is wrong, or '': of the network and who counted in each round.
  check: Callable[[Network, Mapping[int, list[int]]], str] = (
    lambda network, counted: ''
  )


class Result(NamedTuple):
  """The result of a scenario."""

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
  """Returns the config of the scenarios, made from configs/tiny.py."""
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
  """Runs scenarios one after another, compiled once; see `get_config`."""

  def __init__(self, config: config_lib.Config):
    self.config = config
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
    """Returns the digest of each node after some rounds without a fault."""
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
  if not sum(world.count.values()):
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


def counts(expected: Mapping[int, list[int]]) -> Callable[..., str]:
  """Returns a check of the uids that counted in some rounds."""

  def check(network: Network, counted: Mapping[int, list[int]]) -> str:
    for r, uids in expected.items():
      if counted[r] != uids:
        return f'round {r}: expected the uids {uids}, not {counted[r]}'
    return ''

  return check
