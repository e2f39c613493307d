"""The measurements of inner steps, with what the devices do for them."""

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config as config_lib
from covenant.optim import algorithm as algorithm_lib
from covenant.optim import inner as inner_lib
from covenant.plan import hardware
from covenant.plan import timing
from covenant.telemetry import telemetry as telemetry_lib


class StepMeter:
  """Adds the learning rate, the memory and the MFU to measured steps.

  Args:
    config: of the run.
    method: of the run.
    telemetry: gets the steps.
    flops: of a token on the first device; 0: the devices are not of this
      process; None: of the whole model, on all devices.
  """

  def __init__(
    self,
    config: config_lib.Config,
    method: algorithm_lib.Algorithm,
    telemetry: telemetry_lib.Telemetry,
    flops: float | None = None,
  ):
    self._inner = config.optim.inner
    self._schedule = method.schedule
    self._telemetry = telemetry
    self._speed: telemetry_lib.Speed | None = None
    device = jax.local_devices()[0]
    peak, count = hardware.peak_of(device.device_kind), 1
    if flops is None:
      flops = timing.flops(config).total / timing.tokens(config)
      count = jax.local_device_count()
    if peak and flops:
      self._speed = telemetry_lib.Speed(flops, peak * count)

  def add(self, step: telemetry_lib.Measured, joined: int = 0) -> None:
    """Takes a step of a miner that joined at an inner step of the run."""
    at = jnp.int32(step.step)
    rate = self._schedule(at)
    rate *= inner_lib.rejoin_factor(self._inner, at, jnp.int32(joined))
    stats = jax.local_devices()[0].memory_stats() or {}
    self._telemetry.step(
      step, float(np.asarray(rate)), stats.get('bytes_in_use'), self._speed
    )
