"""The state that every node of a run holds alike, and how a round moves it.

Miners, validators and the emulator all advance through this one function
from the same payload bytes, in uid order: that is why they stay identical.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import config as config_lib
from covenant.models import llama
from covenant.optim import aggregate
from covenant.optim import method as method_lib
from covenant.optim import outer as outer_lib
from covenant.wire import payload


class Shared(NamedTuple):
  """Equal, bit for bit, on every node after the same round."""

  params: Any  # theta
  outer: optax.OptState


class Replica:
  """The compiled rules by which the shared state of one run advances."""

  def __init__(self, config: config_lib.Config):
    self.method = method_lib.make(config)
    self.like = jax.eval_shape(
      lambda: llama.init(config.model, jax.random.key(0))
    )
    codec = config.optim.compression.codec
    try:
      self.spec = payload.make_spec(self.like, self.method.compression, codec)
    except ValueError as e:
      raise config_lib.ConfigError(f'optim.compression: {e}') from e
    self.run = payload.run_id(config_lib.identity(config))
    self._config = config
    self._last: tuple[Shared, str] | None = None
    rules = {'like': self.like, 'compression': self.method.compression}
    self._norms = jax.jit(functools.partial(aggregate.message_norms, **rules))
    self._add = jax.jit(
      functools.partial(aggregate.add, **rules, defence=self.method.defence),
      donate_argnames=('sums',),
    )
    self._step = jax.jit(self._outer_step)

  def fingerprint(self, shared: Shared) -> str:
    """As the function of this name; made once for what was asked last."""
    if self._last is None or self._last[0] is not shared:
      self._last = (shared, fingerprint(shared.params))
    return self._last[1]

  def init(self) -> Shared:
    """The state before the first round, a function of the run's seed."""
    key = jax.random.key(self._config.seed)
    params = jax.jit(functools.partial(llama.init, self._config.model))(key)
    return Shared(params, self.method.outer.init(params))

  def decode(
    self, data: bytes, expected: payload.Header, verify: payload.Verify
  ) -> payload.Payload:
    """The content of a payload; raises `payload.Refused`."""
    return payload.decode(data, expected, self.like, self.spec, verify)

  def advance(
    self, shared: Shared, messages: Mapping[int, Any]
  ) -> tuple[Shared, float]:
    """The shared state after a round, and the L2 norm of the aggregated delta.

    Args:
      shared: the state at the start of the round.
      messages: uid -> message, of everybody who counts. With none the state
        does not move.
    """
    if not messages:
      return shared, 0.0
    ordered = [messages[uid] for uid in sorted(messages)]
    norms_RxP = jnp.stack([self._norms(m) for m in ordered])
    factors_RxP = aggregate.clip_factors(norms_RxP, self.method.clip)
    sums = aggregate.start(
      self.like, self.method.compression, self.method.defence
    )
    for message, factors_P in zip(ordered, factors_RxP, strict=True):
      sums = self._add(sums, message, factors_P)
    peers = jnp.float32(len(ordered))
    shared, delta_norm = self._step(shared, sums, peers)
    return shared, float(delta_norm)

  def _outer_step(
    self, shared: Shared, sums: Any, peers: jax.Array
  ) -> tuple[Shared, jax.Array]:
    method = self.method
    delta = aggregate.mean(
      sums,
      peers,
      self.like,
      method.compression,
      method.mean_over,
      method.defence,
    )
    params, outer = outer_lib.outer_update(
      self.method.outer, delta, shared.outer, shared.params
    )
    return Shared(params, outer), optax.tree.norm(delta)


def fingerprint(params: Any) -> str:
  """A digest of all parameters' bytes: equal if and only if they are."""
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()
