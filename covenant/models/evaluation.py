"""Losses without gradients, on the mesh of a node.

Sequences are spread over all devices, a microbatch of each device at a time.
Batches that do not divide are filled up with sequences without targets. Without
a mesh and microbatches it is the loss of `loss.py`, in one piece.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.models import llama
from covenant.models import loss as loss_lib
from covenant.models import sharding

_Sums: TypeAlias = tuple[jax.Array, jax.Array]


class SequenceLosses:
  """The nats of the parts of some sequences; compiled once per number.

  Args:
    config: the config of the run.
    mesh: the devices of the parameters; None is one device.
    parts: equal stretches of positions, see `loss.sequence_nats`.

  Raises:
    ConfigError: the model cannot be sharded so.
  """

  def __init__(
    self,
    config: config_lib.Config,
    mesh: sharding.AnyMesh | None = None,
    parts: int = 1,
  ):
    self.devices = devices(mesh)
    self._mesh = mesh

    def nats(params: ct.Params, tokens_BxL1: jax.Array) -> jax.Array:
      return _in_microbatches(
        lambda x: loss_lib.sequence_nats(config.decoder, params, x, parts),
        tokens_BxL1,
        config.optim.inner.microbatch_size,
      ).reshape(-1, parts)

    self.program = _sharded(config, mesh, nats, whole=False)

  def __call__(
    self, params: ct.Params, tokens_NxL1: np.ndarray | jax.Array
  ) -> ct.Array:
    """Returns float32 [N, parts]; params are sharded over the mesh."""
    nats_NxP = self.program(params, spread_out(tokens_NxL1, self._mesh))
    if self._mesh is None:
      return nats_NxP
    if not nats_NxP.is_fully_addressable:  # other processes have some of them
      whole = jax.NamedSharding(self._mesh, jax.P())
      nats_NxP = jax.device_put(nats_NxP, whole)
    return np.asarray(nats_NxP)[: tokens_NxL1.shape[0]]


class BatchLoss:
  """The mean nats per token of the targets of a batch.

  Args:
    config: the config of the run.
    mesh: the devices of the parameters; None is one device.

  Raises:
    ConfigError: the model cannot be sharded so.
  """

  def __init__(
    self, config: config_lib.Config, mesh: sharding.AnyMesh | None = None
  ):
    self._mesh = mesh

    def nats(params: ct.Params, tokens_BxL1: jax.Array) -> jax.Array:
      def sums(tokens_MxL1: jax.Array) -> _Sums:
        loss = loss_lib.next_token_loss(config.decoder, params, tokens_MxL1)
        return loss.nats, loss.tokens.astype(jnp.float32)

      size = config.optim.inner.microbatch_size
      nats, tokens = _in_microbatches(sums, tokens_BxL1, size)
      if not nats.ndim and mesh is None:
        return nats
      total = sharding.total(jnp.sum(nats * tokens), 'batch')
      count = sharding.total(jnp.sum(tokens), 'batch')
      return total / jnp.maximum(count, 1)

    self.program = _sharded(config, mesh, nats, whole=True)

  def __call__(
    self, params: ct.Params, tokens_BxL1: np.ndarray | jax.Array
  ) -> jax.Array:
    """Returns a float32 scalar; params are sharded over the mesh."""
    return self.program(params, spread_out(tokens_BxL1, self._mesh))


def devices(mesh: sharding.AnyMesh | None) -> int:
  """Returns the number of devices that share the sequences of a batch."""
  if mesh is None:
    return 1
  return math.prod(mesh.shape[axis] for axis in sharding.split('batch', mesh))


def spread_out(
  tokens_NxL1: np.ndarray | jax.Array, mesh: sharding.AnyMesh | None
) -> ct.Tokens:
  """Returns tokens as all devices of a mesh share them, filled up with -1."""
  if mesh is None:
    return tokens_NxL1
  assert isinstance(mesh, jax.sharding.Mesh)
  tokens = np.asarray(tokens_NxL1)
  missing = -tokens.shape[0] % devices(mesh)
  tokens = np.pad(tokens, ((0, missing), (0, 0)), constant_values=-1)
  where = jax.NamedSharding(mesh, sharding.batch_spec(mesh))
  return jax.make_array_from_callback(
    tokens.shape, where, lambda index: tokens[index]
  )


def _in_microbatches(
  f: Callable[[jax.Array], ct.PyTree], tokens_BxL1: jax.Array, size: int
) -> ct.PyTree:
  """Returns `f` of all sequences, or of each microbatch if they divide."""
  rows = tokens_BxL1.shape[0]
  if not 0 < size < rows or rows % size:
    return f(tokens_BxL1)
  return jax.lax.map(f, tokens_BxL1.reshape(-1, size, tokens_BxL1.shape[1]))


def _sharded(
  config: config_lib.Config,
  mesh: sharding.AnyMesh | None,
  f: Callable[[ct.Params, jax.Array], jax.Array],
  whole: bool,
) -> jax.stages.Wrapped:
  """Returns the jitted `f` of all devices; its result is whole, or a batch."""
  if mesh is None:
    return jax.jit(f)
  sharding.check(config.model, (1, 1), mesh)
  batch = sharding.batch_spec(mesh)
  specs = sharding.specs(llama.abstract(config.model), mesh)
  return jax.jit(
    jax.shard_map(
      f,
      mesh=mesh,
      in_specs=(specs, batch),
      out_specs=jax.P() if whole else batch,
    )
  )
