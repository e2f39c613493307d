"""Arithmetic of an inner step and traffic between the devices of a peer."""

from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory


class Flops(NamedTuple):
  """Model FLOPs of one inner step of a peer, without rematerialization."""

  weights: float  # 6 per parameter and token
  attention: float  # 12 x layers x context x width per token

  @property
  def total(self) -> float:
    return self.weights + self.attention


class Step(NamedTuple):
  """Seconds of each part of one inner step."""

  compute: float
  parameters: float  # gathering weights, scattering gradients
  activations: float  # summing over the axis 'tensor'

  @property
  def total(self) -> float:
    """Seconds of the step; gathers overlap with arithmetic, sums do not."""
    return max(self.compute, self.parameters) + self.activations


def tokens(config: config_lib.Config) -> int:
  """Returns the tokens of one inner step of a peer."""
  return config.optim.inner.batch_size * config.data.context


def flops(config: config_lib.Config) -> Flops:
  """Returns the model FLOPs of one inner step (PaLM, 2204.02311, app. B).

  >>> config = config_lib.Config()
  >>> llama.num_params(config.model), tokens(config)
  (123200, 512)
  """
  m, count = config.model, tokens(config)
  return Flops(
    6.0 * llama.num_params(m) * count,
    12.0 * m.layers * config.data.context * m.width * count,
  )


def traffic(config: config_lib.Config) -> tuple[float, float]:
  """Returns the bytes that a device receives per step.

  Each microbatch gathers all weights in the compute dtype, once forward and
  once backward, and scatters float32 gradients. Replicas along the axis
  'data' sum their gradients once per step.

  Returns:
    Bytes of parameters and gradients, and bytes of activations.
  """
  m, devices = config.model, config.devices
  wide = 2 if m.compute_dtype == 'bfloat16' else 4
  size, times = memory.microbatch(config)
  held = llama.num_params(m) / devices.tensor
  fsdp, data = devices.fsdp, devices.data
  gathered = times * (2 * wide + 4) * held * (fsdp - 1) / fsdp
  copied = 2 * 4 * held / fsdp * (data - 1) / data
  sums = 6 if m.remat == 'block' else 4
  share = 2 * (devices.tensor - 1) / devices.tensor
  summed = times * size * config.data.context * m.width * wide
  return gathered + copied, m.layers * sums * summed * share


def step(config: config_lib.Config, hardware: hardware_lib.Hardware) -> Step:
  """Estimates the seconds of an inner step from `config.plan`."""
  device = hardware.device
  of_parameters, of_activations = traffic(config)
  tensor = config.devices.tensor
  near = device.inside if tensor <= device.per_host else device.outside
  return Step(
    flops(config).total
    / (hardware.count * device.peak * config.plan.peak_fraction),
    of_parameters / hardware.link,
    of_activations / near,
  )
