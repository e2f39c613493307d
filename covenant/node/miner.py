"""A miner's part of a round: train on what was assigned, send what matters.

One `Miner` holds compiled functions and no state: a process runs one miner
through it, the emulator runs many, each with its own `Private` state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import config as config_lib
from covenant.data import assignment
from covenant.data import tokens as tokens_lib
from covenant.models import loss as loss_lib
from covenant.node import replica as replica_lib
from covenant.optim import sparseloco
from covenant.wire import payload


class Diverged(RuntimeError):
  """Training produced a number that is not one."""


class Private(NamedTuple):
  """What only one miner knows, and keeps between rounds."""

  inner: Any  # AdamW moments; None where the gradient is sent
  error: Any  # error feedback; None without


class Contribution(NamedTuple):
  payload: bytes
  loss: float  # mean training loss over the round, nats a token
  tokens: int  # trained in this round
  error_norm: float  # L2 norm of the error feedback left behind


class Miner:
  """Trains from the shared parameters, compiled once for all miners."""

  def __init__(
    self,
    config: config_lib.Config,
    replica: replica_lib.Replica,
    data: tokens_lib.TokenData,
  ):
    self._config = config
    self._replica = replica
    self._split = data.train
    self._step = jax.jit(self._inner_step, donate_argnames=('params', 'state'))
    self._gradient = jax.jit(self._loss_and_gradient)
    self._compress = jax.jit(self._compress_round, donate_argnames=('error',))

  def init(self, params: Any) -> Private:
    """The state of a miner that has just joined."""
    method = self._replica.method
    return Private(
      inner=method.inner.init(params) if method.inner else None,
      error=(
        None if method.error_decay is None else sparseloco.init_error(params)
      ),
    )

  def contribute(
    self, params: Any, private: Private, uid: int, round_index: int
  ) -> tuple[Contribution, Private]:
    """One round of miner `uid`; consumes `private`.

    Args:
      params: the shared parameters at the start of the round.
      private: the miner's own state.
      uid: who it is: decides the data.
      round_index: which round.

    Raises:
      Diverged: a loss is not finite; names the uid, the round and the step.
    """
    optim, context = self._config.optim, self._config.data.context
    ids_HxB = assignment.assign(
      self._config.seed,
      uid,
      round_index,
      optim.inner_steps * optim.inner.batch_size,
      self._split.num_sequences(context),
    ).reshape(optim.inner_steps, optim.inner.batch_size)
    batches = tokens_lib.prefetch(self._split, ids_HxB, context)
    losses = []
    if self._replica.method.inner is None:
      nats, delta = self._gradient(params, next(batches))
      losses.append(nats)
      inner = None
    else:
      # The first step donates its parameters: it must not take the shared.
      local, inner = jax.tree.map(jnp.copy, params), private.inner
      first = round_index * optim.inner_steps
      for step, tokens_BxL1 in enumerate(batches, start=first):
        local, inner, nats = self._step(
          local, inner, tokens_BxL1, np.int32(step)
        )
        losses.append(nats)
      delta = local
    message, error, error_norm = self._compress(params, delta, private.error)
    losses = np.asarray(jax.device_get(losses))
    if not np.isfinite(losses).all():
      bad = int(np.argmin(np.isfinite(losses)))
      raise Diverged(
        f'miner {uid}, round {round_index}: the loss is {losses[bad]} at inner '
        f'step {bad}; lower optim.inner.learning_rate'
      )
    header = payload.Header(self._replica.run, round_index, uid)
    data = payload.encode(
      header,
      jax.device_get(message),
      self._replica.like,
      self._replica.spec,
    )
    contribution = Contribution(
      payload=data,
      loss=float(losses.mean()),
      tokens=ids_HxB.size * context,
      error_norm=float(error_norm),
    )
    return contribution, Private(inner, error)

  def _loss_and_gradient(
    self, params: Any, tokens_BxL1: jax.Array
  ) -> tuple[jax.Array, Any]:
    loss, gradient = loss_lib.next_token_gradient(
      self._config.model,
      params,
      tokens_BxL1,
      self._config.optim.inner.microbatch_size or None,
    )
    return loss.nats, gradient

  def _inner_step(
    self, params: Any, state: Any, tokens_BxL1: jax.Array, step: jax.Array
  ) -> tuple[Any, Any, jax.Array]:
    method = self._replica.method
    assert method.inner is not None
    nats, gradient = self._loss_and_gradient(params, tokens_BxL1)
    updates, state = method.inner.update(gradient, state, params)
    rate = method.schedule(step)
    updates = jax.tree.map(lambda u: rate * u, updates)
    return optax.apply_updates(params, updates), state, nats

  def _compress_round(
    self, params: Any, result: Any, error: Any
  ) -> tuple[Any, Any, jax.Array]:
    """From where a miner's round ended (or its gradient) to its message."""
    method = self._replica.method
    delta = result
    if method.inner is not None:
      delta = sparseloco.pseudo_gradient(params, result)
    message, error = sparseloco.compress(
      delta, error, method.compression, method.error_decay
    )
    norm = jnp.float32(0) if error is None else optax.tree.norm(error)
    return message, error, norm
