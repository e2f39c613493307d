"""A network of single nodes for tests: a chain, buckets, and no training.

The chain is in memory and its clock is a field, the buckets are in memory, and
a miner's devices return a message that the test made. So a test polls one node
at the blocks of its choice.
"""

import functools
import itertools

import jax
import numpy as np
from absl.testing import absltest

from covenant.adversaries import base as adversary
from covenant.chain import keys
from covenant.chain import local_chain
from covenant.chain import storage as chain_storage
from covenant.data import dataset
from covenant.gauntlet import checks
from covenant.node import base as node_lib
from covenant.node import follow
from covenant.node import miner as miner_lib
from covenant.node import validator as validator_lib
from covenant.optim import sparseloco
from covenant.protocol import apply
from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import location as location_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import trainer as trainer_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib
from tests import helpers

MINERS = (0, 1, 2)
STAKES = {3: 60.0, 4: 50.0, 5: 40.0}  # of the validators; uid 3 leads
KEYS = {u: keys.Key.from_seed(bytes([u]) * 32) for u in (*MINERS, *STAKES)}
CONFIG = helpers.tiny()
_NETWORKS = itertools.count()


@functools.cache
def shared_model() -> shared_state_lib.SharedModel:
  """The model of all networks; made once per process."""
  return shared_state_lib.SharedModel(CONFIG)


@functools.cache
def start() -> apply.Position:
  """The start of the run."""
  root = manifest_lib.genesis(shared_model().run)
  return apply.Position(0, root, shared_model().init())


@functools.cache
def trainer() -> trainer_lib.Trainer:
  """A trainer that has compiled nothing yet."""
  return trainer_lib.Trainer(CONFIG, shared_model(), dataset.load(CONFIG))


@functools.cache
def message(seed: int, scale: float = 1e-3):
  """The message of a random delta."""
  draw = np.random.default_rng([77, seed])  # unlike an adversary's
  delta = jax.tree.map(
    lambda x: draw.normal(0, scale, x.shape).astype(np.float32),
    shared_model().abstract_params,
  )
  compression = shared_model().method.compression
  return jax.device_get(sparseloco.compress(delta, None, compression, None)[0])


class Slot:
  """Devices that return a known message at once; keeps what it was given."""

  def __init__(self, uid: int):
    self.trainer = trainer()
    self.uid = uid
    self.trained = []  # (params, state, task, batches, begun)

  def init(self, params, round_index):
    del params
    return local_lib.MinerState(np.int32(round_index), None, None)

  def train(self, params, state, task, batches, begun=None):
    batches = list(batches)
    self.trained.append((params, state, task, batches, begun))
    rows = sum(len(tokens_BxL1) for tokens_BxL1 in batches)
    work = local_lib.TrainedRound(message(self.uid), b'r' * 16, rows, 2.5, 0.25)
    after = state._replace(joined=state.joined + np.int32(100))
    return node_lib.Future.done((work, after))


