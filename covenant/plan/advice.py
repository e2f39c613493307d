"""The memory check of a plan, and the settings that make it fit."""

from collections.abc import Iterator

from covenant import config as config_lib
from covenant.plan import hardware as hardware_lib
from covenant.plan import memory

# Cheapest first.
_KNOBS = (
  'devices.offload=true',
  'optim.inner.microbatch_size=1',
  'model.loss_chunk=512',
  'model.remat=block',
  'model.attention=cudnn',
)
_MOST_DEVICES = 4096


def limit(config: config_lib.Config) -> float:
  """Returns the bytes per device that programs may use."""
  device = hardware_lib.parse(config.plan.hardware).device
  return config.plan.memory_fraction * device.memory


def most(config: config_lib.Config) -> memory.Phase:
  """Returns the phase that needs the most device memory.

  Raises:
    ConfigError: the mesh cannot shard the parameters.
  """
  cut = memory.shards(config)
  phases = memory.phases(config, cut, config.devices.offload)
  return max(phases, key=lambda phase: phase.total)


def fits(config: config_lib.Config) -> bool:
  return most(config).total <= limit(config)


def knobs(config: config_lib.Config) -> list[str]:
  """Returns config edits that make the model fit; empty if none do.

  Tries one of `_KNOBS`, then all useful ones together, then more devices.
  """
  known = [(knob, edited(config, [knob])) for knob in _KNOBS]
  useful = [
    knob
    for knob, other in known
    if other is not None and most(other).total < most(config).total
  ]
  for knob, other in known:
    if other is not None and fits(other):
      return [knob]
  together = edited(config, useful)
  if together is None:
    return []
  if fits(together):
    return useful
  for more, larger in _larger(config):
    if fits(larger):
      return more
    both = edited(larger, useful)
    if both is not None and fits(both):
      return [*useful, *more]
  return []


def edited(
  config: config_lib.Config, edits: list[str]
) -> config_lib.Config | None:
  """Applies `--config.` edits; returns None if the result is invalid."""
  try:
    other = config_lib.edit(config, edits)
    memory.shards(other)
  except config_lib.ConfigError:
    return None
  return other


def _larger(
  config: config_lib.Config,
) -> Iterator[tuple[list[str], config_lib.Config]]:
  """Yields edits that double the number of shards, while they divide."""
  hardware = hardware_lib.parse(config.plan.hardware)
  count, fsdp = hardware.count, config.devices.fsdp
  while count < _MOST_DEVICES:
    count, fsdp = 2 * count, 2 * fsdp
    edits = [f'devices.fsdp={fsdp}', f'plan.hardware={count}x{hardware.name}']
    other = edited(config, edits)
    if other is None or config.optim.inner.batch_size % fsdp:
      return
    yield edits, other
