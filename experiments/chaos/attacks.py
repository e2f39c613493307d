"""The adversarial matrix: validators, miners and strangers attack the vote.

Each scenario says in its check what the attack may cost: no round, a window, or
rounds in which nobody counts. Nothing invalid is ever applied: `network.audit`
replays the run from what honest validators keep.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from covenant.adversaries import poisoning
from covenant.chain import keys
from covenant.node import base as node_lib
from covenant.node import connect
from covenant.node import follow
from covenant.node import miner as miner_lib
from covenant.node import validator as validator_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import step_bound
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import faults
from experiments.chaos import network as network_lib
from experiments.chaos import scenario as scenario_lib

Collected = validator_lib.Collected
Entry = manifest_lib.Entry
Kill = faults.Kill
Kind = faults.Kind
Network = network_lib.Network
Phase = round_lib.Phase
Policy = validator_lib.ValidatorPolicy
Role = commitment_lib.Role
Scenario = scenario_lib.Scenario
Validator = validator_lib.Validator
# What a forger lists, from what it collected: (node, collected, round).
Forge = Callable[[Validator, Collected, int], Sequence[Entry]]
LEADER, SECOND, THIRD = scenario_lib.VALIDATORS
ROUND, counts = scenario_lib.ROUND, scenario_lib.counts
ALL = list(range(len(scenario_lib.MINERS)))  # uids
ROUNDS = 7
FORGED = (4, 5)  # the rounds that are attacked
HUGE = 0  # the uid of the miner that sends a huge message


def _struck(node: Any, kind: Kind) -> None:
  chain: Any = node.chain  # of `Faults.chain`
  chain.faults.struck(kind)


def forger(forge: Forge) -> Callable[[Policy], Policy]:
  """Proposes in the forged rounds what `forge` lists."""

  def wrap(policy: Policy) -> Policy:
    def propose(node: Validator, collected: Collected, r: int) -> bytes:
      made = policy.propose(node, collected, r)
      if r not in FORGED:
        return made
      _struck(node, Kind.ATTACK)
      manifest = manifest_lib.decode(made, node.chain.verify)
      entries = tuple(sorted(forge(node, collected, r)))
      changed = manifest._replace(entries=entries)
      return manifest_lib.encode(changed, node.chain.sign)

    return policy._replace(propose=propose)

  return wrap


def nobody(node: Validator, collected: Collected, r: int) -> list[Entry]:
  """Lists nobody."""
  return []


def harmful(node: Validator, collected: Collected, r: int) -> list[Entry]:
  """Lists the miner with the huge message alone."""
  found = collected.entries.get(HUGE)
  return [] if found is None else [found]


def half_missing(node: Validator, collected: Collected, r: int) -> list[Entry]:
  """Lists fewer than half of those that should count."""
  some = collected.chosen[: (len(collected.chosen) - 1) // 2]
  return [collected.entries[uid] for uid in some]


def invented(node: Validator, collected: Collected, r: int) -> list[Entry]:
  """Lists uids and hotkeys that nobody has."""
  key = keys.Key.from_seed(bytes(32)).address
  return [Entry(900 + i, key, bytes([i]) * 32) for i in range(3)]


def too_many(node: Validator, collected: Collected, r: int) -> list[Entry]:
  """Lists more entries than may count, all of them invented."""
  key = keys.Key.from_seed(bytes(32)).address
  most = node.shared_model.most_entries
  return [Entry(i, key, bytes(32)) for i in range(most + 1)]


def uncommitted(node: Validator, collected: Collected, r: int) -> list[Entry]:
  """Lists a registered miner with a payload that it has not committed to."""
  entry = next(iter(collected.entries.values()))
  return [entry._replace(digest=b'x' * 32)]


def misplaced(node: Validator, collected: Collected, r: int) -> list[Entry]:
  """Lists a committed payload under the uid of another miner."""
  one, two = list(collected.entries.values())[:2]
  return [one, two._replace(digest=one.digest)]


def late(policy: Policy) -> Policy:
  """Commits to a manifest at once, and shows it in the last blocks only."""

  def stand_for(node: Validator, r: int, data: bytes, head: int) -> None:
    _struck(node, Kind.ATTACK)
    digest = run_storage_lib.digest(data)
    node.manifests[digest] = data
    node.role.notes['late'] = node.objects.key('proposals', r, digest), data
    follow.commit(node, r, digest, head)

  return policy._replace(stand_for=stand_for)


def _show(network: Network) -> None:
  """Shows what the late leader has withheld."""
  node: Any = network.nodes[LEADER]
  if (shown := node.role.notes.pop('late', None)) is not None:
    node.objects.put_once(*shown)


def _vote_by(name: str, vote: Any) -> Callable[[Network], None]:
  """Returns an action: from now on a validator votes by this handler."""

  def action(network: Network) -> None:
    node = network.nodes[name]
    node.handlers = {**node.handlers, Phase.VOTE: vote}

  return action


def _copy(node: Validator, command: round_lib.Command, head: int) -> None:
  """Votes for whatever the validator with the most stake votes for."""
  block = node.schedule.finalized(head)
  now = membership_lib.read(node.chain, block, node.schedule)
  leader = max(now.peers.values(), key=lambda peer: peer.stake)
  if now.votes.get(leader.uid) != command.round:
    raise node_lib.RetryLaterError
  digest = now.commitments[leader.uid].digest
  if command.round in FORGED:
    _struck(node, Kind.ATTACK)
  follow.commit(node, command.round, digest, head)


def _flip(node: Validator, command: round_lib.Command, head: int) -> None:
  """Votes for something else in every block."""
  _struck(node, Kind.ATTACK)
  digest = head.to_bytes(32, 'little')
  _commit(node, Role.VALIDATOR, command.round, digest)
  raise node_lib.RetryLaterError


def _commit(node: Any, role: Role, r: int, digest: bytes) -> None:
  new = commitment_lib.Commitment(role, node.objects.location, r, digest)
  node.chain.commit(commitment_lib.encode(new))


def _spoil(network: Network) -> None:
  """Lets a miner send a huge message from the first forged round on."""
  node = network.nodes[str(HUGE)]
  _struck(node, Kind.ATTACK)
  policy = miner_lib.in_virtual_time(miner_lib.HONEST)
  spoiled = poisoning.scaled(
    policy, 1e5, lambda miner, task: task.round in FORGED
  )
  node.handlers = miner_lib.handlers(spoiled)


def _votes_too(network: Network) -> None:
  """Lets a miner vote as a validator, for something, after its payload."""
  node = network.nodes['0']
  network.faults.struck(Kind.ATTACK)
  r = network.plan.round_at(network.block) - 1
  network.host.chain.set_permit(node.chain.hotkey, True)
  network.host.chain.set_stake(node.chain.hotkey, 500.0)
  _commit(node, Role.VALIDATOR, r, b'v' * 32)


def _strangers(count: int) -> Callable[[Network], None]:
  """Returns an action: this many hotkeys register."""

  def action(network: Network) -> None:
    for i in range(count):
      network.faults.struck(Kind.STRANGER)
      key = connect.local_key(network.config.seed, f'stranger-{i}')
      network.host.chain.register(key.address, 0.0, False)

  return action


def _strangers_commit(count: int) -> Callable[[Network], None]:
  """Returns an action: they commit to payloads that nobody has."""

  def action(network: Network) -> None:
    r = network.plan.round_at(network.block)
    for i in range(count):
      network.faults.struck(Kind.STRANGER)
      key = connect.local_key(network.config.seed, f'stranger-{i}')
      chain = network.host.chain.seen_by(key)
      location = network.nodes[str(i % len(ALL))].objects.location
      new = commitment_lib.Commitment(
        Role.MINER, location, r, i.to_bytes(32, 'little')
      )
      chain.commit(commitment_lib.encode(new))

  return action


def _cost(
  empty: Sequence[int] = (), without: Sequence[int] = ()
) -> Callable[..., str]:
  """Returns a check of what an attack on the forged rounds may cost.

  Args:
    empty: rounds in which nobody counts.
    without: uids that do not count in forged rounds.
  """
  count = counts(
    {
      r: []
      if r in empty
      else [u for u in ALL if r not in FORGED or u not in without]
      for r in range(ROUNDS)
    }
  )

  def check(network: Network, counted: Mapping[int, list[int]]) -> str:
    return count(network, counted)

  return check


def _loses_its_turn(without: Sequence[int] = ()) -> Callable[..., str]:
  """Returns a check that only the first forged round took longer."""
  cost = _cost((), without)

  def check(network: Network, counted: Mapping[int, list[int]]) -> str:
    leader = network.nodes[LEADER].chain.hotkey
    third: Any = network.nodes[THIRD]
    if third.role.passed.get(leader) != FORGED[0]:
      return f'expected {leader} passed over in {FORGED[0]}'
    for r in range(ROUNDS):
      block = network.plan.decision_block(r)
      now = membership_lib.read(network.host.chain, block, network.plan)
      held = round_lib.decide(r, now.commitments, now.stakes(r), last=False)
      if (held is None) != (r == FORGED[0]):
        return f'round {r}: at the first look {held}'
    return cost(network, counted)

  return check


def _bounded(network: Network, counted: Mapping[int, list[int]]) -> str:
  """Checks that a bought majority moved the model by a bounded step."""
  (sizes,) = {
    tuple(np.asarray(node.shared.steps).tolist())
    for node in network.live.values()
  }
  newest = [size for size in sizes if size]
  for i, size in enumerate(newest):
    before = np.array(newest[i + 1 :], np.float32)
    if step_bound.factor(np.float32(size), before) < 0.999:
      return f'a step of {size} after {before}'
  for r in FORGED:
    if counted[r] != [HUGE]:
      return f'round {r}: expected the bought payload, got {counted[r]}'
  return ''


def scenarios() -> list[Scenario]:
  """Returns the adversarial matrix."""
  honest = {r: ALL for r in range(ROUNDS)}
  return [
    *(
      Scenario(
        f'attack: a leader proposes {what}',
        script={0: _spoil} if forge is harmful else {},
        dishonest={LEADER: forger(forge)},
        rounds=ROUNDS,
        check=_loses_its_turn([HUGE] if forge is harmful else []),
      )
      for what, forge in {
        'nobody': nobody,
        'a harmful message alone': harmful,
        'less than half of the others': half_missing,
        'uids that do not exist': invented,
        'more entries than may count': too_many,
        'a payload that is not committed to': uncommitted,
        'a payload under two uids': misplaced,
      }.items()
    ),
    *(
      Scenario(
        f'attack: a bought majority votes for {what}',
        script={0: _vote_by(SECOND, _copy)},
        dishonest={LEADER: forger(forge), SECOND: lambda policy: policy},
        rounds=ROUNDS,
        check=_cost(empty=FORGED[:1]),  # then it has lost its turn
      )
      for what, forge in {
        'uids that do not exist': invented,
        'more entries than may count': too_many,
        'a payload that is not committed to': uncommitted,
        'a payload under two uids': misplaced,
      }.items()
    ),
    Scenario(
      'attack: a bought majority votes for a harmful message alone',
      script={0: _spoil, 1: _vote_by(SECOND, _copy)},
      dishonest={LEADER: forger(harmful), SECOND: lambda policy: policy},
      rounds=ROUNDS,
      check=_bounded,
    ),
    Scenario(
      'attack: the others are down from one vote on, a minority votes',
      kills=tuple(
        Kill(name, FORGED[0], Phase.VOTE, 0, ROUND) for name in (LEADER, SECOND)
      ),
      dishonest={THIRD: forger(invented)},
      rounds=ROUNDS,
      check=_cost(empty=FORGED[:1]),
    ),
    Scenario(
      'attack: a leader shows its manifests in the last blocks',
      script={r * ROUND + 5: _show for r in range(1, ROUNDS + 1)},
      dishonest={LEADER: late},
      rounds=ROUNDS,
      check=counts(honest),
    ),
    Scenario(
      'attack: a validator votes for something else in every block',
      script={0: _vote_by(SECOND, _flip)},
      dishonest={SECOND: lambda policy: policy},
      rounds=ROUNDS,
      check=counts(honest),
    ),
    Scenario(
      'attack: a miner votes as a validator after its payload',
      script={r * ROUND + 2: _votes_too for r in range(1, ROUNDS)},
      rounds=ROUNDS,
      check=counts(honest),
    ),
    Scenario(
      'attack: 120 strangers register',
      script={ROUND + 5: _strangers(120)},
      rounds=ROUNDS,
      check=counts(honest),
    ),
    Scenario(
      'attack: 40 strangers commit to payloads that nobody has',
      script={
        3: _strangers(40),
        **{r * ROUND + 15: _strangers_commit(40) for r in range(ROUNDS)},
      },
      rounds=ROUNDS,
      check=counts(honest),
    ),
  ]
