"""The nodes of a host as processes: they die, come back, leave and join.

At each block, every node that is up executes its commands, as in
`node.process`: it is saved after each command if a save is due. A node that
died is a new object that continues from its last save and shares nothing with
the old one.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant.chain import interface as chain_lib
from covenant.emulate import host as host_lib
from covenant.node import base as node_lib
from covenant.node import connect
from covenant.protocol import amendments
from covenant.protocol import apply
from covenant.protocol import rollback
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import faults as faults_lib

Kind = faults_lib.Kind
FOR_EVER = 10**9  # blocks


class Seen(NamedTuple):
  """An event and the name of its node."""

  name: str
  event: node_lib.Event


class Network:
  """A run of the nodes of `host` from its beginning, in a world of faults.

  Args:
    config: the config of the host.
    host: the host, which is started anew; of one network at a time.
    faults: the faults of the environment.
    script: further actions, each by the block before which it happens.
    dishonest: changes to the policies of some validators, by name.
  """

  def __init__(
    self,
    config: config_lib.Config,
    host: host_lib.Host,
    faults: faults_lib.Faults | None = None,
    script: dict[int, Callable[['Network'], None]] | None = None,
    dishonest: dict[str, host_lib.Wrap] | None = None,
  ):
    self.config = config
    self.host = host
    self.faults = faults or faults_lib.Faults()
    self.block = -1
    self.events: list[Seen] = []
    self.restarts = 0
    self._script = script or {}
    self._dishonest = dishonest or {}
    self._up_from: dict[str, int] = {}  # block
    self._saved: dict[str, tuple[int, Any]] = {}  # round, tree
    host.environment = self.faults
    host.init()
    self._genesis = host.genesis()
    self._validators = {
      str(u) for u in range(config.miners, config.miners + config.validators)
    }
    self.nodes: dict[str, node_lib.Node] = {}
    for uid in range(config.miners + config.validators):
      self._build(str(uid))

  @property
  def plan(self) -> round_lib.Schedule:
    """The blocks of all rounds, by the node that knows most amendments."""
    known = [node.amendments for node in self.nodes.values()]
    return amendments.schedule(self.config, max(known, key=len, default=()))

  @property
  def live(self) -> dict[str, node_lib.Node]:
    """The honest nodes that are up, by name."""
    return {
      name: node
      for name, node in self.nodes.items()
      if self._up(name) and name not in self._dishonest
    }

  def run(self, rounds: int) -> None:
    """Runs until every node has had the time to apply these rounds."""
    while self.block < (
      self.plan.last_decision_block(rounds - 1) + 2 + self._unsettled
    ):
      self.step()

  def step(self) -> None:
    """Runs one block of all nodes."""
    self.block += 1
    self.faults.block = self.block
    self.host.now = self.block * self.host.chain.block_seconds
    if action := self._script.get(self.block):
      action(self)
    for name in list(self.nodes):
      if self._up(name):
        self._work(name)

  def kill(self, name: str, down: int) -> None:
    """Kills a node between two of its phases; it is back after `down`."""
    self.faults.struck(Kind.KILL)
    self._restart(name, down)

  def join(self, name: str, validator: bool = False, stake: float = 0) -> None:
    """Registers a new hotkey and starts its node, which knows nothing."""
    self.faults.struck(Kind.JOIN)
    key = connect.local_key(self.config.seed, name)
    self.host.chain.register(key.address, stake, validator)
    if validator:
      self._validators.add(name)
    self._build(name)

  def leave(self, name: str) -> None:
    """Removes a node for good and frees its uid. Its bucket stays."""
    self.faults.struck(Kind.LEAVE)
    self.host.chain.deregister(self.nodes.pop(name).chain.hotkey)

  def register_silent(self, count: int, stake: float) -> None:
    """Registers hotkeys with a permit, behind which nobody runs a node."""
    for i in range(count):
      self.faults.struck(Kind.SILENT)
      key = connect.local_key(self.config.seed, f'silent-{i}')
      self.host.chain.register(key.address, stake, validator=True)

  def give_permit(self, name: str, stake: float) -> None:
    """Stakes so much on a miner's hotkey that it gets a permit."""
    self.faults.struck(Kind.PERMIT)
    hotkey = self.nodes[name].chain.hotkey
    self.host.chain.set_stake(hotkey, stake)
    self.host.chain.set_permit(hotkey, True)

  def set_stake(self, name: str, stake: float) -> None:
    """Changes the stake of a node."""
    self.faults.struck(Kind.STAKE)
    self.host.chain.set_stake(self.nodes[name].chain.hotkey, stake)

  def errors(self, text: str) -> list[Seen]:
    """Returns the events with an error that contains this text."""
    return [seen for seen in self.events if text in seen.event.error]

  @property
  def _unsettled(self) -> int:
    return self.config.phases.confirmations

  def _up(self, name: str) -> bool:
    return self._up_from.get(name, 0) <= self.block

  def _build(self, name: str) -> None:
    def observe(event: node_lib.Event) -> None:
      self.events.append(Seen(name, event))

    place = self._genesis
    if name in self._validators:
      wrap = self._dishonest.get(name, lambda policy: policy)
      node = self.host.validator(name, place, observe=observe, wrap=wrap)
    else:
      node = self.host.miner(name, place, observe=observe)
    if name in self._saved:
      tree = self._saved[name][1]
      node.load(jax.tree.map(_restored, node.save(), tree))
    self.nodes[name] = node

  def _restart(self, name: str, down: int) -> None:
    self.restarts += 1
    self._up_from[name] = self.block + down
    self._build(name)

  def _work(self, name: str) -> None:
    """Executes all commands of a node at this block."""
    node, skew = self.nodes[name], self.faults.strike(Kind.SKEW, name)
    if self.faults.strike(Kind.FLIP, name):
      node.shared = flipped(node.shared)
    wake = head = -1
    try:
      with _clock_off(skew.amount if skew else 0.0):
        while wake == head:
          head = node.chain.head()
          wake = self._poll(name, node, head)
    except chain_lib.ChainError as e:
      self.events.append(Seen(name, node_lib.Event(-1, -1, 'head', str(e))))
    except faults_lib.Killed as e:
      self._restart(name, e.args[0].down)
      return
    if late := self.faults.delay.pop(name, 0):
      self._up_from[name] = self.block + late

  def _poll(self, name: str, node: node_lib.Node, head: int) -> int:
    plan = node.schedule
    command = round_lib.next_command(plan, node.phases, node.state, head)
    if command is not None:
      self.faults.begin(name, command)
    wake = node.poll(head)
    if command is not None:
      self.faults.end(name)
      if command.phase is round_lib.Phase.TRAIN:
        if fault := self.faults.strike(Kind.BUSY, name):
          self.faults.delay[name] += int(fault.amount)
          return head + 1
    if wake == head:
      self._share(node)
      self._save(name, node)
    return wake

  def _share(self, node: node_lib.Node) -> None:
    """Shares one copy of the state among nodes with equal bits.

    They are compared: two nodes of one host must not hide that they differ.
    """
    for other in self.nodes.values():
      if other.place[:2] == node.place[:2] and (
        other.shared is not node.shared
      ):
        if _equal(other.shared, node.shared):
          node.shared = other.shared
        return

  def _save(self, name: str, node: node_lib.Node) -> None:
    """Saves a node after a round, as `process.Process.run` does."""
    completed = node.state.round
    if not node.savable or completed % self.config.checkpoint.every:
      return
    if name in self._saved and self._saved[name][0] == completed:
      return
    if not self.faults.strike(Kind.DISK, name):
      self._saved[name] = completed, jax.tree.map(_copied, node.save())


