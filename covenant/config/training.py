"""The sections about training: model, data, algorithm, evaluation of peers."""

import dataclasses
import json
from typing import ClassVar

from covenant.config import schema

WEIGHT_UNITS = 10_000  # parts in which the weights of a mixture are counted


@dataclasses.dataclass(frozen=True)
class Model(schema.Section):
  """A Llama-style decoder (covenant/models/llama.py)."""

  packed: ClassVar[bool] = False  # True: a `PackedModel`
  vocab_size: int = schema.positive(256)  # tokens
  width: int = schema.positive(64)
  layers: int = schema.positive(2)
  heads: int = schema.positive(4)
  kv_heads: int = schema.positive(4)  # a divisor of heads: grouped queries
  ffn_width: int = schema.positive(192)
  rope_theta: float = schema.positive(10_000.0)
  # Slower rotations for contexts beyond that of the first training, as in
  # Llama 3.1: the factor (1: none), the turns per context below which all and
  # above which no rotation is slowed, and that context in tokens.
  rope_factor: float = schema.positive(1.0)
  rope_low: float = schema.positive(1.0)
  rope_high: float = schema.positive(4.0)
  rope_context: int = schema.positive(8192)
  norm_eps: float = schema.positive(1e-5)
  tie_embeddings: bool = True
  scan_layers: bool = False  # one compiled layer: fast compile, slower on CPU
  # Activations that the backward pass computes again: none, all of a layer
  # except its products with weights, or all of a layer.
  remat: str = schema.bounded('none', choices=('none', 'dots', 'block'))
  # Kernel: plain XLA, fused on NVIDIA GPUs in bfloat16, or fused where it can.
  attention: str = schema.bounded(
    'portable', choices=('portable', 'cudnn', 'auto')
  )
  # Positions of a sequence whose logits exist at once; 0: all.
  loss_chunk: int = schema.bounded(0, low=0)
  compute_dtype: str = schema.bounded(
    'float32', choices=('float32', 'bfloat16')
  )
  z_loss: float = schema.bounded(0.0, low=0.0)  # factor of logsumexp(logits)^2

  def check(self) -> None:
    schema.require(
      self.width % (2 * self.heads) == 0,
      'model.heads',
      'model.width must be an even multiple of it (rotary pairs), '
      f'got width {self.width} and {self.heads} heads',
    )
    schema.require(
      self.heads % self.kv_heads == 0,
      'model.kv_heads',
      f'must divide model.heads = {self.heads}, got {self.kv_heads}',
    )
    schema.require(
      self.rope_high > self.rope_low,
      'model.rope_high',
      f'must be above model.rope_low = {self.rope_low}, got {self.rope_high}',
    )


@dataclasses.dataclass(frozen=True)
class PackedModel(Model):
  """A model in which positions of one document attend to each other only."""

  packed: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class DataShare(schema.Section):
  """One folder of shards in a mixture."""

  path: str = ''  # folder or URL of the shards
  weight: float = schema.positive(1.0)  # share, relative to the others
  digest: str = ''  # digest of the manifest; empty: any

  def check(self) -> None:
    schema.require(
      bool(self.path),
      'data.phases',
      'expected the path of a folder or URL of shards, got none',
    )
    _check_digest('data.phases', self.digest)


@dataclasses.dataclass(frozen=True)
class DataPhase(schema.Section):
  """The mixture that rounds draw their sequences from, from a round on."""

  start: int = schema.bounded(0, low=0)  # first round
  mixture: tuple[DataShare, ...] = ()

  def check(self) -> None:
    paths = [share.path for share in self.mixture]
    schema.require(bool(paths), 'data.phases', 'expected a mixture, got none')
    schema.require(
      len(set(paths)) == len(paths),
      'data.phases',
      f'expected each path once in a mixture, got {paths}',
    )
    total = sum(share.weight for share in self.mixture)
    for share in self.mixture:
      schema.require(
        share.weight / total * WEIGHT_UNITS >= 1,
        'data.phases',
        f'expected weights of at least 1 in {WEIGHT_UNITS} of their sum, got '
        f'{share.weight} of {total} for {share.path!r}',
      )


