"""What a config needs of this machine, said before anything is started."""

import os
import pathlib

import jax

from covenant import config as config_lib
from covenant.data import assignment
from covenant.models import llama
from covenant.plan import memory


class InsufficientResourcesError(config_lib.ConfigError):
  """This machine cannot run the config.

  hardware: whether it lacks devices or memory, not only what can be brought.
  """

  def __init__(self, message: str, hardware: bool):
    super().__init__(message)
    self.hardware = hardware


def memory_bytes(config: config_lib.Config, miners: int) -> float:
  """Bytes that a device holds for `miners` in a process, activations left out.

  The most of any phase of the one that works (covenant/plan/memory.py), and the
  private state of the others.
  """
  cut = memory.shards(config)
  phases = memory.phases(config, cut, config.devices.offload)
  most = max(p.total - p.device.get('activations', 0) for p in phases)
  optim = config.optim
  kept = memory.moments(optim) + memory.errors(optim) + bool(optim.overlap)
  private = 4 * cut.params * kept
  return max(most + (miners - 1) * private, 4 * cut.params)


def lacking_devices(config: config_lib.Config) -> str:
  """What to say of the devices of this machine; empty if there are enough."""
  mesh, there = config.devices, jax.devices()
  needed = max(mesh.data, 1) * mesh.fsdp * mesh.tensor * mesh.stage
  if needed <= len(there):
    return ''
  return (
    f'devices.data * devices.fsdp * devices.tensor * devices.stage = {needed}, '
    f'and here is '
    f'{len(there)} x {there[0].device_kind}'
  )


def lacking_memory(config: config_lib.Config, miners: int) -> str:
  """What to say of the memory of this machine; empty if there is enough."""
  needed, there = memory_bytes(config, miners), _memory_here()
  if needed <= there:
    return ''
  kind = jax.devices()[0].device_kind
  params = llama.num_params(config.model)
  return (
    f'{params:,} parameters and {miners} miner(s) in one process '
    f'take {needed / 1e9:,.1f} GB of a device beside activations; the {kind} '
    f'here has {there / 1e9:,.1f} GB. '
    'Lower miners or model, or use a larger machine'
  )


def lacking_data(config: config_lib.Config) -> str:
  """What to say of the data of this machine; empty if it is there."""
  data = config.data
  if not data.path or pathlib.Path(data.path).exists():
    return ''
  return (
    f'there is no data.path={data.path!r}. Make token shards of your text '
    'with: python run.py --role=tokenize --config.data.source=text '
    f'--config.data.path=YOUR_TEXT --workdir={data.path}'
  )


def check(config: config_lib.Config, miners: int) -> None:
  """Says all that is missing at once.

  Args:
    config: the run's.
    miners: in this process.

  Raises:
    InsufficientResourcesError: one line a thing that this machine lacks.
  """
  lacking = {
    'devices': lacking_devices(config),
    'memory': lacking_memory(config, miners),
    'data': lacking_data(config),
  }
  missing = [f'{name}: {text}' for name, text in lacking.items() if text]
  if missing:
    raise InsufficientResourcesError(
      f'{config.name} cannot run here:\n  ' + '\n  '.join(missing),
      hardware=bool(lacking['devices'] or lacking['memory']),
    )


def check_sequences(config: config_lib.Config, num_sequences: int) -> None:
  """Every miner of a round needs sequences of its own.

  Raises:
    ConfigError: there are fewer.
  """
  each = assignment.per_miner(config)
  if config.miners * each > num_sequences:
    raise config_lib.ConfigError(
      f'miners: {config.miners} miners with {each} sequences a round each '
      f'(optim.inner_steps * optim.inner.batch_size, or '
      'optim.most_sequences) need '
      f'{config.miners * each}; the training split has {num_sequences} of '
      f'data.context={config.data.context}'
    )


def _memory_here() -> int:
  """Of the one device that the emulator runs on."""
  stats = jax.devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
