"""Checks that this machine, key and bucket can do what a role needs.

Every check is a line for people: its name, its finding and, if it failed, what
to do.
"""

import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from covenant import config as config_lib
from covenant import errors
from covenant.chain import interface as chain_lib
from covenant.data import assignment
from covenant.data import dataset
from covenant.data import remote
from covenant.data import tokens as tokens_lib
from covenant.models import llama
from covenant.node import amended_data
from covenant.node import connect
from covenant.node import role_needs
from covenant.node import subnet_check
from covenant.plan import memory
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import same_bits
from covenant.store import interface as store_lib
from covenant.telemetry import machine
from covenant.train import shared_state as shared_state_lib

ROLES = ('miner', 'pool', 'validator', 'evaluator')
_SKEW_SECONDS = 30.0  # that a clock may be ahead
_BEHIND_SECONDS = 120.0  # final blocks of a chain are some tens old


class Finding(NamedTuple):
  """The result of one check."""

  name: str
  well: bool
  text: str
  warns: bool = False  # well, and yet its text asks for something


class PreflightError(errors.CovenantError):
  """A node cannot start; one line per problem to solve."""


def examine(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  role: str = '',
) -> Iterator[Finding]:
  """Runs all checks, cheap ones first; yields each finding at once.

  Args:
    config: the config of the run, with the `network` section of this node.
    workdir: the folder that the node would write to.
    role: one of ROLES. If empty, the machine is checked for a miner, and the
      hotkey for what it declares; for what its permit allows if for nothing.
  """
  kind = jax.devices()[0].device_kind
  yield Finding('devices', True, f'{jax.device_count()} x {kind}')
  if idle := machine.idle_accelerator(jax.default_backend()):
    yield Finding('devices', True, idle, warns=True)
  lacking = lacking_devices(config)
  memory_line = (
    (False, lacking) if lacking else role_needs.memory_line(config, role)
  )
  yield Finding('memory', *memory_line)
  yield _attempt('arithmetic', _arithmetic)
  yield Finding('disk', *role_needs.disk_line(config, workdir, role))
  yield _data(config)
  try:
    chain = connect.chain(config)
    head = chain.head()
  except (chain_lib.ChainError, config_lib.ConfigError) as e:
    yield Finding('chain', False, str(e))
  else:
    text = f'block {head}' if head >= 0 else 'it has not begun'
    yield Finding('chain', True, text)
    if head >= 0:
      yield _attempt('clock', lambda: _clock(chain, head))
      if role != 'evaluator':
        yield _attempt('hotkey', lambda: _hotkey(config, chain, head, role))
      yield from subnet(config, chain, head, role or _declared(config, chain))
  if role != 'evaluator':
    run = shared_state_lib.SharedModel(config).run
    yield _attempt('bucket', lambda: _bucket(config, run, role))
  if lacking := [*role_needs.phases_of(config)]:
    yield Finding('phases', False, '; '.join(lacking))


def require(
  config: config_lib.Config, workdir: str | os.PathLike[str], role: str
) -> None:
  """Raises PreflightError with the findings of all checks that failed."""
  bad = [f for f in examine(config, workdir, role) if not f.well]
  if bad:
    lines = '\n  '.join(f'{finding.name}: {finding.text}' for finding in bad)
    raise PreflightError(f'this {role} cannot start:\n  {lines}')


def table(findings: list[Finding]) -> str:
  """Returns one line per finding."""
  return '\n'.join(f'{_word(f):8}  {f.name:10}  {f.text}' for f in findings)


def _word(finding: Finding) -> str:
  if not finding.well:
    return 'NOT WELL'
  return 'WARNING' if finding.warns else 'well'


def _attempt(name: str, check: Callable[[], str]) -> Finding:
  """Returns the finding of a check, which returns a text or raises."""
  try:
    return Finding(name, True, check())
  except (
    chain_lib.ChainError,
    store_lib.StoreError,
    ValueError,
    PreflightError,
  ) as e:
    return Finding(name, False, str(e))


