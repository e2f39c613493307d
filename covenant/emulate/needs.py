"""What a config needs of this machine, said before anything is started."""

import os
import pathlib

import jax

from covenant import config as config_lib
from covenant.models import llama


def workers(config: config_lib.Config) -> int:
  """How many miners train side by side.

  One small model does not fill several cores; several do, and none changes a
  bit of another. An accelerator is filled by one.
  """
  if jax.default_backend() != 'cpu':
    return 1
  return min(os.cpu_count() or 1, config.miners)


def memory_bytes(config: config_lib.Config) -> int:
  """Bytes that emulating `config` holds at its peak, activations left out.

  Everything is float32: per parameter 4 bytes shared (8 with outer momentum,
  12 with an outer AdamW), 12 a miner (two AdamW moments, error feedback), and
  24 for each that trains, until its message is made and added.
  """
  params = llama.num_params(config.model)
  optim = config.optim
  shared = 4 + (4 if optim.outer.momentum else 0)
  private = {'sparseloco': 12, 'diloco': 8, 'ddp': 0}[optim.method]
  if optim.method == 'ddp':
    shared = 12
  training = 24 * workers(config)
  return params * (shared + training + private * config.miners)


def check(config: config_lib.Config) -> None:
  """Says all that is missing at once.

  Raises:
    ConfigError: one line a thing that this machine lacks.
  """
  missing = []
  needed, there = memory_bytes(config), _memory_here()
  if needed > there:
    kind = jax.devices()[0].device_kind
    params = llama.num_params(config.model)
    missing.append(
      f'memory: {params:,} parameters and {config.miners} emulated miner(s) '
      f'take {needed / 1e9:,.1f} GB beside activations; the {kind} here '
      f'has {there / 1e9:,.1f} GB. '
      'Lower miners or model, or use a larger machine'
    )
  data = config.data
  if data.path and not pathlib.Path(data.path).exists():
    missing.append(
      f'data.path: there is no {data.path!r}. Make token shards of your text '
      'with: python run.py --role=tokenize --config.data.source=text '
      f'--config.data.path=YOUR_TEXT --workdir={data.path}'
    )
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