def _check_digest(field: str, digest: str) -> None:
  schema.require(
    not digest or len(digest) == 64 and set(digest) <= set('0123456789abcdef'),
    field,
    f'digest: expected 64 hex digits, as --role=data prints, got {digest!r}',
  )


def read_phases(text: str) -> schema.Value:
  """Returns the JSON of phases; raises ConfigError."""
  try:
    return json.loads(text) if text else ()
  except ValueError as e:
    raise schema.ConfigError(
      'data.phases: expected JSON, such as [{"start": 0, "mixture": [{"path": '
      f'"data/dclm", "weight": 1}}]}}]: {e}'
    ) from None


def _show_json(value: schema.Value) -> str:
  return json.dumps([dataclasses.asdict(x) for x in value]) if value else ''


@dataclasses.dataclass(frozen=True)
class Data(schema.Section):
  """The source of tokens (covenant/data/, docs/data.md)."""

  source: str = schema.bounded(
    'shakespeare', choices=('shakespeare', 'text', 'synthetic', 'shards')
  )
  # text: a file, folder, glob or URL; shards: a tokenized folder or its URL.
  path: str = ''
  field: str = 'text'  # column of the text in JSON lines, Parquet and Arrow
  # Digest of the shards' manifest, or of text and tokenizer; empty: any.
  digest: str = ''
  # Mixtures of shards by their first round, instead of a path.
  phases: tuple[DataPhase, ...] = schema.listed(read_phases, _show_json)
  # Own folders, as DIGEST=PATH, of shards that amendments name.
  places: tuple[str, ...] = schema.names()
  tokenizer: str = schema.bounded(
    'bytes', choices=('bytes', 'bpe', 'sentencepiece')
  )
  tokenizer_path: str = ''  # a file; empty with 'bpe': one is trained
  end_of_text: str = ''  # special token; empty: as the tokenizer's files say
  context: int = schema.positive(64)  # tokens per sequence
  # Sequences that cross the ends of documents: attention and loss ignore these
  # ends, or stay within documents.
  packing: str = schema.bounded(
    'concatenate', choices=('concatenate', 'documents')
  )
  # Share of the text that nobody trains on.
  heldout_fraction: float = schema.bounded(0.1, low=1e-6, high=0.5)
  synthetic_tokens: int = schema.positive(1_000_000)  # length of that source
  cache_gb: float = schema.positive(4.0)  # disk for shards of a store, GB

  @property
  def paths(self) -> tuple[str, ...]:
    """The folders and URLs of shards, each once, in order."""
    shares = [share for phase in self.phases for share in phase.mixture]
    return tuple(dict.fromkeys([s.path for s in shares] or [self.path]))

  def check(self) -> None:
    _check_digest('data.digest', self.digest)
    schema.require(
      bool(self.path or self.phases) or self.source not in ('text', 'shards'),
      'data.path',
      f'expected a file or folder, because data.source={self.source!r}',
    )
    schema.require(
      bool(self.tokenizer_path) or self.tokenizer != 'sentencepiece',
      'data.tokenizer_path',
      "expected a .model file, because data.tokenizer='sentencepiece'",
    )
    if not self.phases:
      return
    schema.require(
      self.source == 'shards' and not self.path and not self.digest,
      'data.phases',
      "expected data.source='shards' and neither data.path nor data.digest "
      f'beside it, got {self.source!r}, {self.path!r} and {self.digest!r}',
    )
    starts = [phase.start for phase in self.phases]
    schema.require(
      starts[0] == 0 and starts == sorted(set(starts)),
      'data.phases',
      f'expected rounds that begin with 0 and ascend, got {starts}',
    )


