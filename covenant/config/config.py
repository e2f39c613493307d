"""The schema of an experiment: every field, its bounds, and errors for people.

A file under `configs/` defines `get_config(variant='') -> Config`. `load`
reads one, applies `--config.optim.inner_steps=20` style overrides and
validates. Nothing else in the project sees a config that is not valid.
"""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from covenant.config import rules
from covenant.config import schema

ConfigError = schema.ConfigError
_field, _positive, _fraction = schema.bounded, schema.positive, schema.fraction


@dataclasses.dataclass(frozen=True)
class Model:
  """A Llama-style decoder (covenant/models/llama.py)."""

  vocab_size: int = _positive(256)
  width: int = _positive(64)
  layers: int = _positive(2)
  heads: int = _positive(4)
  kv_heads: int = _positive(4)  # grouped-query attention: divides heads
  ffn_width: int = _positive(192)
  rope_theta: float = _positive(10_000.0)
  norm_eps: float = _positive(1e-5)
  tie_embeddings: bool = True
  scan_layers: bool = False  # one compiled layer: fast compile, slower on CPU
  # What the backward pass computes again: nothing, all of a layer but its
  # products with weights, all of a layer.
  remat: str = _field('none', choices=('none', 'dots', 'block'))
  # portable: plain XLA, anywhere; cudnn: fused, on NVIDIA GPUs in bfloat16.
  attention: str = _field('portable', choices=('portable', 'cudnn'))
  # Positions of a sequence whose logits exist at once; 0: all.
  loss_chunk: int = _field(0, low=0)
  compute_dtype: str = _field('float32', choices=('float32', 'bfloat16'))
  z_loss: float = _field(0.0, low=0.0)  # coefficient of logsumexp(logits)^2


@dataclasses.dataclass(frozen=True)
class Data:
  """Where tokens come from (covenant/data/)."""

  source: str = _field(
    'shakespeare', choices=('shakespeare', 'text', 'synthetic', 'shards')
  )
  path: str = ''  # text: a UTF-8 file or folder; shards: a tokenized folder
  tokenizer: str = _field('bytes', choices=('bytes', 'bpe', 'sentencepiece'))
  tokenizer_path: str = ''  # a file to load; empty with 'bpe': train one
  context: int = _positive(64)  # tokens a sequence
  heldout_fraction: float = _field(0.1, low=1e-6, high=0.5)
  synthetic_tokens: int = _positive(1_000_000)


@dataclasses.dataclass(frozen=True)
class Inner:
  """Local steps, and their learning rate (covenant/optim/inner.py).

  Linear warm-up, cosine to `final_ratio` that may pause, and an anneal.
  """

  # muon: of matrices, by its own constants; embeddings and gains by AdamW.
  kind: str = _field('adamw', choices=('adamw', 'muon'))
  learning_rate: float = _positive(3e-3)
  warmup_steps: int = _field(0, low=0)
  decay_steps: int = _field(0, low=0)  # 0: rounds * inner_steps of this run
  final_ratio: float = _fraction(0.1)
  flat_start: int = _field(0, low=0)  # the step from which the cosine pauses
  flat_steps: int = _field(0, low=0)  # for so many; it goes on as if none were
  # From here, if not 0: linear up to `anneal_ratio`, then linear down to zero.
  anneal_start: int = _field(0, low=0)
  anneal_warmup_steps: int = _field(0, low=0)
  anneal_decay_steps: int = _positive(1)
  anneal_ratio: float = _fraction(0.25)
  b1: float = _fraction(0.9)
  b2: float = _fraction(0.95)
  eps: float = _positive(1e-8)
  weight_decay: float = _field(0.1, low=0.0)
  clip_norm: float = _positive(1.0)
  # Warm-up of who joins a run under way, or lost its moments; 0: none.
  rejoin_steps: int = _field(30, low=0)
  batch_size: int = _positive(8)  # sequences a miner and inner step
  microbatch_size: int = _field(0, low=0)  # of them at once; 0 is all


@dataclasses.dataclass(frozen=True)
class Outer:
  """SGD with Nesterov momentum on the aggregated delta."""

  learning_rate: float = _positive(1.0)
  momentum: float = _field(0.0, low=0.0, high=0.999999)