def audit(network: Network) -> dict[int, list[int]]:
  """Returns the uids that counted in each round, as the buckets have it.

  Replays the run from its beginning: the manifests that validators keep as
  its history, of which there must be one a round, and the payloads that they
  list must lead to where everybody is. This is the proof that nothing that
  was agreed upon got lost, and that nothing else was applied.

  Raises:
    AssertionError: says what is not so.
  """
  host, nodes = network.host, network.live
  places = {
    name: (n.state.round, n.root.hex()[:16], n.fingerprint()[:16])
    for name, n in nodes.items()
  }
  assert len(set(places.values())) == 1, f'not all at one place: {places}'
  written = network.faults.written
  place, counted = host.genesis(), {}
  (rounds,) = {node.state.round for node in nodes.values()}
  verify, objects = host.chain.verify, host.objects('')
  states = {}  # by fingerprint: rollbacks return to them
  for r in range(rounds):
    states[apply.fingerprint(host.shared_model, place)] = place.shared
    kept = written.get(objects.key('history', r), [])
    assert len(kept) == 1, f'round {r} has {len(kept)} histories'
    (data,) = kept
    digest, counted[r], shared, adoption = None, [], place.shared, None
    if data:
      digest = run_storage_lib.digest(data)
      manifest = manifest_lib.decode(data, verify)
      fingerprint = apply.fingerprint(host.shared_model, place)
      apply.check_matches(manifest, place.root, fingerprint)
      payloads = {
        entry.digest: next(
          data
          for data in written[objects.key('payloads', r, entry.digest)]
          if run_storage_lib.digest(data) == entry.digest
        )
        for entry in manifest.entries
      }
      model = amendments.model(host.shared_model, place.amendments, r)
      applied = apply.outer_step(
        model, host.chain, place, manifest.entries, payloads
      )
      counted[r] = sorted(applied.messages)
      shared, adoption = applied.shared, manifest.adoption
    place = place.advance(digest, shared, adoption)
    if target := rollback.due(place):
      place = place._replace(shared=states[target.fingerprint])
  fingerprint = apply.fingerprint(host.shared_model, place)
  found = (rounds, place.root.hex()[:16], fingerprint[:16])
  assert {found} == set(places.values()), f'{found} replayed, not {places}'
  return counted


def digest(node: node_lib.Node) -> str:
  """Returns a digest of every bit that a node would save.

  But for who resembled whom: that asks who committed first, and a miner that
  was killed commits a block later.
  """
  tree = node.save()
  found = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    found.update(jax.tree_util.keystr(path).encode())
    if isinstance(leaf, str):
      found.update(re.sub(r'similarity_avg\W+[-+.\de]+', '', leaf).encode())
    else:
      found.update(np.asarray(leaf).tobytes())
  return found.hexdigest()


def _equal(
  ours: shared_state_lib.SharedState, theirs: shared_state_lib.SharedState
) -> bool:
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
  )


def _copied(x: Any) -> Any:
  return x if isinstance(x, str) else np.array(x)


def _restored(like: Any, x: Any) -> Any:
  return jnp.asarray(x) if isinstance(like, jax.Array) else x


def flipped(
  shared: shared_state_lib.SharedState,
) -> shared_state_lib.SharedState:
  """Returns the state with the lowest bit of one parameter flipped."""
  leaves, structure = jax.tree.flatten(shared.params)
  first = np.array(leaves[0])
  first.reshape(-1).view(np.uint8)[0] ^= 1
  leaves[0] = jnp.asarray(first)
  return shared._replace(params=jax.tree.unflatten(structure, leaves))


@contextlib.contextmanager
def _clock_off(seconds: float) -> Iterator[None]:
  """Shifts the clock of this process by some seconds."""
  clock = time.time
  time.time = lambda: clock() + seconds
  try:
    yield
  finally:
    time.time = clock
