"""The sections about the model and the text it is trained on."""

import dataclasses

from covenant.config import schema


@dataclasses.dataclass(frozen=True)
class Model(schema.Section):
  """A Llama-style decoder (covenant/models/llama.py)."""

  vocab_size: int = schema.positive(256)  # tokens
  width: int = schema.positive(64)
  layers: int = schema.positive(2)
  heads: int = schema.positive(4)
  kv_heads: int = schema.positive(4)  # a divisor of heads: grouped queries
  ffn_width: int = schema.positive(192)
  rope_theta: float = schema.positive(10_000.0)
  norm_eps: float = schema.positive(1e-5)
  tie_embeddings: bool = True
  scan_layers: bool = False  # one compiled layer: fast compile, slower on CPU
  # Activations that the backward pass computes again: none, all of a layer
  # except its products with weights, or all of a layer.
  remat: str = schema.bounded('none', choices=('none', 'dots', 'block'))
  # Kernel: plain XLA on any device, or fused on NVIDIA GPUs in bfloat16.
  attention: str = schema.bounded('portable', choices=('portable', 'cudnn'))
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


@dataclasses.dataclass(frozen=True)
class Data(schema.Section):
  """The source of tokens (covenant/data/)."""

  source: str = schema.bounded(
    'shakespeare', choices=('shakespeare', 'text', 'synthetic', 'shards')
  )
  path: str = ''  # text: a UTF-8 file or folder; shards: a tokenized folder
  tokenizer: str = schema.bounded(
    'bytes', choices=('bytes', 'bpe', 'sentencepiece')
  )
  tokenizer_path: str = ''  # a file; empty with 'bpe': one is trained
  context: int = schema.positive(64)  # tokens per sequence
  # Share of the text that nobody trains on.
  heldout_fraction: float = schema.bounded(0.1, low=1e-6, high=0.5)
  synthetic_tokens: int = schema.positive(1_000_000)  # length of that source

  def check(self) -> None:
    schema.require(
      bool(self.path) or self.source not in ('text', 'shards'),
      'data.path',
      f'expected a file or folder, because data.source={self.source!r}',
    )
    schema.require(
      bool(self.tokenizer_path) or self.tokenizer != 'sentencepiece',
      'data.tokenizer_path',
      "expected a .model file, because data.tokenizer='sentencepiece'",
    )