def _arithmetic() -> str:
  """Raises PreflightError if this machine computes other bits than others."""
  if step := same_bits.first_difference():
    raise PreflightError(
      f'{step}: other bits than the specification (docs/protocol.md, "Exact '
      'arithmetic"); test the memory of this machine, or use another backend'
    )
  return 'computes the same bits as the run'


def _data(config: config_lib.Config) -> Finding:
  if lacking := lacking_data(config):
    return Finding('data', False, lacking)
  try:
    split = dataset.load(config).train
    amended_data.check_places(config)
  except (errors.CovenantError, OSError, ValueError) as e:
    return Finding('data', False, str(e))
  sequences = assignment.least_capacity(split, config.data.context)
  each = assignment.per_miner(config)
  return Finding(
    'data',
    sequences >= each,
    f'{sequences:,} sequences of {config.data.context}, {each} per round',
  )


def _clock(chain: chain_lib.Chain, head: int) -> str:
  ahead = time.time() - chain.timestamp(head)
  if -_SKEW_SECONDS < ahead < _BEHIND_SECONDS + 2 * chain.block_seconds:
    return f'the newest block is {ahead:.0f} s old'
  raise PreflightError(
    f'by the clock of this machine the newest block is {ahead:.0f} s old; set '
    'the clock (NTP), or check that the chain makes blocks'
  )


def _hotkey(
  config: config_lib.Config, chain: chain_lib.Chain, head: int, role: str
) -> str:
  """Checks that the hotkey may do what a role needs, and does nothing else.

  A miner may hold a permit: its role is what it declares.
  """
  schedule = amendments_lib.schedule(config, ())
  membership = membership_lib.read(chain, head, schedule)
  peer = membership.peers[membership.uid(chain.hotkey)]
  if role == 'validator' and not peer.permit:
    raise PreflightError(
      f'uid {peer.uid} has no validator permit; stake more, or run a miner'
    )
  declared = membership.role(peer.uid)
  if role in ('miner', 'pool') and peer in membership.validators:
    last = membership.votes[peer.uid]
    raise PreflightError(
      f'uid {peer.uid} voted as a validator in round {last}: nobody counts its '
      'payloads. Use another hotkey to mine, or stop that validator and wait '
      f'{config.phases.active_rounds} rounds'
    )
  return (
    f'{chain.hotkey} is uid {peer.uid}; declared role: '
    f'{declared.name.lower() if declared else "none yet"}; validator permit: '
    f'{"yes" if peer.permit else "no"}; stake {peer.stake:,.0f}'
  )


def _declared(config: config_lib.Config, chain: chain_lib.Chain) -> str:
  """Returns the role that the hotkey declares, or would have by its permit."""
  try:
    schedule = amendments_lib.schedule(config, ())
    membership = membership_lib.read(chain, chain.head(), schedule)
    peer = membership.peers[membership.uid(chain.hotkey)]
  except chain_lib.ChainError:
    return ''  # `_hotkey` says why
  if declared := membership.role(peer.uid):
    return declared.name.lower()
  return 'validator' if peer.permit else 'miner'


def subnet(
  config: config_lib.Config, chain: chain_lib.Chain, head: int, role: str
) -> Iterator[Finding]:
  """Yields the findings about the rules of the subnet, if it has any."""
  try:
    rules = chain.subnet(min(subnet_check.oldest_needed(config), head))
    peers = {peer.hotkey: peer for peer in chain.peers(head)}
  except chain_lib.ChainError as e:
    yield Finding('subnet', False, str(e))
    return
  if rules is not None:
    peer = peers.get(chain.hotkey)
    situation = subnet_check.Situation(
      config, rules, peer, role, chain.block_seconds
    )
    yield from (Finding(*f) for f in subnet_check.examine(situation))


