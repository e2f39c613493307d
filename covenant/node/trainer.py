"""What a miner computes in a round: train on its data, send what matters.

One `Trainer` holds compiled functions and no state: a process runs one miner
through it, the emulator runs many, each with its own `Private` state.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covenant import config as config_lib
from covenant.data import assignment
from covenant.data import receipt as receipt_lib
from covenant.data import tokens as tokens_lib
from covenant.models import loss as loss_lib
from covenant.node import replica as replica_lib
from covenant.optim import inner as inner_lib
from covenant.optim import sparseloco
from covenant.wire import payload


class Diverged(RuntimeError):
  """Training produced a number that is not one."""


class Private(NamedTuple):
  """What only one miner knows, and keeps between rounds."""

  joined: np.int32  # the first round it trained in
  inner: Any  # AdamW moments; None where the gradient is sent
  error: Any  # error feedback; None without


class Task(NamedTuple):
  """Who trains in which round, on what."""

  uid: int
  round: int
  seed: int | bytes  # of the round's assignment: a block hash
  root: bytes  # of the history that led to the parameters


class Work(NamedTuple):
  """What a round of training led to."""

  message: Any
  receipt: bytes  # of what it was trained on
  sequences: int
  loss: float  # mean training loss over the round, nats a token
  error_norm: float  # L2 norm of the error feedback left behind


class Contribution(NamedTuple):
  payload: bytes
  loss: float  # mean training loss over the round, nats a token
  tokens: int  # trained in this round
  error_norm: float  # L2 norm of the error feedback left behind


def assigned(
  config: config_lib.Config, task: Task, split: tokens_lib.Split
) -> np.ndarray:
  """The ids of the sequences of a task, in order of training: int64 [H, B]."""
  optim = config.optim
  return assignment.assign(
    task.seed,
    task.uid,
    task.round,
    optim.inner_steps * optim.inner.batch_size,
    split.num_sequences(config.data.context),
  ).reshape(optim.inner_steps, optim.inner.batch_size)


class Trainer:
  """Trains from the shared parameters, compiled once for all miners.

  Args:
    config: of the run.
    replica: of the run.
    data: to train on.
    mesh: the devices that share the sequences of a batch; all hold the whole
      of the parameters. Several processes may own them, if all call alike.
      The sum of their gradients is rounded otherwise than that of one device.
      None: the default device alone.

  Raises:
    ConfigError: the batch cannot be shared by so many.
  """

  def __init__(
    self,
    config: config_lib.Config,
    replica: replica_lib.Replica,
    data: tokens_lib.TokenData,
    mesh: jax.sharding.Mesh | None = None,
  ):
    self._config = config
    self._replica = replica
    self.split = data.train
    self._mesh = mesh
    self._microbatch = _microbatch(config.optim.inner, mesh.size if mesh else 1)
    # Said, not left to XLA: every device ends a step with all parameters.
    placed: dict[str, Any] = {'out_shardings': _whole(mesh)} if mesh else {}
    self._step = jax.jit(
      self._inner_step, donate_argnames=('params', 'state'), **placed
    )
    self._gradient = jax.jit(self._loss_and_gradient, **placed)
    self._compress = jax.jit(self._compress_round, donate_argnames=('error',))

  def init(self, params: Any, round_index: int = 0) -> Private:
    """The state of a miner that joins in a round."""
    method = self._replica.method
    return Private(
      joined=np.int32(round_index),
      inner=method.inner.init(params) if method.inner else None,
      error=(
        None if method.error_decay is None else sparseloco.init_error(params)
      ),
    )

  def contribute(
    self, params: Any, private: Private, task: Task, sign: payload.Sign
  ) -> tuple[Contribution, Private]:
    """One round of a miner; consumes `private`.

    Args:
      params: the shared parameters at the start of the round.
      private: the miner's own state.
      task: who it is, and what it trains on.
      sign: by its hotkey.

    Raises:
      Diverged: a loss is not finite; names the uid, the round and the step.
    """
    work, private = self.work(params, private, task, self.batches(task))
    return self.seal(work, task, sign), private

  def batches(self, task: Task) -> Iterator[np.ndarray]:
    """The tokens of a task, in order of training: int32 [B, L + 1] each."""
    ids_HxB = assigned(self._config, task, self.split)
    return tokens_lib.prefetch(self.split, ids_HxB, self._config.data.context)

  def work(
    self,
    params: Any,
    private: Private,
    task: Task,
    batches: Iterable[np.ndarray],
  ) -> tuple[Work, Private]:
    """Trains on `batches`, one a step; otherwise as `contribute`."""
    optim = self._config.optim
    losses, receipt = [], receipt_lib.Receipt()
    if self._replica.method.inner is None:
      (tokens_BxL1,) = batches
      receipt.add(tokens_BxL1)
      nats, delta = self._gradient(
        self._spread(params), self._share(tokens_BxL1)
      )
      losses.append(nats)
      inner = None
    else:
      # The first step donates its parameters: it must not take the shared.
      local = self._spread(jax.tree.map(jnp.copy, params))
      inner = self._spread(private.inner)
      first = task.round * optim.inner_steps
      joined = private.joined * np.int32(optim.inner_steps)
      for step, tokens_BxL1 in enumerate(batches, start=first):
        receipt.add(tokens_BxL1)
        local, inner, nats = self._step(
          local, inner, self._share(tokens_BxL1), np.int32(step), joined
        )
        losses.append(nats)
      delta = local
    delta, inner = self._gathered(delta), self._gathered(inner)
    message, error, error_norm = self._compress(params, delta, private.error)
    losses = np.asarray(jax.device_get(losses))
    if not np.isfinite(losses).all():
      bad = int(np.argmin(np.isfinite(losses)))
      raise Diverged(
        f'miner {task.uid}, round {task.round}: the loss is {losses[bad]} at '
        f'inner step {bad}; lower optim.inner.learning_rate'
      )
    work = Work(
      jax.device_get(message),
      receipt.digest(),
      receipt.sequences,
      loss=float(losses.mean()),
      error_norm=float(error_norm),
    )
    return work, Private(private.joined, inner, error)

  def seal(self, work: Work, task: Task, sign: payload.Sign) -> Contribution:
    """What a miner sends of its work, signed."""
    header = payload.Header(
      self._replica.run,
      task.round,
      task.uid,
      task.root[:16],
      work.receipt,
      work.sequences,
    )
    replica = self._replica
    return Contribution(
      payload.encode(header, work.message, replica.like, replica.spec, sign),
      work.loss,
      work.sequences * self._config.data.context,
      work.error_norm,
    )

  def _loss_and_gradient(
    self, params: Any, tokens_BxL1: jax.Array
  ) -> tuple[jax.Array, Any]:
    gradient = functools.partial(
      loss_lib.next_token_gradient,
      self._config.model,
      microbatch=self._microbatch,
    )
    if self._mesh is None:
      loss, grads = gradient(params, tokens_BxL1)
      return loss.nats, grads
    axes = self._mesh.axis_names

    def share(params: Any, tokens_bxL1: jax.Array) -> tuple[jax.Array, Any]:
      """The same means, from the share of the batch of each device."""
      # Else the gradient of each microbatch would be summed over devices.
      params = jax.lax.pcast(params, axes, to='varying')
      loss, grads = gradient(params, tokens_bxL1)
      tokens = jax.lax.psum(loss.tokens, axes)
      divisor = jnp.maximum(tokens, 1).astype(jnp.float32)
      weight = loss.tokens.astype(jnp.float32) / divisor
      mine = jax.tree.map(lambda x: x * weight, (loss.nats, grads))
      return jax.lax.psum(mine, axes)

    everywhere, split = jax.P(), jax.P(axes)
    return jax.shard_map(
      share,
      mesh=self._mesh,
      in_specs=(everywhere, split),
      out_specs=everywhere,
    )(params, tokens_BxL1)

  def _spread(self, tree: Any) -> Any:
    """What lies on one device, on all of the mesh; may keep its buffers."""
    if self._mesh is None:
      return tree
    devices, whole = self._mesh.local_devices, _whole(self._mesh)
    return jax.tree.map(
      lambda x: jax.make_array_from_single_device_arrays(
        x.shape, whole, [jax.device_put(x, device) for device in devices]
      ),
      tree,
    )

  def _share(self, tokens_BxL1: np.ndarray) -> Any:
    """A batch as the devices of the mesh take it."""
    if self._mesh is None:
      return tokens_BxL1
    split = jax.NamedSharding(self._mesh, jax.P(self._mesh.axis_names))
    return jax.make_array_from_callback(
      tokens_BxL1.shape, split, lambda index: tokens_BxL1[index]
    )

  def _gathered(self, tree: Any) -> Any:
    """What all devices hold alike, on the first of this process."""
    if self._mesh is None:
      return tree
    return jax.tree.map(lambda x: x.addressable_data(0), tree)

  def _inner_step(
    self,
    params: Any,
    state: Any,
    tokens_BxL1: jax.Array,
    step: jax.Array,
    joined: jax.Array,
  ) -> tuple[Any, Any, jax.Array]:
    method = self._replica.method
    assert method.inner is not None
    nats, gradient = self._loss_and_gradient(params, tokens_BxL1)
    updates, state = method.inner.update(gradient, state, params)
    rate = method.schedule(step) * inner_lib.rejoin_factor(
      self._config.optim.inner, step, joined
    )
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


def _microbatch(inner: config_lib.Inner, devices: int) -> int | None:
  """Sequences that a device has in flight at once; None is all of its own."""
  own, rest = divmod(inner.batch_size, devices)
  if rest:
    raise config_lib.ConfigError(
      f'optim.inner.batch_size: expected a multiple of {devices}, the devices '
      f'of this miner, got {inner.batch_size}'
    )
  if not 0 < inner.microbatch_size < own:
    return None
  if own % inner.microbatch_size:
    raise config_lib.ConfigError(
      f'optim.inner.microbatch_size: expected a divisor of {own}, the '
      f'sequences of a batch on each of {devices} devices, got '
      f'{inner.microbatch_size}'
    )
  return inner.microbatch_size


def _whole(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
  """Everything on every device."""
  return jax.NamedSharding(mesh, jax.P())
