"""The state that every node of a run holds alike, and how a round moves it.

Miners, validators and the emulator all advance through this one function
from the same payload bytes, in uid order: that is why they stay identical.
"""

import collections
import functools
import hashlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import config as config_lib
from covenant.data import assignment
from covenant.models import hf
from covenant.models import llama
from covenant.models import sharding
from covenant.optim import method as method_lib
from covenant.optim import receiver as receiver_lib
from covenant.optim import weight
from covenant.train import placement
from covenant.wire import payload

_PIECE_BYTES = 1 << 26  # of a leaf, that have a digest of their own
_PIECES = 32  # on the host at once
_ALIKE: Mapping[int, weight.Weight] = types.MappingProxyType({})


class SharedState(NamedTuple):
  """Equal, bit for bit, on every node after the same round."""

  params: Any  # theta
  outer: optax.OptState


class SharedModel:
  """The compiled rules by which the shared state of one run advances.

  Args:
    config: of the run.
    mesh: whose devices share the parameters (covenant/models/sharding.py);
      None is the default device. The state is the same, bit for bit.
    offload: whether the state waits in host memory between rounds.

  Raises:
    ConfigError: tensors cannot be compressed so, or not on this mesh.
  """

  def __init__(
    self,
    config: config_lib.Config,
    mesh: jax.sharding.Mesh | None = None,
    offload: bool = False,
  ):
    self.method = method_lib.make(config)
    self.abstract_params = jax.eval_shape(
      lambda: llama.init(config.model, jax.random.key(0))
    )
    compression = config.optim.compression
    self.mesh, self.specs = mesh, None
    if mesh is not None:
      sharding.check(config.model, compression.block, mesh)
      self.specs = sharding.specs(self.abstract_params, mesh)
    try:
      self.spec = payload.make_spec(
        self.abstract_params, self.method.compression, compression.codec
      )
      self.receiver = receiver_lib.Receiver(
        self.abstract_params,
        self.method,
        mesh,
        self.specs,
        # It clips the norm of all tensors together.
        per_leaf=config.optim.method != 'ddp',
      )
    except ValueError as e:
      raise config_lib.ConfigError(f'optim.compression: {e}') from e
    self.run = payload.run_id(config_lib.identity(config))
    self._config = config
    self._last: tuple[SharedState, str] | None = None
    device = (jax.local_devices() if mesh is None else mesh.local_devices)[0]
    self.parking = placement.Parking(device, offload)

  def fingerprint(self, shared: SharedState) -> str:
    """As the function of this name; made once for what was asked last."""
    if self._last is None or self._last[0] is not shared:
      found = fingerprint(shared.params, fetch=self.parking.fetch)
      self._last = shared, found
    return self._last[1]

  def init(self) -> SharedState:
    """The state before the first round, a function of the run's seed.

    Or of `config.pretrained`. On a mesh no device ever holds the whole.

    Raises:
      ConfigError: there is no such model in that folder.
    """
    if self._config.pretrained:
      params = self._pretrained()
      return self.parking.park(
        SharedState(params, self.method.outer.init(params))
      )
    key = jax.random.key(self._config.seed)
    init = functools.partial(llama.init, self._config.model)
    placed: dict[str, Any] = {}
    if self.mesh is not None:
      placed['out_shardings'] = sharding.shardings(
        self.abstract_params, self.mesh
      )
    params = jax.jit(init, **placed)(key)
    return self.parking.park(
      SharedState(params, self.method.outer.init(params))
    )

  def abstract(self) -> SharedState:
    """The shapes of the state."""
    return SharedState(
      self.abstract_params,
      jax.eval_shape(self.method.outer.init, self.abstract_params),
    )

  def _pretrained(self) -> Any:
    params = hf.load(self._config.pretrained, self._config.model)
    if self.mesh is None:
      return jax.tree.map(jnp.array, params)
    return jax.device_put(
      params, sharding.shardings(self.abstract_params, self.mesh)
    )

  def decode(
    self,
    data: bytes,
    expected: payload.Header,
    verify: payload.Verify,
    older: Sequence[bytes] = (),
  ) -> payload.Payload:
    """The content of a payload; raises `payload.PayloadError`."""
    return payload.decode(
      data, expected, self.abstract_params, self.spec, verify, older
    )

  @property
  def most_stale(self) -> int:
    """By how many rounds the parameters of a payload may be older."""
    return self._config.optim.staleness

  def weigh(self, header: payload.Header) -> weight.Weight:
    """How much the message of a payload counts, by what its header says."""
    most = assignment.per_miner(self._config)
    discount = self._config.optim.staleness_discount**header.staleness
    return weight.weigh(self.method.weight, header.sequences, most, discount)

  def apply_round(
    self,
    shared: SharedState,
    messages: Mapping[int, Any],
    consume: bool = False,
    weights: Mapping[int, weight.Weight] = _ALIKE,
  ) -> tuple[SharedState, float]:
    """The shared state after a round, and the L2 norm of the aggregated delta.

    Args:
      shared: the state at the start of the round.
      messages: uid -> message, of everybody who counts. With none the state
        does not move.
      consume: whether `shared` is of no more use, so that a large model can be
        moved in place.
      weights: uid -> weight; who has none counts whole.
    """
    if not messages:
      return shared, 0.0
    ordered = [messages[uid] for uid in sorted(messages)]
    weighed = [weights.get(uid, weight.Weight()) for uid in sorted(messages)]
    consume = consume or placement.is_parked(shared)  # what is fetched is ours
    here = self.parking.fetch(shared)
    moved = self.receiver.advance(
      here.params, here.outer, ordered, consume, weighed
    )
    after = self.parking.park(SharedState(moved.params, moved.outer))
    return after, moved.delta_norm