@dataclasses.dataclass(frozen=True)
class Inner(schema.Section):
  """The inner optimizer and its learning rate (covenant/optim/inner.py).

  The rate warms up linearly, follows a cosine down to `final_ratio` that may
  pause, and may end in an anneal.
  """

  # muon: for matrices, with constants of its own; AdamW for all other leaves.
  kind: str = schema.bounded('adamw', choices=('adamw', 'muon'))
  learning_rate: float = schema.positive(3e-3)  # peak
  warmup_steps: int = schema.bounded(0, low=0)
  decay_steps: int = schema.bounded(0, low=0)  # 0: all inner steps of the run
  final_ratio: float = schema.fraction(0.1)  # last rate in units of the peak
  flat_start: int = schema.bounded(0, low=0)  # first step of the cosine's pause
  flat_steps: int = schema.bounded(0, low=0)  # length of the pause
  anneal_start: int = schema.bounded(0, low=0)  # first step; 0: no anneal
  anneal_warmup_steps: int = schema.bounded(0, low=0)  # up to anneal_ratio
  anneal_decay_steps: int = schema.positive(1)  # from there down to zero
  anneal_ratio: float = schema.fraction(0.25)  # in units of the peak
  b1: float = schema.fraction(0.9)
  b2: float = schema.fraction(0.95)
  eps: float = schema.positive(1e-8)
  weight_decay: float = schema.bounded(0.1, low=0.0)
  clip_norm: float = schema.positive(1.0)  # largest global norm of a gradient
  # Warm-up steps of a miner that joins late or lost its moments; 0: none.
  rejoin_steps: int = schema.bounded(30, low=0)
  batch_size: int = schema.positive(8)  # sequences per miner and inner step
  # Sequences per forward and backward pass; 0: the whole batch.
  microbatch_size: int = schema.bounded(0, low=0)

  def check(self) -> None:
    schema.require(
      not self.microbatch_size or self.batch_size % self.microbatch_size == 0,
      'optim.inner.microbatch_size',
      f'must divide optim.inner.batch_size = {self.batch_size}, '
      f'got {self.microbatch_size}',
    )
    schema.require(
      self.anneal_start == 0 or self.anneal_start >= self.warmup_steps,
      'optim.inner.anneal_start',
      f'expected 0, for none, or a step after the warm-up of '
      f'{self.warmup_steps}, got {self.anneal_start}',
    )


@dataclasses.dataclass(frozen=True)
class Outer(schema.Section):
  """The optimizer that descends the aggregated delta."""

  # SGD with Nesterov momentum, or (learning_rate, momentum) -> optax.
  kind: str = schema.bounded('nesterov', choices=('nesterov',), plugin=True)
  learning_rate: float = schema.positive(1.0)
  momentum: float = schema.bounded(0.0, low=0.0, high=0.999999)


@dataclasses.dataclass(frozen=True)
class Compression(schema.Section):
  """k values of every block of an error-fed delta, and a quantizer."""

  # Choice: the k largest, k at random, the k largest of a cosine transform; or
  # (k, block, quantizer, layout) -> compression.Compression.
  kind: str = schema.bounded(
    'topk', choices=('topk', 'randomk', 'dct'), plugin=True
  )
  k: int = schema.positive(64)  # values per block
  block: tuple[int, int] = (64, 64)  # rows and columns
  # tiles: of `block`, at one density; divisors: as deployed by Templar, where
  # vectors travel whole.
  layout: str = schema.bounded('tiles', choices=('tiles', 'divisors'))
  # Encoding of indices: 8 bits each; 7.5 on average, of no fixed length.
  codec: str = schema.bounded('elias-fano', choices=('elias-fano', 'rice'))
  quantizer: str = schema.bounded(
    'sign',
    choices=(
      'none',
      'sign',
      'sign-tensor',
      'sign-magnitude',
      'statistical',
      'linear',
    ),
    plugin=True,  # a quantize.Quantizer
  )
  error_decay: float = schema.fraction(0.95)  # per round; 0: no error feedback

  def check(self) -> None:
    height, width = self.block
    schema.require(
      height >= 1 and width >= 1,
      'optim.compression.block',
      f'expected two positive sides, got {self.block}',
    )
    schema.require(
      self.k <= height * width,
      'optim.compression.k',
      f'expected at most {height * width}, the elements of one {height} x '
      f'{width} block, got {self.k}',
    )


