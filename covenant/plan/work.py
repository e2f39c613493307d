"""Arithmetic of an inner step, and what crosses the devices of one peer."""

from typing import NamedTuple

from covenant import config as config_lib
from covenant.models import llama
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory


class Flops(NamedTuple):
  """Of one inner step of a peer. What remat computes again is not counted."""

  weights: float  # 6 a parameter and token
  attention: float  # 12 x layers x context x width a token, as PaLM counts

  @property
  def total(self) -> float:
    return self.weights + self.attention


class Step(NamedTuple):
  """Seconds of one inner step, each part as if it were alone."""

  compute: float
  parameters: float  # gathered, and their gradients scattered
  activations: float  # summed over 'tensor'

  @property
  def total(self) -> float:
    """Gathers run beside the arithmetic, sums of activations between it."""
    return max(self.compute, self.parameters) + self.activations


def tokens(config: config_lib.Config) -> int:
  """Of one inner step of a peer."""
  return config.optim.inner.batch_size * config.data.context


def flops(config: config_lib.Config) -> Flops:
  """Model FLOPs of one inner step (Chowdhery et al, PaLM, 2022, appendix B).

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
  """Bytes that a device receives in a step: of parameters, of activations.

  Each microbatch gathers all weights in the compute dtype for the forward
  pass and for the backward pass, and scatters float32 gradients; copies along
  'data' sum theirs once a step.
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
  """How long an inner step takes, by the assumptions of `config.plan`."""
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
