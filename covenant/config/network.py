"""The sections about a network: phases, addresses, devices, pools."""

import dataclasses

from covenant.config import schema


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
  block_seconds: float = schema.positive(12.0)  # local
  # Own bucket, such as s3://...; empty: a folder under `path`. {hotkey} in it
  # is replaced.
  bucket: str = ''
  # (name, write) -> bucket, of 'file.py:attribute'; it opens the buckets of all
  # nodes by their names: `bucket`, or the hotkey. Empty: as `bucket` says.
  store: str = schema.bounded('', choices=('',), plugin=True)
  # Address of process 0, if several share a miner (covenant/node/multihost.py):
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
  listen: str = '127.0.0.1:8470'  # pool: address; 0.0.0.0:PORT is everywhere
  workers: tuple[str, ...] = schema.names()  # ss58 addresses; empty: anybody
  subrounds: int = schema.positive(10)  # per round, each with a merge
  steps: int = schema.positive(4)  # inner steps per lease
  audits: int = schema.positive(1)  # leases per sub-round computed again
  ban_rounds: int = schema.positive(100)  # rounds without leases after a fraud
  fee: float = schema.fraction(0.0)  # pool's share of the pay
  threshold: float = schema.bounded(0.1, low=0.0)  # smallest payment, in TAO