def fingerprint(
  params: Any,
  piece_bytes: int = _PIECE_BYTES,
  fetch: Callable[[Any], Any] = lambda leaf: leaf,
) -> str:
  """A digest of all parameters' bytes: equal if and only if they are.

  Of a large leaf it takes digests of its pieces instead, which all cores make
  at once: one alone would need minutes for a node of 72 billion parameters.
  `fetch` brings each leaf to where it can be sliced.
  """
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    if leaf.nbytes <= piece_bytes:
      digest.update(np.asarray(leaf).reshape(-1).view(np.uint8).data)
    else:
      for of_piece in _piece_digests(fetch(leaf), piece_bytes):
        digest.update(of_piece)
  return digest.hexdigest()


def _piece_digests(leaf: Any, piece_bytes: int) -> Iterator[bytes]:
  """Of every `piece_bytes` of a leaf's bytes; the last may be shorter."""

  def digest(data: np.ndarray) -> bytes:
    return hashlib.blake2b(data.data, digest_size=32).digest()

  with futures.ThreadPoolExecutor() as pool:
    waiting = collections.deque[futures.Future[bytes]]()
    left = np.zeros(0, np.uint8)
    for piece in stream(leaf, piece_bytes // leaf.dtype.itemsize):
      left = np.concatenate([left, piece.reshape(-1).view(np.uint8)])
      while left.size >= piece_bytes:
        waiting.append(pool.submit(digest, left[:piece_bytes]))
        left = left[piece_bytes:]
        if len(waiting) > _PIECES:
          yield waiting.popleft().result()
    if left.size:
      waiting.append(pool.submit(digest, left))
    while waiting:
      yield waiting.popleft().result()


def stream(x: Any, budget: int) -> Iterator[np.ndarray]:
  """A leaf brought to the host piece by piece, in row-major order.

  A piece has up to `budget` elements, or one index of the first axis. Of a
  sharded array no device gets more than it has.
  """
  if not isinstance(x, jax.Array) or x.size <= budget:
    yield np.asarray(x)
    return
  n = max(budget * x.shape[0] // x.size, 1)
  for first in range(0, x.shape[0], n):
    last = min(first + n, x.shape[0])
    piece = np.empty((last - first, *x.shape[1:]), x.dtype)
    for shard in x.addressable_shards:
      start, stop, _ = shard.index[0].indices(x.shape[0])
      low, high = max(start, first), min(stop, last)
      if shard.replica_id == 0 and low < high:
        here = jax.lax.dynamic_slice_in_dim(shard.data, low - start, high - low)
        piece[low - first : high - first, *shard.index[1:]] = here
    yield piece
