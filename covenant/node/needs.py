"""What a config needs of this machine, said before anything is started."""

import os
import pathlib

import jax

from covenant import config as config_lib
from covenant.models import llama


def memory_bytes(config: config_lib.Config, miners: int) -> int:
  """Bytes that `miners` miners in one process hold, activations left out.

  Everything is float32: per parameter 4 bytes shared (8 with outer momentum,
  12 with an outer AdamW), 12 a miner (two AdamW moments, error feedback), and
  24 for the one that trains, until its message is made and added.
  """
  params = llama.num_params(config.model)
  optim = config.optim
  shared = 4 + (4 if optim.outer.momentum else 0)
  methods = {'sparseloco': 12, 'diloco': 8, 'demo': 4, 'ddp': 0}
  private = methods[optim.method]
  if optim.method == 'ddp':
    shared = 12
  return params * (shared + 24 + private * miners)


def lacking_memory(config: config_lib.Config, miners: int) -> str:
  """What to say of the memory of this machine; empty if there is enough."""
  needed, there = memory_bytes(config, miners), _memory_here()
  if needed <= there:
    return ''
  kind = jax.devices()[0].device_kind
  params = llama.num_params(config.model)
  return (
    f'{params:,} parameters and {miners} miner(s) in one process '
    f'take {needed / 1e9:,.1f} GB beside activations; the {kind} here '
    f'has {there / 1e9:,.1f} GB. '
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
    ConfigError: one line a thing that this machine lacks.
  """
  lacking = {
    'memory': lacking_memory(config, miners),
    'data': lacking_data(config),
  }
  missing = [f'{name}: {text}' for name, text in lacking.items() if text]
  if missing:
    raise config_lib.ConfigError(
      f'{config.name} cannot run here:\n  ' + '\n  '.join(missing)
    )


def check_sequences(config: config_lib.Config, num_sequences: int) -> None:
  """Every miner of a round needs sequences of its own.

  Raises:
    ConfigError: there are fewer.
  """
  optim = config.optim
  each = optim.inner_steps * optim.inner.batch_size
  if config.miners * each > num_sequences:
    raise config_lib.ConfigError(
      f'miners: {config.miners} miners with {each} sequences a round each '
      f'(optim.inner_steps * optim.inner.batch_size) need '
      f'{config.miners * each}; the training split has {num_sequences} of '
      f'data.context={config.data.context}'
    )


def _memory_here() -> int:
  """Of the one device that the emulator runs on."""
  stats = jax.devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
