"""The sections about a network: phases, addresses, hardware, plans.

An island is the hardware of one uid, as the run sees it. In a flag, islands are
separated by semicolons, their fields by commas:

  2x steps=40,batch=16; 4x steps=10,stages=2,rank=4

stands for two fast full replicas and four slow pipelines.
"""

import dataclasses
import re
from collections.abc import Iterable

from covenant.config import schema

_ENTRY = re.compile(r'(?:([1-9]\d*)x\s*)?(.*)', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Phases(schema.Section):
  """The phases of a round, in blocks (covenant/protocol/round.py)."""

  origin: int = schema.bounded(0, low=0)  # first block of round 0
  round_blocks: int = schema.positive(115)  # length of a round
  put_blocks: int = schema.bounded(6, low=2)  # last ones, for commitments
  # Blocks of the next round in which validators check payloads and agree.
  select_blocks: int = schema.positive(4)
  takeover_blocks: int = schema.positive(4)  # extension for a silent leader
  confirmations: int = schema.positive(1)  # blocks that a fork may take back
  # Rounds after its last vote in which a validator still counts.
  active_rounds: int = schema.positive(3)

  def check(self) -> None:
    least = (
      self.put_blocks
      + self.select_blocks
      + self.takeover_blocks
      + 2 * self.confirmations
    )
    schema.require(
      self.round_blocks > least,
      'phases.round_blocks',
      f'expected more than {least}, the length of the other phases, '
      f'got {self.round_blocks}',
    )
    schema.require(
      self.select_blocks > 2 * self.confirmations,
      'phases.select_blocks',
      'a vote must be in a block before the decision; expected more than twice '
      f'phases.confirmations = {self.confirmations}, got {self.select_blocks}',
    )


@dataclasses.dataclass(frozen=True)
class Network(schema.Section):
  """The addresses of a process. They do not change what a run computes."""

  # local: a file that processes of one machine share; or a function of this
  # section that returns a chain.
  chain: str = schema.bounded(
    'local', choices=('local', 'bittensor'), plugin=True
  )
  name: str = 'finney'  # bittensor: finney, test, or ws://HOST:PORT
  netuid: int = schema.bounded(3, low=0)
  wallet: str = 'default'
  hotkey: str = 'default'
  path: str = ''  # local: folder of the chain and the buckets
  # bittensor: incentive mechanism of the subnet that weights are for.
  mechanism: int = schema.bounded(0, low=0)
  block_seconds: float = schema.positive(12.0)  # local
  # local: epochs until weights are revealed; 0: they are not sealed.
  reveal_epochs: int = schema.bounded(0, low=0)
  # local: number of the largest stakes that get a permit in every epoch, with
  # pay staked; 0: the permits of the validators' hotkeys stay as they are.
  permits: int = schema.bounded(0, low=0)
  # Own bucket, such as s3://...; empty: a folder under `path`. {hotkey} in it
  # is replaced.
  bucket: str = ''
  # (name, write) -> bucket, of 'file.py:attribute'; it opens the buckets of all
  # nodes by their names: `bucket`, or the hotkey. Empty: as `bucket` says.
  store: str = schema.bounded('', choices=('',), plugin=True)
  # Address of process 0, if several are one node (covenant/node/multihost.py):
  # HOST:PORT, or auto where JAX finds out, as under Slurm; empty: one process.
  coordinator: str = ''
  processes: int = schema.positive(1)  # number, if the coordinator is HOST:PORT
  process: int = schema.bounded(0, low=0)  # index of this one

  def check(self) -> None:
    schema.require(
      self.coordinator in ('', 'auto') or ':' in self.coordinator,
      'network.coordinator',
      f"expected HOST:PORT, 'auto' or nothing, got {self.coordinator!r}",
    )
    schema.require(
      bool(self.coordinator) or self.processes == 1,
      'network.coordinator',
      'expected HOST:PORT of process 0, because network.processes = '
      f'{self.processes}',
    )
    schema.require(
      self.process < self.processes,
      'network.process',
      f'expected less than network.processes = {self.processes}, '
      f'got {self.process}',
    )


@dataclasses.dataclass(frozen=True)
class Devices(schema.Section):
  """The mesh of one process's devices (covenant/models/sharding.py).

  It does not change what a run computes.
  """

  # Emulated miners that train at the same time; 0: as many as there are
  # devices for, which on a CPU are its cores.
  peers: int = schema.bounded(0, low=0)
  # Replicas of a miner's parameters, which share its batch; 0: as many as fit.
  data: int = schema.bounded(1, low=0)
  fsdp: int = schema.positive(1)  # shards of parameters and of the batch
  tensor: int = schema.positive(1)  # shards of heads and of the ffn
  stage: int = schema.positive(1)  # pipeline stages; others must be 1 then
  offload: bool = False  # idle state waits in host memory, where supported
  # Share of each GPU's memory that this process takes; 0: JAX's default.
  memory_fraction: float = schema.fraction(0.0)

  def check(self) -> None:
    schema.require(
      self.stage == 1 or self.data == self.fsdp == self.tensor == 1,
      'devices.stage',
      'a stage is one device; expected 1, or devices.data, devices.fsdp and '
      f'devices.tensor to be 1, got {self.stage}',
    )


@dataclasses.dataclass(frozen=True)
class Pool(schema.Section):
  """Many machines behind one uid (covenant/pool/pool.py, docs/islands.md).

  The network sees one miner, so that these fields are its own affair.
  """

  url: str = ''  # worker: http://HOST:PORT of its pool
  key: str = '~/.covenant/worker.key'  # worker: a file, made at the first start
  batch: int = schema.positive(64)  # worker: sequences per step that fit
  hotkey: str = ''  # worker: ss58 address of its pool; empty: the first one's
  listen: str = '127.0.0.1:8470'  # pool: address; 0.0.0.0:PORT is everywhere
  certificate: str = ''  # pool: PEM file of its TLS certificate; empty: no TLS
  certificate_key: str = ''  # pool: PEM file of the certificate's key
  # Pool: addresses of its reverse proxies, whose X-Forwarded-For it believes.
  proxies: tuple[str, ...] = schema.names()
  workers: tuple[str, ...] = schema.names()  # ss58 addresses; empty: anybody
  subrounds: int = schema.positive(10)  # per round, each with a merge
  steps: int = schema.positive(4)  # inner steps per lease
  audits: int = schema.positive(1)  # leases per sub-round computed again
  # Rounds without leases after a fraud, and without preference after a stage
  # that was not served.
  ban_rounds: int = schema.positive(100)
  # Newest rounds whose pay an audit does not release; about the number of
  # workers divided by the audits of a round.
  deposit: int = schema.positive(8)
  fee: float = schema.fraction(0.0)  # pool's share of the pay
  stages: int = schema.positive(2)  # stage: how many its memory holds
  # Head of a pipeline: seconds that a stage may take for whatever it is told,
  # and to come after a start of the head.
  patience: float = schema.positive(60.0)
  # Head: inner steps of a round that an inner stage without a holder is
  # bypassed, before the others wait for it.
  bypass_steps: int = schema.bounded(6, low=0)
  threshold: float = schema.bounded(0.1, low=0.0)  # smallest payment, in TAO


@dataclasses.dataclass(frozen=True)
class Plan(schema.Section):
  """The assumptions of `--role=plan` (covenant/plan/); they change no run."""

  hardware: str = '1xH100'  # devices of one peer, number x kind
  memory_fraction: float = schema.fraction(0.94)  # of a device, for XLA
  peak_fraction: float = schema.positive(0.25)  # of bfloat16 FLOP/s in training
  # Minutes of training per round; 0: computed from FLOPs.
  compute_minutes: float = schema.bounded(0.0, low=0.0)
  peers: int = schema.positive(20)  # contributors per round
  upload: float = schema.positive(110.0)  # of a peer, megabytes per second
  download: float = schema.positive(500.0)  # of a peer, megabytes per second
  cores: int = schema.positive(64)  # of a host, for payloads and digests
  # Blocks until a block of the chain is final, as nodes see it.
  finality_blocks: int = schema.bounded(3, low=0)
  # Prices; 0: costs are not printed.
  device_price: float = schema.bounded(0.0, low=0.0)  # dollars per device-hour
  egress_price: float = schema.bounded(
    0.0, low=0.0
  )  # dollars per GB of a store
  compile: bool = True  # false: programs are only lowered, in seconds
  # TPU topology to compile for as well, such as 'v5p:4x4x4'; needs the extra
  # 'plan-tpu'.
  tpu_topology: str = ''
  # Hardware to plan islands for (covenant/plan/hardware.py), such as
  # '8xB200, 64xA100 in pairs, 400x4090 on 200 Mb/s'; empty: `hardware`.
  inventory: str = ''
  # Simulated links (covenant/plan/wallclock.py): standard deviation of
  # the logarithm of their speed, share of bytes sent again, share of time away.
  jitter: float = schema.bounded(0.0, low=0.0, high=2.0)
  loss: float = schema.bounded(0.0, low=0.0, high=0.9)
  churn: float = schema.bounded(0.0, low=0.0, high=0.5)


@dataclasses.dataclass(frozen=True)
class Island(schema.Section):
  """One or more uids of equal hardware. 0 stands for the run's own value."""

  steps: int = schema.bounded(0, low=0)  # inner steps per round
  batch: int = schema.bounded(0, low=0)  # sequences per inner step
  stages: int = schema.positive(1)  # of a pipeline; 1: a full replica
  # Numbers per position that pass between stages; 0: the model's width.
  rank: int = schema.bounded(0, low=0)
  # Bits of each of these numbers; 0: the model's own precision.
  bits: int = schema.bounded(0, choices=(0, 4, 8))
  # Layers of each stage, such as 3-2-1 in a flag; none: all have as many.
  layers: tuple[int, ...] = ()
  count: int = schema.positive(1)  # uids

  @property
  def sequences(self) -> int:
    """The sequences of one contribution, if steps and batch are not 0."""
    return self.steps * self.batch

  def check(self) -> None:
    entry = f'islands: {show_islands((self,))!r}'
    schema.require(
      not self.rank or self.stages > 1,
      entry,
      'rank is the width of what passes between stages; expected stages=2 or '
      'more with it',
    )
    schema.require(
      not self.layers
      or len(self.layers) == self.stages
      and min(self.layers) > 0,
      entry,
      f'layers: expected one or more for each of stages={self.stages}',
    )
    schema.require(
      not self.bits or self.rank > 0,
      entry,
      'bits is the precision of the numbers of a rank; expected a rank with it',
    )
    schema.require(
      self.bits != 4 or self.rank % 2 == 0,
      entry,
      'two numbers of four bits share a byte; expected an even rank',
    )


_DEFAULT_ISLAND = Island()


def read_islands(text: str) -> tuple[Island, ...]:
  """Reads islands from a flag; `show_islands` is the inverse.

  >>> read_islands('2x steps=40; rank=4,stages=2') == (
  ...   Island(count=2, steps=40),
  ...   Island(stages=2, rank=4),
  ... )
  True

  Raises:
    ConfigError: names the entry that cannot be read, and what is allowed.
  """
  entries = filter(None, (part.strip() for part in text.split(';')))
  return tuple(map(_read_island, entries))


def _read_island(entry: str) -> Island:
  match = _ENTRY.fullmatch(entry)
  assert match is not None
  allowed = [field.name for field in dataclasses.fields(Island)][:-1]
  found: dict[str, int | tuple[int, ...]] = {}
  for pair in filter(None, (part.strip() for part in match[2].split(','))):
    name, _, value = pair.partition('=')
    pattern = r'\d+(-\d+)*' if name == 'layers' else r'\d+'
    schema.require(
      name in allowed
      and bool(re.fullmatch(pattern, value, re.ASCII))
      and name not in found,
      f'islands: {entry!r}',
      f'expected each of {", ".join(allowed)} at most once, as in '
      f'2x steps=40,batch=16; got {pair!r}',
    )
    counts = tuple(map(int, value.split('-')))
    found[name] = counts if name == 'layers' else counts[0]
  path = f'islands: {entry!r}'
  raw = found | {'count': int(match[1] or 1)}
  return schema.build(Island, raw, f'{path}: ', [])


def show_islands(islands: Iterable[Island]) -> str:
  """Returns the text of islands for a flag, equal neighbors in one entry.

  >>> show_islands([Island(steps=40), Island(steps=40), Island(stages=2)])
  '2x steps=40; 1x stages=2'
  """
  groups: list[Island] = []
  for island in islands:
    if groups and dataclasses.replace(groups[-1], count=island.count) == island:
      count = groups[-1].count + island.count
      groups[-1] = dataclasses.replace(island, count=count)
    else:
      groups.append(island)
  return '; '.join(map(_show_island, groups))


def _show_island(island: Island) -> str:
  fields = ','.join(
    f'{field.name}={_show_value(getattr(island, field.name))}'
    for field in dataclasses.fields(island)[:-1]
    if getattr(island, field.name) != getattr(_DEFAULT_ISLAND, field.name)
  )
  return f'{island.count}x {fields}'.rstrip()


def _show_value(value: int | tuple[int, ...]) -> str:
  return '-'.join(map(str, value)) if isinstance(value, tuple) else str(value)