@dataclasses.dataclass(frozen=True)
class Compression:
  """k values of every block of an error-fed delta, then a quantizer."""

  # The k largest, k at random, or the k largest of the cosine transform.
  kind: str = _field('topk', choices=('topk', 'randomk', 'dct'))
  k: int = _positive(64)
  block: tuple[int, int] = (64, 64)
  # 64 x 64 tiles of one density, or as deployed, where vectors travel whole.
  layout: str = _field('tiles', choices=('tiles', 'divisors'))
  # Of the indices: 8 bits each; 7.5, not of a fixed length; 12, as deployed.
  codec: str = _field('elias-fano', choices=('elias-fano', 'rice', 'pack12'))
  quantizer: str = _field(
    'sign',
    choices=(
      'none',
      'sign',
      'sign-tensor',
      'sign-magnitude',
      'statistical',
      'linear',
    ),
  )
  error_decay: float = _fraction(0.95)  # 0 is no error feedback


@dataclasses.dataclass(frozen=True)
class Aggregation:
  """How the peers' deltas become one (covenant/optim/aggregate.py)."""

  mean: str = _field('senders', choices=('senders', 'all'))
  clip: str = _field('median', choices=('median', 'none'))
  # An element that fewer send moves by as much less.
  least_senders: int = _positive(1)
  trim: bool = False  # of each element the largest and the smallest value
  # A peer's value of an element, in its mean magnitude in the tensor; 0: any.
  cap: float = _field(0.0, low=0.0)
  # How much a peer counts (covenant/optim/weight.py): as any other, by what it
  # trained on, or as any other with every tensor at the median norm.
  weight: str = _field('equal', choices=('equal', 'tokens', 'normalized'))


@dataclasses.dataclass(frozen=True)
class Optim:
  method: str = _field(
    'sparseloco', choices=('sparseloco', 'diloco', 'demo', 'ddp')
  )
  inner_steps: int = _positive(10)
  # That a miner may train on in a round; 0: inner_steps * inner.batch_size.
  most_sequences: int = _field(0, low=0)
  # Inner steps of a round that are trained while the last one is exchanged; 0:
  # the exchange is waited for (covenant/train/local.py).
  overlap: int = _field(0, low=0)
  # Rounds by which the parameters that a delta was trained from may be older
  # than its round, and what it counts for each of them.
  staleness: int = _field(0, low=0, high=8)
  staleness_discount: float = _field(0.5, low=0.02, high=1.0)
  inner: Inner = Inner()
  outer: Outer = Outer()
  compression: Compression = Compression()
  aggregation: Aggregation = Aggregation()


@dataclasses.dataclass(frozen=True)
class Eval:
  every: int = _positive(10)  # rounds
  sequences: int = _positive(512)  # held-out sequences an evaluation


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int = _positive(10)  # rounds: on the own disk, with all private state
  keep: int = _positive(2)  # the newest ones that stay, of either kind
  publish: int = _positive(10)  # rounds: by validators, for who joins


@dataclasses.dataclass(frozen=True)
class Phases:
  """The phases of a round, in blocks (covenant/protocol/round.py)."""

  origin: int = _field(0, low=0)  # the block with which round 0 starts
  round_blocks: int = _positive(115)
  put_blocks: int = _field(6, low=2)  # its last ones: payloads are committed
  select_blocks: int = _positive(4)  # of the next: validators check and agree
  takeover_blocks: int = _positive(4)  # more, if the leader is silent
  confirmations: int = _positive(1)  # blocks that a fork may take back


@dataclasses.dataclass(frozen=True)
class Network:
  """Where a process finds the others. Not part of what a run computes."""

  # local: a file that processes of one machine share.
  chain: str = _field('local', choices=('local', 'bittensor'))
  name: str = 'finney'  # bittensor: finney, test, or ws://HOST:PORT
  netuid: int = _field(3, low=0)
  wallet: str = 'default'
  hotkey: str = 'default'
  path: str = ''  # local: a folder for the chain and the buckets
  block_seconds: float = _positive(12.0)  # local
  # The own bucket: a folder under `path` when empty, or s3://, r2:// ...;
  # {hotkey} in it is replaced.
  bucket: str = ''
  # Of a miner of several processes (covenant/node/multihost.py): HOST:PORT of the
  # first, or auto where JAX finds out, as under Slurm; empty is one process.
  coordinator: str = ''
  processes: int = _positive(1)  # where the coordinator is HOST:PORT
  process: int = _field(0, low=0)  # which one this is


