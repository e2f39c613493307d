"""The measurements of inner steps, with what the devices do for them."""

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant.optim import inner as inner_lib
from covenant.plan import hardware
from covenant.plan import timing
from covenant.telemetry import telemetry as telemetry_lib
from covenant.train import shared_state as shared_state_lib


class StepMeter:
  """Adds the learning rate, the memory and the MFU to measured steps.

  Args:
    config: of the run.
    shared_model: of the run.
    telemetry: gets the steps.
  """

  def __init__(
    self,
    config: config_lib.Config,
    shared_model: shared_state_lib.SharedModel,
    telemetry: telemetry_lib.Telemetry,
  ):
    self._inner = config.optim.inner
    self._schedule = shared_model.method.schedule
    self._telemetry = telemetry
    self._speed: telemetry_lib.Speed | None = None
    device = jax.local_devices()[0]
    if peak := hardware.peak_of(device.device_kind):
      each = timing.flops(config).total / timing.tokens(config)
      self._speed = telemetry_lib.Speed(each, peak * jax.local_device_count())

  def add(self, step: telemetry_lib.Measured, joined: int = 0) -> None:
    """Takes a step of a miner that joined at an inner step of the run."""
    at = jnp.int32(step.step)
    rate = self._schedule(at)
    rate *= inner_lib.rejoin_factor(self._inner, at, jnp.int32(joined))
    stats = jax.local_devices()[0].memory_stats() or {}
    self._telemetry.step(
      step, float(np.asarray(rate)), stats.get('bytes_in_use'), self._speed
    )
