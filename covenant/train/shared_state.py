"""The state that every node of a run shares, and the rules that update it.

Miners, validators and the emulator all update it by `SharedModel.apply_round`,
from the same payload bytes in the order of uids, and so stay identical.
"""

import copy
import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.data import assignment
from covenant.models import hf
from covenant.models import llama
from covenant.models import sharding
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import host_copy
from covenant.optim import leaf_group
from covenant.optim import outer_step as outer_step_lib
from covenant.optim import weight
from covenant.train import pieces as pieces_lib
from covenant.train import placement
from covenant.train import round_factors
from covenant.train import state_file
from covenant.train import step_bound
from covenant.wire import lazy
from covenant.wire import payload

# Baselines whose outer optimizer normalizes the step.
_UNBOUNDED = ('ddp', 'demo')
EQUAL_WEIGHTS: Mapping[int, weight.Weight] = types.MappingProxyType({})


class SharedState(NamedTuple):
  """The state that is equal, bit for bit, on every node after a round."""

  params: ct.Params  # theta in the papers
  outer: ct.OptState  # state of the outer optimizer
  # Sizes of the last rounds, newest first, float32 [16]; 0 stands for none.
  steps: ct.AbstractArray | tuple[()] = ()  # see step_bound.py


class SharedModel:
  """The compiled rules and the layout of the model that all nodes share.

  Attributes:
    method: the training method of the run.
    abstract_params: the shapes of the parameters.
    mesh: the mesh of the parameters, or None.
    specs: how each leaf is sharded on the mesh, or None.
    spec: the layout of payloads.
    run: the id of the run.
    genesis: the config that the run began with.
    host: moves the state between the memory of devices and of their host.

  Args:
    config: the config of the run.
    mesh: the devices that share the parameters (covenant/models/sharding.py);
      None is the default device. The state is the same, bit for bit.
    offload: True keeps the state in host memory between rounds.

  Raises:
    ConfigError: the tensors cannot be compressed so, or not on this mesh.
  """

  def __init__(
    self,
    config: config_lib.Config,
    mesh: jax.sharding.Mesh | None = None,
    offload: bool = False,
  ):
    self._config = self.genesis = config
    self.method = algorithm_lib.make(config)
    self.abstract_params = llama.abstract(config.model)
    compression = config.optim.compression
    self.mesh, self.specs = mesh, None
    if mesh is not None:
      sharding.check(config.model, compression.block, mesh)
      self.specs = sharding.specs(self.abstract_params, mesh)
    try:
      self.spec = payload.make_spec(
        self.abstract_params, self.method.compression, compression.codec
      )
      self.outer_step = self._make_outer_step()
    except ValueError as e:
      raise config_lib.ConfigError(f'optim.compression: {e}') from e
    self.run = payload.run_id(config_lib.identity(config))
    self._amended = {config: self}
    self._last: tuple[SharedState, str] | None = None
    device = (jax.local_devices() if mesh is None else mesh.local_devices)[0]
    self.host = placement.HostOffload(device, offload)

  def _make_outer_step(self) -> outer_step_lib.OuterStep:
    return outer_step_lib.OuterStep(
      self.abstract_params,
      self.method.compression,
      self.method.outer,
      self.method.mean_over,
      self.method.clip,
      self.mesh,
      self.specs,
      leaf_group.budget_here(),
      # The outer optimizer of ddp clips the norm of all tensors together.
      per_leaf=self.genesis.optim.method != 'ddp',
    )

  def amended(self, config: config_lib.Config) -> 'SharedModel':
    """Returns the model of the run under an amended config, made once."""
    made = self._amended.get(config)
    if made is None:
      made = self._amended[config] = copy.copy(self)
      made._config = config
      made.method = algorithm_lib.make(config)
      old, new = self._config.optim, config.optim
      # The outer step of these follows the schedule of the learning rate.
      if old.outer != new.outer or new.method in _UNBOUNDED:
        made.outer_step = made._make_outer_step()
    return made

  def fingerprint(self, shared: SharedState) -> str:
    """Returns the `state_fingerprint` of a state; caches the last one."""
    if self._last is None or self._last[0] is not shared:
      pieces = {
        name: list(pieces_lib.piece_digests(self.host.load(leaf)))
        for name, leaf in named_leaves(shared).items()
      }
      self._last = shared, state_fingerprint(pieces)
    return self._last[1]

  def init(self) -> SharedState:
    """Returns the state before the first round.

    It is a function of the run's seed, or the model of `config.pretrained`. On
    a mesh no device ever holds the whole.

    Raises:
      ConfigError: the folder has no model of this architecture.
    """
    config, where = self._config, None
    if self.mesh is not None:
      where = sharding.shardings(self.abstract_params, self.mesh)
    if config.pretrained:
      params = hf.load(config.pretrained, config.model)
      if where is None:
        return self._begin(jax.tree.map(jnp.array, params))
      return self._begin(jax.tree.map(sharding.place, params, where))
    init = functools.partial(llama.init, config.model)
    return self._begin(
      jax.jit(init, out_shardings=where)(jax.random.key(config.seed))
    )

  def _begin(self, params: ct.Params) -> SharedState:
    """Returns the state before the first round, from the parameters."""
    steps = self._place(np.zeros(step_bound.ROUNDS, np.float32))
    shared = SharedState(params, self.method.outer.init(params), steps)
    if self.genesis.first_round:
      shared = state_file.go_on(self.genesis, shared, self.fingerprint)
    return self.host.offload(shared)

  def _place(self, x: np.ndarray) -> jax.Array:
    """Copies a small array to all devices of the state."""
    if self.mesh is None:
      return jnp.asarray(x)
    where = jax.NamedSharding(self.mesh, jax.P(*[None] * x.ndim))
    return sharding.place(x, where)

  def abstract(self) -> SharedState:
    """Returns the shapes of the state."""
    return SharedState(
      self.abstract_params,
      jax.eval_shape(self.method.outer.init, self.abstract_params),
      jax.ShapeDtypeStruct((step_bound.ROUNDS,), jnp.float32),
    )

  def adopt(
    self,
    round_index: int,
    files: Mapping[str, Sequence[str]],
    places: Sequence[str],
    leaf: Callable[[str], jax.Array],
  ) -> SharedState:
    """Returns the state of a published checkpoint.

    Args:
      round_index: its round.
      files: the digests of the pieces of each tensor.
      places: locations of buckets that have them, hexadecimal.
      leaf: fetches the tensor of a name.
    """
    del round_index, files, places
    return jax.tree_util.tree_map_with_path(
      lambda path, _: leaf(
        jax.tree_util.keystr(path, simple=True, separator='.')
      ),
      self.abstract(),
    )

  def decode(
    self,
    data: bytes,
    expected: payload.Header,
    verify: payload.Verify,
  ) -> payload.Payload:
    """Decodes a payload; raises `payload.PayloadError`."""
    return payload.decode(
      data, expected, self.abstract_params, self.spec, verify
    )

  @property
  def most_entries(self) -> int:
    """The most payloads that count in a round."""
    return self._config.gauntlet.contributors

  def weigh(self, header: payload.Header) -> weight.Weight:
    """Returns the weight of a message, from the header of its payload."""
    most = assignment.per_miner(self._config)
    return weight.weigh(self.method.weight, header.sequences, most)

  def norms(self, message: ct.Message) -> np.ndarray:
    """Returns the norm of each tensor of a message."""
    return self.outer_step.norms([message])[0]

  def reopen(self, data: bytes) -> ct.Message:
    """Returns the message of a payload that was decoded, packed (lazy.py)."""
    return lazy.reopen(data, self.abstract_params, self.spec)

  def apply_round(
    self,
    shared: SharedState,
    messages: Mapping[int, ct.Message],
    consume: bool = False,
    weights: Mapping[int, weight.Weight] = EQUAL_WEIGHTS,
    norms: Mapping[int, np.ndarray] | None = None,
    keep_params: bool = False,
  ) -> tuple[SharedState, float]:
    """Returns the state after a round, and the L2 norm of the aggregated delta.

    Args:
      shared: the state at the start of the round.
      messages: the messages that count, by uid. Without any the state stays as
        it is.
      consume: True if `shared` is not needed any more, so that a large model
        can be updated in place.
      weights: weights by uid; a message without one has full weight.
      norms: the `norms` of each message; None: they are computed here.
      keep_params: True if the parameters in `shared` are needed even so.
    """
    if not messages:
      return shared, 0.0
    ordered = [messages[uid] for uid in sorted(messages)]
    weighed = [weights.get(uid, weight.Weight()) for uid in sorted(messages)]
    if placement.is_offloaded(shared):  # loaded copies
      consume, keep_params = True, False
    if norms is None:
      norms_RxP = self.outer_step.norms(ordered)
    else:
      norms_RxP = np.stack([norms[uid] for uid in sorted(messages)])
    steps = np.asarray(shared.steps, np.float32)
    factors = self.factors(norms_RxP, weighed, steps)
    here = self.host.load(shared)
    new = self.outer_step.apply_sum(
      here.params, here.outer, ordered, *factors[:3], consume, keep_params
    )
    steps = self._place(factors.steps)
    after = self.host.offload(SharedState(new.params, new.outer, steps))
    return after, new.delta_norm

  def factors(
    self,
    norms_RxP: np.ndarray,
    weights: Sequence[weight.Weight],
    steps: np.ndarray,
  ) -> round_factors.RoundFactors:
    """Returns the factors of a round; see `round_factors.compute`."""
    is_bounded = self._config.optim.method not in _UNBOUNDED
    return round_factors.compute(
      norms_RxP, weights, self.method.clip, steps, is_bounded
    )