@dataclasses.dataclass(frozen=True)
class Devices:
  """The mesh of one process's devices (covenant/models/sharding.py).

  Not part of what a run computes.
  """

  # Emulated miners side by side; 0: as many as there are devices for.
  peers: int = _field(1, low=0)
  # Copies of a miner's parameters that share its batch; 0: as peers.
  data: int = _field(1, low=0)
  fsdp: int = _positive(1)  # shards of the parameters, that share the batch
  tensor: int = _positive(1)  # shards of heads and of the ffn
  # Of an island with a rank and as many stages; the others of these then are 1.
  stage: int = _positive(1)
  # What a phase does not need waits in host memory, where the backend can.
  offload: bool = False


@dataclasses.dataclass(frozen=True)
class Pool:
  """Many machines under one uid (covenant/pool/pool.py, docs/islands.md).

  A pool's and its workers' own affair; the network sees one miner.
  """

  url: str = ''  # of a worker's pool: http://HOST:PORT
  key: str = '~/.covenant/worker.key'  # of a worker; made at its first start
  batch: int = _positive(64)  # sequences a step that a worker has memory for
  listen: str = '127.0.0.1:8470'  # of a pool; 0.0.0.0:PORT is everywhere
  workers: str = ''  # who may work, ss58 addresses by commas; empty: anybody
  subrounds: int = _positive(10)  # a round: so often the workers' deltas meet
  steps: int = _positive(4)  # inner steps of a lease
  audits: int = _positive(1)  # leases a sub-round that the pool computes again
  ban_rounds: int = _positive(100)  # without leases, for who failed an audit
  fee: float = _fraction(0.0)  # the pool's share of what the network pays
  threshold: float = _field(0.1, low=0.0)  # TAO due before they are paid


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `--role=plan` reckons with (covenant/plan/). Nothing trains by it."""

  hardware: str = '1xH100'  # of one peer: devices x kind
  memory_fraction: float = _fraction(0.94)  # of a device that XLA may have
  peak_fraction: float = _positive(0.25)  # of its bfloat16 peak, in training
  compute_minutes: float = _field(0.0, low=0.0)  # a round; 0: what steps take
  peers: int = _positive(20)  # that count in a round
  upload: float = _positive(110.0)  # of a peer, megabytes (not bits) a second
  download: float = _positive(500.0)
  compile: bool = True  # false: programs are only lowered, in seconds
  # Compile for this too, such as 'v5p:4x4x4'; needs the extra 'plan-tpu'.
  tpu_topology: str = ''
  # Whose hardware to plan islands for (covenant/plan/inventory.py), such
  # as '8xB200, 64xA100 in pairs, 400x4090 on 200 Mb/s'; empty: one peer's.
  inventory: str = ''
  # A token whose activations a pipeline compresses 100-fold counts for so much
  # less, by the logarithm of the ratio (covenant/plan/partition.py); assumed.
  compression_cost: float = _fraction(0.1)
  # Links of the simulated wall-clock (covenant/plan/simulated_links.py), beside what
  # the inventory says: how they vary, what is sent again, who is away.
  jitter: float = _field(0.0, low=0.0, high=2.0)
  loss: float = _field(0.0, low=0.0, high=0.9)
  churn: float = _field(0.0, low=0.0, high=0.5)


@dataclasses.dataclass(frozen=True)
class Gauntlet:
  """Who is evaluated, heard and paid (covenant/gauntlet/, docs/gauntlet.md)."""

  # Peers that count in a round, at most.
  contributors: int = _field(20, low=1, high=1023)
  probation: float = _fraction(0.25)  # of these places, for newcomers
  evaluate: int = _field(20, low=0)  # peers a round; 0: who is valid is equal
  sequences: int = _field(16, low=2)  # of each kind, an evaluation
  step_fraction: float = _positive(0.2)  # of the outer learning rate
  memory: int = _positive(20)  # evaluations that the averages look back
  copy_similarity: float = _field(0.5, low=0.1, high=1.0)  # from here a copy
  penalty_rounds: int = _positive(20)  # a penalty lasts, from the last offence
  # Shares of the pay: gain ** power, or by rank (2:1, then reserves halving).
  incentive: str = _field('gain', choices=('gain', 'ramp'))
  power: float = _field(2.0, low=1.0, high=4.0)
  burn: float = _fraction(0.0)  # share withheld, paid to burn_uid
  burn_uid: int = _field(0, low=0)
  weights_every: int = _positive(3)  # rounds: validators set weights


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment. `configs/*.py` each make one."""

  name: str = 'unnamed'
  seed: int = _field(0, low=0, high=2**31 - 1)
  rounds: int = _positive(100)
  miners: int = _positive(8)
  validators: int = _positive(1)
  # Emulated: names of covenant/adversaries/registry.py, separated by commas;
  # those of miners are the last miners, those of validators the last ones.
  adversaries: str = ''
  # How miners differ (covenant/train/island.py): '2x steps=40; 4x steps=10'.
  # Emulated: one entry a miner; of a process: its own. Empty: all are alike.
  islands: str = ''
  # A folder in Hugging Face's format whose model the run begins with
  # (covenant/models/hf.py); empty: a random one.
  pretrained: str = ''
  model: Model = Model()
  data: Data = Data()
  optim: Optim = Optim()
  gauntlet: Gauntlet = Gauntlet()
  eval: Eval = Eval()
  checkpoint: Checkpoint = Checkpoint()
  phases: Phases = Phases()
  network: Network = Network()
  devices: Devices = Devices()
  pool: Pool = Pool()
  plan: Plan = Plan()


