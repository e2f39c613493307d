"""What no single field of a config can show.

A leaf beneath `covenant/config/config.py`, whose `parse` asks it.
"""

from typing import Any

from covenant.config import schema


def check(config: Any) -> None:
  """Holds the fields of a `config.Config` against each other.

  Raises:
    ConfigError: naming the first field that cannot be, and what is allowed.
  """
  model, data, optim = config.model, config.data, config.optim

  def require(holds: bool, field: str, message: str) -> None:
    if not holds:
      raise schema.ConfigError(f'{field}: {message}')

  require(
    model.width % (2 * model.heads) == 0,
    'model.heads',
    'model.width must be an even multiple of it (rotary pairs), '
    f'got width {model.width} and {model.heads} heads',
  )
  require(
    model.heads % model.kv_heads == 0,
    'model.kv_heads',
    f'must divide model.heads = {model.heads}, got {model.kv_heads}',
  )
  inner = optim.inner
  require(
    not inner.microbatch_size or inner.batch_size % inner.microbatch_size == 0,
    'optim.inner.microbatch_size',
    f'must divide optim.inner.batch_size = {inner.batch_size}, '
    f'got {inner.microbatch_size}',
  )
  height, width = optim.compression.block
  require(
    height >= 1 and width >= 1,
    'optim.compression.block',
    f'expected two positive sides, got {optim.compression.block}',
  )
  require(
    optim.compression.k <= height * width,
    'optim.compression.k',
    f'expected at most {height * width}, the elements of one {height} x '
    f'{width} block, got {optim.compression.k}',
  )
  require(
    optim.compression.codec != 'pack12' or height * width <= 4096,
    'optim.compression.codec',
    f"'pack12' has 12 bits for an index, too few for {height} x {width} blocks",
  )
  require(
    optim.method != 'demo' or optim.compression.kind == 'dct',
    'optim.compression.kind',
    f"expected 'dct' with optim.method='demo', got {optim.compression.kind!r}",
  )
  require(
    optim.method != 'demo' or inner.kind == 'adamw',
    'optim.inner.kind',
    "expected 'adamw', the default, with optim.method='demo', which has no "
    f'inner optimizer, got {inner.kind!r}',
  )
  require(
    optim.method not in ('ddp', 'demo') or optim.inner_steps == 1,
    'optim.inner_steps',
    f'expected 1 with optim.method={optim.method!r} (it exchanges every step; '
    f'raise rounds instead), got {optim.inner_steps}',
  )
  require(
    not (optim.aggregation.trim and optim.aggregation.weight == 'tokens'),
    'optim.aggregation.trim',
    "expected False with optim.aggregation.weight='tokens': the extremes of "
    'an element are not kept with their weights',
  )
  require(
    not (optim.aggregation.trim and optim.staleness),
    'optim.aggregation.trim',
    f'expected False with optim.staleness={optim.staleness}: the extremes of '
    'an element are not kept with their weights',
  )
  require(
    optim.overlap < optim.inner_steps or not optim.overlap,
    'optim.overlap',
    f'expected fewer than optim.inner_steps = {optim.inner_steps}, '
    f'got {optim.overlap}',
  )
  require(
    not optim.staleness or optim.method not in ('ddp', 'demo'),
    'optim.staleness',
    f'expected 0 with optim.method={optim.method!r}, whose gradients are of '
    f'the parameters that they move, got {optim.staleness}',
  )
  phases = config.phases
  least = (
    phases.put_blocks
    + phases.select_blocks
    + phases.takeover_blocks
    + 2 * phases.confirmations
  )
  require(
    phases.round_blocks > least,
    'phases.round_blocks',
    f'expected more than {least}, what the other phases take, '
    f'got {phases.round_blocks}',
  )
  require(
    phases.select_blocks > 2 * phases.confirmations,
    'phases.select_blocks',
    'a vote must be in a block before the decision; expected more than twice '
    f'phases.confirmations = {phases.confirmations}',
  )
  steps = inner.decay_steps or config.rounds * optim.inner_steps
  require(
    inner.warmup_steps < steps,
    'optim.inner.warmup_steps',
    f'expected fewer than the {steps} steps of the schedule, '
    f'got {inner.warmup_steps}',
  )
  require(
    inner.anneal_start == 0 or inner.anneal_start >= inner.warmup_steps,
    'optim.inner.anneal_start',
    f'expected 0, for none, or a step after the warm-up of '
    f'{inner.warmup_steps}, got {inner.anneal_start}',
  )
  devices = config.devices
  require(
    devices.stage == 1 or devices.data == devices.fsdp == devices.tensor == 1,
    'devices.stage',
    'a stage is one device; expected 1, or devices.data, devices.fsdp and '
    f'devices.tensor to be 1, got {devices.stage}',
  )
  network = config.network
  require(
    network.coordinator in ('', 'auto') or ':' in network.coordinator,
    'network.coordinator',
    f"expected HOST:PORT, 'auto' or nothing, got {network.coordinator!r}",
  )
  require(
    bool(network.coordinator) or network.processes == 1,
    'network.coordinator',
    'expected HOST:PORT of process 0, because network.processes = '
    f'{network.processes}',
  )
  require(
    network.process < network.processes,
    'network.process',
    f'expected less than network.processes = {network.processes}, '
    f'got {network.process}',
  )
  require(
    bool(data.path) or data.source not in ('text', 'shards'),
    'data.path',
    f'expected a file or folder, because data.source={data.source!r}',
  )
  require(
    bool(data.tokenizer_path) or data.tokenizer != 'sentencepiece',
    'data.tokenizer_path',
    "expected a .model file, because data.tokenizer='sentencepiece'",
  )