def _bucket(config: config_lib.Config, run: bytes, role: str) -> str:
  """Writes a probe, reads it as others would, and deletes it.

  Its room is checked where the bucket tells it.
  """
  objects = connect.objects(config, run)
  key = f'{run.hex()}/probe/{secrets.token_hex(8)}'
  data = secrets.token_bytes(64)
  objects.bucket.put(key, data)
  try:
    try:
      objects.bucket.put(key, data)
    except store_lib.ObjectExistsError:
      pass
    else:
      raise PreflightError(
        'the store replaces objects that must not be replaced (it ignores '
        'If-None-Match); use another one'
      )
    public = objects.bucket_at(objects.location)
    if public is None:
      raise PreflightError(
        'others may not open this bucket: it must be on R2, on Amazon, or on '
        'one of the store_hosts that the run allows'
      )
    if public.get(key, len(data)) != data:
      raise PreflightError('others read other bytes than were written')
  finally:
    objects.bucket.delete([key])
  location = objects.bucket.location
  need = role_needs.bucket_of(config, location, role)
  if need.lacks:
    raise PreflightError(f'it needs {need.text} GB that are free')
  known = '' if need.there is not None else '; its quota cannot be read'
  return f'{location.partition("?")[0]} can be written and read{known}'


class InsufficientResourcesError(config_lib.ConfigError):
  """This machine cannot run the config.

  Attributes:
    hardware: True if devices or memory are missing; False if only data is.
  """

  def __init__(self, message: str, hardware: bool):
    super().__init__(message)
    self.hardware = hardware


def memory_bytes(config: config_lib.Config, miners: int) -> float:
  """Returns the bytes per device for the miners of a process, no activations.

  The maximum over the phases of the miner that trains (covenant/plan/memory.py)
  plus the private state of the others.
  """
  cut = memory.shards(config)
  phases = memory.phases(config, cut, config.devices.offload)
  most = max(p.total - p.device.get('activations', 0) for p in phases)
  optim = config.optim
  kept = memory.moments(optim) + memory.errors(optim) + bool(optim.overlap)
  private = 4 * cut.params * kept
  return max(most + (miners - 1) * private, 4 * cut.params)


def lacking_devices(config: config_lib.Config) -> str:
  """Returns the message about missing devices; empty if there are enough."""
  mesh, there = config.devices, jax.devices()
  needed = max(mesh.data, 1) * mesh.fsdp * mesh.tensor * mesh.stage
  if needed <= len(there):
    return ''
  return (
    f'devices.data * devices.fsdp * devices.tensor * devices.stage = {needed}, '
    f'and this machine has {len(there)} x {there[0].device_kind}'
  )


def lacking_memory(config: config_lib.Config, miners: int) -> str:
  """Returns the message about missing memory; empty if there is enough."""
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
  """Returns the message about missing data; empty if it is there."""
  data = config.data
  if data.source != 'shards':
    return ''  # `dataset.load` says what is missing
  missing = [
    path
    for path in data.paths
    if not remote.is_url(path) and not pathlib.Path(path).exists()
  ]
  if not missing:
    return ''
  return (
    f'there is no data.path={missing[0]!r}. Make token shards of your text '
    'with: covenant --role=tokenize --config.data.source=text '
    f'--config.data.path=YOUR_TEXT --workdir={missing[0]} (docs/data.md)'
  )


def check(config: config_lib.Config, miners: int) -> None:
  """Checks the devices, memory and data of this machine.

  Args:
    config: the config of the run.
    miners: number of miners in this process.

  Raises:
    InsufficientResourcesError: one line per thing that this machine lacks.
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


def check_sequences(config: config_lib.Config, split: tokens_lib.Split) -> None:
  """Checks that every miner of a round has training sequences of its own.

  Raises:
    ConfigError: there are fewer.
  """
  each = assignment.per_miner(config)
  num_sequences = assignment.least_capacity(split, config.data.context)
  if config.miners * each > num_sequences:
    raise config_lib.ConfigError(
      f'miners: {config.miners} miners with {each} sequences per round each '
      f'(optim.inner_steps * optim.inner.batch_size, or '
      'optim.most_sequences) need '
      f'{config.miners * each}; the training split has {num_sequences} of '
      f'data.context={config.data.context}'
    )


def _memory_here() -> int:
  """Returns the bytes of memory of the device that the emulator runs on."""
  stats = jax.devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  return machine.memory_bytes()
