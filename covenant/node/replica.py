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


class Advance(NamedTuple):
  """What one round did to the shared state."""

  delta_norm: float  # L2 norm of the aggregated delta
  refused: Mapping[int, payload.Refused]  # by uid


class Replica:
  """The compiled rules by which the shared state of one run advances."""

  def __init__(self, config: config_lib.Config):
    self.method = method_lib.make(config)
    self.like = jax.eval_shape(
      lambda: llama.init(config.model, jax.random.key(0))
    )
    self.spec = payload.make_spec(self.like, self.method.compression)
    self.run = payload.run_id(config_lib.to_json(config))
    self._config = config
    rules = {'like': self.like, 'compression': self.method.compression}
    self._norms = jax.jit(functools.partial(aggregate.message_norms, **rules))
    self._add = jax.jit(
      functools.partial(aggregate.add, **rules), donate_argnames=('sums',)
    )
    self._step = jax.jit(self._outer_step)

  def init(self) -> Shared:
    """The state before the first round, a function of the run's seed."""
    key = jax.random.key(self._config.seed)
    params = jax.jit(functools.partial(llama.init, self._config.model))(key)
    return Shared(params, self.method.outer.init(params))

  def advance(
    self, shared: Shared, payloads: Mapping[int, bytes], round_index: int
  ) -> tuple[Shared, Advance]:
    """The shared state after a round.

    Args:
      shared: the state at the start of the round.
      payloads: uid -> bytes, of everybody who counts. One that is refused
        counts for nothing and disturbs no other; with none left, the state
        does not move.
      round_index: the round that the payloads must be of.
    """
    messages, refused = {}, {}
    for uid in sorted(payloads):
      expected = payload.Header(self.run, round_index, uid)
      try:
        messages[uid] = payload.decode(
          payloads[uid], expected, self.like, self.spec
        )
      except payload.Refused as e:
        refused[uid] = e
    if not messages:
      return shared, Advance(0.0, refused)
    norms_RxP = jnp.stack([self._norms(m) for m in messages.values()])
    factors_RxP = aggregate.clip_factors(norms_RxP, self.method.clip)
    sums = aggregate.start(self.like, self.method.compression)
    for message, factors_P in zip(messages.values(), factors_RxP, strict=True):
      sums = self._add(sums, message, factors_P)
    peers = jnp.float32(len(messages))
    shared, delta_norm = self._step(shared, sums, peers)
    return shared, Advance(float(delta_norm), refused)

  def _outer_step(
    self, shared: Shared, sums: Any, peers: jax.Array
  ) -> tuple[Shared, jax.Array]:
    delta = aggregate.mean(
      sums, peers, self.like, self.method.compression, self.method.mean_over
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
