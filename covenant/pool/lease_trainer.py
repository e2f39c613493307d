"""Training of a lease, by its worker and again by an audit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant import typing as ct
from covenant.optim import sparseloco
from covenant.pool import deltas as deltas_lib
from covenant.pool import pool as pool_lib
from covenant.train import local as local_lib
from covenant.train import shared_state as shared_state_lib
from covenant.train import step as step_lib
from covenant.wire import payload


class LeaseTrainer:
  """The compiled steps of leases, one program per batch size.

  Args:
    config: the config of the run.
    shared_model: the shared model of the run.

  Raises:
    ConfigError: the algorithm has no local steps.
  """

  def __init__(
    self, config: config_lib.Config, shared_model: shared_state_lib.SharedModel
  ):
    method = shared_model.method
    if method.inner is None:
      raise config_lib.ConfigError(
        f"optim.method: expected 'sparseloco' or 'diloco' for a pool, whose "
        f'workers take local steps; got {config.optim.method!r}'
      )
    # No microbatches: a worker states the batch that fits its memory.
    inner = dataclasses.replace(config.optim.inner, microbatch_size=0)
    optim = dataclasses.replace(config.optim, inner=inner)
    config = dataclasses.replace(config, optim=optim)
    self._shared_model = shared_model
    self._context = config.data.context
    self._spec = deltas_lib.spec(config, shared_model.abstract_params)
    compression = deltas_lib.compression(config)
    self._step = step_lib.inner_step(config)

    def begin(params: ct.Params) -> tuple[ct.Params, ct.OptState]:
      # The first step donates its parameters.
      return jax.tree.map(jnp.copy, params), method.inner.init(params)

    def end(start: ct.Params, local: ct.Params) -> ct.Message:
      delta = sparseloco.pseudo_gradient(start, local)
      return sparseloco.compress(delta, None, compression, None)[0]

    self._begin = jax.jit(begin)
    self._end = jax.jit(end)

  def warm_up(self) -> tuple[ct.Params, ct.Message]:
    """Compiles the programs of a lease with one sequence per step.

    Returns:
      Zero parameters, and a message.
    """
    params = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), self._shared_model.abstract_params
    )
    tokens_1xL1 = np.zeros((1, self._context + 1), np.int32)
    job = pool_lib.Job(0, 0, b'', 0, 1, tokens_1xL1)
    return params, self.train(params, job)[0]

  def train(
    self, params: ct.Params, job: pool_lib.Job
  ) -> tuple[ct.Message, float]:
    """Trains a lease; returns the message and the mean loss.

    Args:
      params: the parameters with the id `job.base`.
      job: the lease.

    Raises:
      DivergedError: the loss is not finite.
    """
    local, inner = self._begin(params)
    losses = []
    for k, tokens_BxL1 in enumerate(np.split(job.tokens_NxL1, job.steps)):
      local, inner, nats = self._step(
        local, inner, tokens_BxL1, np.int32(job.step + k), np.int32(0)
      )
      losses.append(nats)
    loss = float(np.mean(jax.device_get(losses)))
    if not np.isfinite(loss):
      raise local_lib.DivergedError(
        f'round {job.round}, lease {job.number}: the loss is {loss}; lower '
        'optim.inner.learning_rate'
      )
    return jax.device_get(self._end(params, local)), loss

  def encode(
    self, job: pool_lib.Job, message: ct.Message, sign: ct.Sign
  ) -> bytes:
    """Encodes a message as a signed payload."""
    shared_model = self._shared_model
    header = job.header(shared_model.run)
    return payload.encode(
      header, message, shared_model.abstract_params, self._spec, sign
    )

  def parameters(self, data: bytes) -> ct.Params:
    """Parses serialized parameters; raises ValueError on a wrong size."""
    leaves, treedef = jax.tree.flatten(self._shared_model.abstract_params)
    sizes = [4 * int(np.prod(x.shape)) for x in leaves]
    if sum(sizes) != len(data):
      raise ValueError(f'expected {sum(sizes)} bytes, got {len(data)}')
    ends = np.cumsum([0, *sizes])
    return treedef.unflatten(
      jnp.asarray(np.frombuffer(data[a:b], '<f4').reshape(x.shape), x.dtype)
      for x, a, b in zip(leaves, ends[:-1], ends[1:], strict=True)
    )