def named_leaves(state: SharedState) -> dict[str, ct.Array]:
  """Returns the tensors of a state by name, such as `params.embedding`.

  The names increase, so that all nodes hash and publish in one order.
  """
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  return dict(sorted(leaves.items()))


def state_fingerprint(pieces: Mapping[str, Sequence[bytes]]) -> str:
  """Returns the digest by which nodes compare states.

  It covers the outer optimizer as well as the parameters. It is a hash of the
  digests of pieces, so that a list of pieces can be verified before any of
  them is there.

  Args:
    pieces: the `pieces.piece_digests` of each tensor, by its name in
      `named_leaves`.
  """
  digest = hashlib.blake2b(digest_size=16, person=b'covenant.state')
  for name in sorted(pieces):
    count = len(pieces[name]).to_bytes(4, 'little')
    digest.update(name.encode() + b'\0' + count + b''.join(pieces[name]))
  return digest.hexdigest()


def amended_fingerprint(fingerprint: str, amendments: Sequence[bytes]) -> str:
  """Returns the fingerprint of a state of a run with amendments.

  Args:
    fingerprint: of the state alone.
    amendments: the digests of the amendments that were adopted before it.
  """
  if not amendments:
    return fingerprint
  digest = hashlib.blake2b(digest_size=16, person=b'covenant.amend')
  digest.update(fingerprint.encode() + b''.join(amendments))
  return digest.hexdigest()


def fingerprint(params: ct.Params, piece_bytes: int = 1 << 26) -> str:
  """Returns a digest of all bits of the parameters.

  It covers the bytes of small leaves, and the digests of the pieces of large
  ones.
  """
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    if leaf.nbytes <= piece_bytes:
      digest.update(host_copy.whole(leaf).reshape(-1).view(np.uint8).data)
    else:
      for of_piece in pieces_lib.piece_digests(leaf, piece_bytes):
        digest.update(of_piece)
  return digest.hexdigest()
