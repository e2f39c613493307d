"""A whole run on one host, in virtual time.

The miners and validators are those of the real network (covenant/node/); the
host replaces only their clock, chain and buckets. It polls the nodes in turn at
each block; when none has anything to do, the clock jumps to the next block at
which one may.

A miner trains bit for bit as it would alone: one after another on a device, on
several devices at the same time (covenant/emulate/devices.py). Between rounds a
miner holds its private state only; the parameters, and what a round did to
them, are held once.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

from covenant import config as config_lib
from covenant import metrics
from covenant import typing as ct
from covenant.adversaries import base as adversary
from covenant.adversaries import registry
from covenant.chain import local_chain
from covenant.data import tokens
from covenant.emulate import devices as devices_lib
from covenant.emulate import environment as environment_lib
from covenant.emulate import measurements
from covenant.emulate import tools as tools_lib
from covenant.gauntlet import ratings
from covenant.node import base as node_lib
from covenant.node import connect
from covenant.node import evaluator as evaluator_lib
from covenant.node import miner as miner_lib
from covenant.node import multihost as multihost_lib
from covenant.node import preflight
from covenant.node import validator as validator_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import apply
from covenant.protocol import checkpoint as checkpoint_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import manifest as manifest_lib

Phase = round_lib.Phase
Wrap = Callable[[validator_lib.ValidatorPolicy], validator_lib.ValidatorPolicy]
Policy = TypeVar('Policy')
Announce = Callable[[int, validator_lib.Verdict], None]
_WORLDS = itertools.count()  # so that no two find each other's objects
_PATIENCE = 8  # rounds without progress before a bug is assumed


class Host:
  """The nodes of one run, with their clock, chain and buckets.

  Uids 0 to miners - 1 are the miners, the validators follow. A node's name is
  its uid, if it was there from the beginning. `saved.py` saves and restores it.

  Attributes:
    config: of the run, as it began.
    counters: of the run.
    before: the root before the last round.
    counted: the payloads that counted in the last round, by uid.

  Args:
    config: of the run.
    data: of the run.
    environment: the chain and the buckets as the nodes see them.
    process_group: the processes that emulate the run; this one if omitted.
    pausing: see `devices.DevicePool`.
  """

  def __init__(
    self,
    config: config_lib.Config,
    data: tokens.TokenData,
    environment: environment_lib.Environment | None = None,
    process_group: multihost_lib.ProcessGroup | None = None,
    pausing: Callable[[], bool] | None = None,
  ):
    self.config = config
    self.environment = environment or environment_lib.Environment()
    self._cast = registry.names(config)
    preflight.check_sequences(config, data.train)
    self.shared_model = shared_state_lib.SharedModel(config)
    self.tools = tools_lib.Tools(
      self.shared_model, data, process_group, pausing
    )
    self.device_pool = self.tools.pool(config)
    self.evaluator = evaluator_lib.Evaluator(config, data)
    self.judge = self.tools.judge(config)
    self.stopwatch = measurements.Stopwatch()
    self.now = 0.0  # seconds since block 0
    self.announce: Announce = lambda uid, verdict: None
    self.adopted: Callable[[dict[str, ct.Json]], None] = lambda record: None
    self.model = self.shared_model  # under the rules of the last round
    self.init()

  @property
  def nodes(self) -> list[node_lib.Node]:
    """The nodes, in the order of their uids."""
    return [*self.miners, *self.validators]

  @property
  def root(self) -> bytes:
    """The root of the history so far."""
    return self.validators[0].root

  @property
  def rounds(self) -> int:
    """The number of rounds of the run, as amended up to now."""
    return self.validators[0].config.rounds

  @property
  def planned_rounds(self) -> int:
    """The number of rounds of the run, by all amendments that it adopted."""
    adopted = self.validators[0].amendments
    return amendments_lib.last_config(self.config, adopted).rounds

  def init(self) -> None:
    """Creates the chain and the nodes of the first round."""
    config = self.config
    chain = local_chain.LocalChain.create(
      ':memory:',
      seed=environment_lib.chain_seed(config),
      rules=environment_lib.rules(config),
      clock=lambda: self.now,
    )
    environment_lib.register(chain, config)
    chain.begin(0.0)
    self.counters = checkpoint_lib.RunCounters(
      config.first_round, config.seed, 0, 0
    )
    self.before = b''  # the root before the last round
    self.counted: dict[int, bytes] = {}  # payloads of the last round
    self.populate(chain, 0, self.genesis(), {}, {})

  def genesis(self) -> apply.Position:
    """Returns the position before the first round."""
    root = manifest_lib.genesis(self.shared_model.run)
    return apply.Position(
      self.config.first_round, root, self.shared_model.init()
    )

  def populate(
    self,
    chain: local_chain.LocalChain,
    block: int,
    place: apply.Position,
    private: dict[int, local_lib.MinerState],
    standings: dict[int, ratings.Ratings],
  ) -> None:
    """Creates all nodes at one position and one block."""
    self.chain = chain
    self.now = block * chain.block_seconds
    self._applied: dict[tuple[bytes, bytes], apply.AppliedRound] = {}
    self._accomplices = adversary.Accomplices(
      registry.dishonest(self.config), {}
    )
    self._folder = f'emulated-{next(_WORLDS)}-'
    first, last = self.config.miners, self.config.validators
    self.miners = [
      self.miner(str(u), place, private.get(u)) for u in range(first)
    ]
    self.validators = [
      self.validator(str(u), place, standings.get(u))
      for u in range(first, first + last)
    ]

  def miner(
    self,
    name: str,
    place: apply.Position,
    private: local_lib.MinerState | None = None,
    observe: node_lib.Observe | None = None,
  ) -> miner_lib.Miner:
    """Returns a miner of this host, which acts only when polled."""
    slot = self.device_pool.slot(name)
    role = miner_lib.role(slot, place)
    if private is not None:
      role.miner_state = node_lib.Future.done(private)
    policy = miner_lib.in_virtual_time(miner_lib.HONEST)
    node = node_lib.Node(
      self._context(name, observe),
      place,
      role,
      miner_lib.handlers(
        self._misbehave(name, policy), bool(self.config.optim.overlap)
      ),
    )
    adversary.introduce(node, self._accomplices)
    return node

  def validator(
    self,
    name: str,
    place: apply.Position,
    standings: ratings.Ratings | None = None,
    observe: node_lib.Observe | None = None,
    wrap: Wrap = lambda policy: policy,
  ) -> validator_lib.Validator:
    """Returns a validator of this host, whose policy `wrap` may change."""
    policy = wrap(self._misbehave(name, validator_lib.HONEST))
    node = node_lib.Node(
      self._context(name, observe),
      place,
      validator_lib.ValidatorRole(
        self.judge,
        standings or ratings.Ratings(),
        lambda verdict: self.announce(int(name), verdict),
      ),
      validator_lib.handlers(policy),
    )
    adversary.introduce(node, self._accomplices)
    return node

  def _misbehave(self, name: str, policy: Policy) -> Policy:
    """Returns the policy of an honest node as that of a name changes it."""
    kind = self._kind(name)
    return kind.wrap(policy) if kind else policy

  def _kind(self, name: str) -> adversary.Adversary | None:
    """Returns the kind of adversary that a node is, if any."""
    uid = int(name) if name.isdecimal() else -1
    return registry.find(self._cast[uid]) if uid in self._cast else None

  def objects(self, name: str) -> run_storage_lib.RunStorage:
    """Returns the storage of the run as the node of a name sees it."""
    location = location_lib.Location.parse(f'memory://{self._folder}{name}')

    def open_bucket(data: bytes) -> store_lib.Bucket:
      found = location_lib.Location.from_bytes(data)
      bucket = bucket_lib.open_for_reading(found, allow_local=True)
      owner = bucket.location.rpartition(self._folder)[2]
      kind = self._kind(owner)
      if kind is not None and kind.serve is not None:
        bucket = kind.serve(name, bucket)
      return self.environment.bucket(name, owner, bucket)

    own = self.environment.bucket(name, name, bucket_lib.open_bucket(location))
    return run_storage_lib.RunStorage(
      self.shared_model.run, own, location.to_bytes(), open_bucket
    )

  def _context(
    self, name: str, observe: node_lib.Observe | None
  ) -> node_lib.Context:
    key = connect.local_key(self.config.seed, name)
    return node_lib.Context(
      self.config,
      self.environment.chain(name, self.chain.seen_by(key)),
      self.objects(name),
      self.shared_model,
      self._applied,
      observe or functools.partial(self.stopwatch.observe, name=name),
      virtual=True,
      retool=functools.partial(self.tools.retool, name=name),
      adopted=lambda record: self.adopted(record),
    )

  def warm_up(self) -> None:
    """Compiles the programs of validators, on an empty message."""
    shared = self.validators[0].shared
    validator_lib.warm_up(self.config, self.judge, self.shared_model, shared)

  def round(self) -> metrics.Round:
    """Runs one round of all nodes.

    Raises:
      PausedError: `pausing` of the devices ended the training; the state is
        then that of the beginning, but that some miners have trained.
    """
    began = time.perf_counter()
    completed = self.counters.round + 1
    first = self.validators[0]
    before, self.model = first.root, first.shared_model
    self._run_until(completed)
    self.before = before
    sent = {
      uid: made
      for uid, miner in enumerate(self.miners)
      if (made := miner.role.contribution.result())
      and made.round == completed - 1
    }
    self.stopwatch.check(sent)
    self.counted = {
      uid: sent[uid].payload
      for uid in self.validators[0].messages
      if uid in sent
    }
    self.counters = self.counters._replace(
      round=completed,
      tokens=self.counters.tokens + sum(c.tokens for c in sent.values()),
      bytes_up=self.counters.bytes_up
      + sum(len(c.payload) for c in sent.values()),
    )
    return measurements.round_record(
      self.config,
      self.counters,
      sent,
      self.validators[0],
      self.model,
      time.perf_counter() - began,
      self.stopwatch.lap(),
    )

  def _run_until(self, completed: int) -> None:
    """Polls all nodes until the rounds before `completed` are done."""
    schedule = self.validators[0].schedule
    limit = schedule.start(completed + _PATIENCE)
    # Validators first: what they decode to check need not be decoded again.
    nodes = [*self.validators, *self.miners]
    while waiting := [n for n in nodes if not _done(n, completed)]:
      head = self.chain.head()
      if head > limit:
        raise RuntimeError(f'round {completed - 1} does not end: {waiting}')
      wakes = []
      for node in waiting:
        wake = head
        while wake == head and not _done(node, completed):
          wake = node.poll(head)
        wakes.append(wake)
      # Who was told to train at this block has trained before the next one.
      self._wait_for_training()
      if all(_done(node, completed) for node in waiting):
        return
      self.now = max(min(wakes), head + 1) * self.chain.block_seconds

  def _wait_for_training(self) -> None:
    """Waits for all training; raises PausedError if any of it was paused."""
    paused: devices_lib.PausedError | None = None
    for miner in self.miners:
      try:
        self.stopwatch.train(miner.role.wait)
      except devices_lib.PausedError as e:
        paused = e
    if paused is not None:
      raise paused

  def evaluate(self) -> metrics.Evaluation:
    """Evaluates the shared parameters on the held-out split."""
    began = time.perf_counter()
    heldout = self.evaluator.evaluate(self.validators[0].shared.params)
    seconds = time.perf_counter() - began
    return measurements.evaluation_record(self.counters, heldout, seconds)


def _done(node: node_lib.Node, completed: int) -> bool:
  """True if a node is done with the rounds before `completed`."""
  state = node.state
  # A miner would train for the next round before it tidies up.
  tidy = Phase.TRAIN in node.phases or state.previous_round_done(node.phases)
  return state.round >= completed and tidy