@dataclasses.dataclass(frozen=True)
class Aggregation(schema.Section):
  """The mean of the peers' deltas (covenant/optim/reduce.py)."""

  # Divisor of an element's sum: the peers that sent it, or all peers.
  mean: str = schema.bounded('senders', choices=('senders', 'all'))
  # Largest norm of a peer's delta: the median of all peers', or any.
  clip: str = schema.bounded('median', choices=('median', 'none'))
  # Weight of a peer in the mean (covenant/optim/weight.py): equal, or in
  # proportion to its tokens.
  weight: str = schema.bounded('equal', choices=('equal', 'tokens'))


@dataclasses.dataclass(frozen=True)
class Optim(schema.Section):
  """The training method and the work of a round."""

  method: str = schema.bounded(
    'sparseloco', choices=('sparseloco', 'diloco', 'demo', 'ddp')
  )
  inner_steps: int = schema.positive(10)  # per round
  # Sequences assigned to a miner per round; 0: inner_steps * inner.batch_size.
  most_sequences: int = schema.bounded(0, low=0)
  # Inner steps of a round that run while the last round's deltas are exchanged;
  # 0: training waits for the exchange (covenant/train/replica.py).
  overlap: int = schema.bounded(0, low=0)
  inner: Inner = Inner()
  outer: Outer = Outer()
  compression: Compression = Compression()
  aggregation: Aggregation = Aggregation()

  def check(self) -> None:
    per_step = self.method in ('ddp', 'demo')
    schema.require(
      self.method != 'demo' or self.compression.kind == 'dct',
      'optim.compression.kind',
      f"expected 'dct' with optim.method='demo', got {self.compression.kind!r}",
    )
    schema.require(
      self.method != 'demo' or self.inner.kind == 'adamw',
      'optim.inner.kind',
      "expected 'adamw', the default, with optim.method='demo', which has no "
      f'inner optimizer, got {self.inner.kind!r}',
    )
    schema.require(
      not per_step or self.inner_steps == 1,
      'optim.inner_steps',
      f'expected 1 with optim.method={self.method!r} (it exchanges every step; '
      f'raise rounds instead), got {self.inner_steps}',
    )
    schema.require(
      self.overlap < self.inner_steps or not self.overlap,
      'optim.overlap',
      f'expected fewer than optim.inner_steps = {self.inner_steps}, '
      f'got {self.overlap}',
    )


@dataclasses.dataclass(frozen=True)
class Gauntlet(schema.Section):
  """The evaluation of peers (covenant/gauntlet/, docs/gauntlet.md)."""

  contributors: int = schema.bounded(20, low=1, high=1023)  # peers per round
  probation: float = schema.fraction(0.25)  # share of these for newcomers
  # Peers evaluated per round; 0: none, and all valid peers are paid equally.
  evaluate: int = schema.bounded(20, low=0)
  # Sequences per evaluation, of a peer's own data and of random data each.
  sequences: int = schema.bounded(16, low=4)
  step_fraction: float = schema.positive(0.2)  # of the outer learning rate
  memory: int = schema.positive(20)  # evaluations in a moving average
  # Smallest similarity of two messages that makes the later one a copy.
  copy_similarity: float = schema.bounded(0.5, low=0.1, high=1.0)
  penalty_rounds: int = schema.positive(20)  # rounds after the last offence
  # Scores and pay: ours, or the deployed ones, for comparison.
  rules: str = schema.bounded('covenant', choices=('covenant', 'templar'))
  # Pay: by verified work, or by rank (2:1, reserves halving).
  incentive: str = schema.bounded('gain', choices=('gain', 'ramp'))
  burn: float = schema.fraction(0.0)  # share withheld and paid to burn_uid
  burn_uid: int = schema.bounded(0, low=0)
  weights_every: int = schema.positive(3)  # rounds between weights
  # Rise of the held-out loss above the median of the last rounds, as a share,
  # with which validators propose a rollback; 0: only if it is not finite.
  rollback_rise: float = schema.bounded(0.0, low=0.0, high=10.0)