def load(source: str, overrides: Iterable[str] = ()) -> Config:
  """The validated config of a file, edited.

  Args:
    source: `configs/shakespeare.py`, or with a variant
      `configs/shakespeare.py:smoke`, or the `config.json` of a workdir.
    overrides: such as `optim.inner_steps=20`.

  Raises:
    ConfigError: naming the file or the field, and what is allowed.
  """
  name, _, variant = source.partition(':')
  path = pathlib.Path(name)
  if not path.is_file():
    near = ', '.join(sorted(map(str, path.parent.glob('*.py')))) or 'none'
    raise ConfigError(f'--config: there is no file {name!r}; there: {near}')
  if path.suffix == '.json':
    config = from_json(path.read_text(encoding='utf-8'))
  else:
    config = _execute(path, variant)
  raw = dataclasses.asdict(config)
  for override in overrides:
    schema.override(raw, override, flatten(Config()))
  return parse(raw)


def _execute(path: pathlib.Path, variant: str) -> Config:
  """What `get_config` of a file returns."""
  spec = importlib.util.spec_from_file_location('experiment_config', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(variant)
  except ConfigError:
    raise
  except Exception as e:  # a config file is code; whatever it raises is said
    raise ConfigError(f'{path}: {type(e).__name__}: {e}') from e
  if not isinstance(config, Config):
    raise ConfigError(
      f'{path}: get_config must return a Config, got {type(config).__name__}'
    )
  return config


def choose(variant: str, variants: Mapping[str, Config]) -> Config:
  """The variant that `get_config` was asked for; '' is the plain one."""
  if variant not in variants:
    known = ', '.join(repr(name) for name in variants if name) or 'none'
    raise ConfigError(
      f'--config: there is no variant {variant!r}; expected one of: {known}'
    )
  return variants[variant]


def parse(raw: Mapping[str, Any]) -> Config:
  """The typed, validated config of nested mappings.

  Raises:
    ConfigError: naming the first field that cannot be, and what is allowed.
  """
  config = schema.build(Config, raw, '', flatten(Config()))
  rules.check(config)
  return config


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def identity(config: Config) -> str:
  """What nodes of one run must have in common, as text.

  Where a node finds the others, on which devices and by which kernels it
  computes, how often it looks at the model and saves it, how many take part
  and what a plan reckons with are its own affair.
  """
  raw: dict[str, Any] = dataclasses.asdict(config)
  for own in (
    'miners',
    'validators',
    'adversaries',
    'islands',
    'eval',
    'checkpoint',
    'network',
    'devices',
    'pool',
    'plan',
  ):
    del raw[own]
  for own in ('remat', 'attention', 'loss_chunk'):
    del raw['model'][own]
  # Wherever it lies; that it is the same, manifests say (fingerprint).
  raw['pretrained'] = pathlib.Path(config.pretrained).name
  return json.dumps(raw)


def from_json(text: str) -> Config:
  try:
    raw = json.loads(text)
  except ValueError as e:
    raise ConfigError(f'not a config in JSON: {e}') from e
  return parse(raw)


def flatten(config: Config) -> dict[str, Any]:
  """`{'optim.inner_steps': 10, ...}`."""
  return dict(schema.leaves(config, ''))


def differences(old: Config, new: Config) -> list[str]:
  """One line a field that differs: `rounds: 100 there, 200 here`."""
  there, here = flatten(old), flatten(new)
  return [
    f'{name}: {there[name]!r} there, {here[name]!r} here'
    for name in there
    if there[name] != here[name]
  ]