class Network:
  """The chain and the buckets of a run of three miners and three validators.

  Args:
    test: closes the chain when it ends.
    clock: real time, whose chain the test begins; None: `block` is the time.
    block_seconds: the time of a block.

  Attributes:
    block: the newest block of the chain; tests set it.
    events: those of all nodes.
  """

  def __init__(
    self, test: absltest.TestCase, clock=None, block_seconds: float = 1.0
  ):
    self.block = 0
    self.events = []
    self._name = f'network-{next(_NETWORKS)}'
    self._objects = {uid: self._open(uid) for uid in KEYS}
    self.chain = local_chain.LocalChain.create(
      ':memory:',
      b'',
      chain_storage.ChainRules(block_seconds=block_seconds),
      clock=clock or (lambda: float(self.block)),
    )
    test.addCleanup(self.chain.close)
    for uid, key in KEYS.items():
      self.chain.register(key.address, STAKES.get(uid, 0.0), uid in STAKES)
    if clock is None:
      self.chain.begin(0.0)

  def objects(self, uid: int) -> run_storage_lib.RunStorage:
    return self._objects[uid]

  def _open(self, uid: int) -> run_storage_lib.RunStorage:
    location = location_lib.Location.parse(f'memory://{self._name}-{uid}')

    def open_bucket(data):
      found = location_lib.Location.from_bytes(data)
      return bucket_lib.open_for_reading(found, allow_local=True)

    return run_storage_lib.RunStorage(
      shared_model().run,
      bucket_lib.open_bucket(location),
      location.to_bytes(),
      open_bucket,
    )

  def context(self, uid: int, **changes) -> node_lib.Context:
    return node_lib.Context(
      **{
        'config': CONFIG,
        'chain': self.chain.seen_by(KEYS[uid]),
        'objects': self.objects(uid),
        'shared_model': shared_model(),
        'observe': self.events.append,
        'virtual': True,
        **changes,
      }
    )

  def node(self, uid: int, role=None, handlers=follow.HANDLERS, **changes):
    """Returns a node at the start of the run; one that only follows it."""
    return node_lib.Node(self.context(uid, **changes), start(), role, handlers)

  def miner(
    self, uid: int, policy=miner_lib.HONEST, names=None, notes=None, **changes
  ) -> miner_lib.Miner:
    """Returns a miner; `names` and `notes` are those of its accomplices."""
    node = self.node(
      uid,
      miner_lib.role(Slot(uid), start()),
      miner_lib.handlers(policy),
      **changes,
    )
    gang = adversary.Accomplices(names or {}, {} if notes is None else notes)
    adversary.introduce(node, gang)
    return node

  def validator(
    self, uid: int, policy=validator_lib.HONEST, **changes
  ) -> validator_lib.Validator:
    """Returns a validator that checks, but has nothing to score with."""
    judge = validator_lib.Judge(_checker(), None, trainer().split)
    return self.node(
      uid,
      validator_lib.ValidatorRole(judge),
      validator_lib.handlers(policy),
      **changes,
    )

  def read(self, block: int | None = None) -> membership_lib.Membership:
    return membership_lib.read(
      self.chain,
      self.block if block is None else block,
      round_lib.Schedule(CONFIG.phases),
    )

  def commit(self, uid: int, round_index: int | None, digest=bytes(32)):
    """Puts a commitment of a peer on the chain, with its bucket's place."""
    role = commitment_lib.Role.VALIDATOR
    if uid not in STAKES:
      role = commitment_lib.Role.MINER
    new = commitment_lib.Commitment(
      role, self.objects(uid).location, round_index, digest
    )
    self.chain.seen_by(KEYS[uid]).commit(commitment_lib.encode(new))

  def publish(self, uid: int, round_index: int, data: bytes) -> bytes:
    """Commits to a payload and uploads it; returns its digest."""
    digest = run_storage_lib.digest(data)
    self.commit(uid, round_index, digest)
    objects = self.objects(uid)
    objects.put_once(objects.key('payloads', round_index, digest), data)
    return digest

  def payload(self, node: miner_lib.Miner, seed: int | None = None) -> bytes:
    """Returns a valid payload of a miner, of its own message or a seed's."""
    seed = node.role.slot.uid if seed is None else seed
    task = miner_lib.task(node, node.state.round)
    work = local_lib.TrainedRound(message(seed), b'', 0, 2.5, 0.25)
    return miner_lib.seal(
      node, task, adversary.pretended(node, task, work)
    ).payload

  def manifest(self, uid: int, entries, **changes) -> bytes:
    """Returns a validator's manifest of round 0.

    An entry is (uid, digest), or `manifest_lib.Entry`.
    """
    manifest = manifest_lib.Manifest(
      shared_model().run,
      0,
      start().root,
      shared_model().fingerprint(start().shared),
      KEYS[uid].address,
      tuple(
        entry
        if isinstance(entry, manifest_lib.Entry)
        else manifest_lib.Entry(entry[0], KEYS[entry[0]].address, entry[1])
        for entry in entries
      ),
    )._replace(**changes)
    return manifest_lib.encode(manifest, KEYS[uid].sign)

  def propose(self, uid: int, data: bytes, round_index: int = 0) -> bytes:
    """Publishes a manifest and votes for it; returns its digest."""
    digest = run_storage_lib.digest(data)
    objects = self.objects(uid)
    objects.put_once(objects.key('proposals', round_index, digest), data)
    self.commit(uid, round_index, digest)
    return digest


@functools.cache
def _checker() -> checks.Checker:
  return checks.Checker(
    shared_model().abstract_params, shared_model().method.compression
  )


def command(phase, round_index=0, last=False):
  return validator_lib.Command(phase, round_index, last)
