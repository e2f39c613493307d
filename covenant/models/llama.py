"""A Llama-style decoder: pure `init` and `apply` over a plain pytree.

Touvron et al, `LLaMA <https://arxiv.org/abs/2302.13971>`_, 2023: RMSNorm before
each residual branch, rotary positions, grouped-query attention, SwiGLU.

Parameters are nested dicts of float32 arrays. Every weight is a matrix
[in, out], heads merged, since the compressor cuts matrices in blocks. With
`scan_layers` the leaves under 'layers' gain a leading axis of length `layers`;
without, there are 'layers_0', 'layers_1', ...

Shapes: B batch, L length, D width, V vocabulary, H heads, N key and value
heads, G = H / N queries that share one, K = D / H head width, F ffn width.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from covenant import config

# `initializer_range` of Hugging Face's LlamaConfig; GPT-2's before it.
_STDDEV = 0.02


def _weight(
  module: nn.Module, name: str, shape: tuple[int, int], stddev: float = _STDDEV
) -> jax.Array:
  """A float32 parameter, cast to the model's compute dtype."""
  w = module.param(name, nn.initializers.normal(stddev), shape, jnp.float32)
  return w.astype(module.model.compute_dtype)


def _linear(x_BxLxD: jax.Array, w_DxF: jax.Array, dtype=None) -> jax.Array:
  """X @ w as a product of two matrices, in `dtype` if given.

  Flat, XLA's CPU backend runs the weight gradient without first transposing
  the output gradient: a quarter of a training step.
  """
  B, L, D = x_BxLxD.shape
  y_BLxF = jnp.matmul(
    x_BxLxD.reshape(B * L, D), w_DxF, preferred_element_type=dtype
  )
  return y_BLxF.reshape(B, L, -1)


def _branch_stddev(model: config.Model) -> float:
  """Keeps the residual stream's variance constant in depth.

  Radford et al, GPT-2, 2019, section 2.3: 1 / sqrt(number of branches).
  """
  return _STDDEV / math.sqrt(2 * model.layers)


class RMSNorm(nn.Module):
  """Zhang & Sennrich, `RMSNorm <https://arxiv.org/abs/1910.07467>`_, 2019."""

  model: config.Model

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    gain_D = self.param(
      'gain', nn.initializers.ones, x_BxLxD.shape[-1:], jnp.float32
    )
    wide_BxLxD = x_BxLxD.astype(jnp.float32)
    mean_BxLx1 = jnp.mean(jnp.square(wide_BxLxD), axis=-1, keepdims=True)
    scale_BxLx1 = jax.lax.rsqrt(mean_BxLx1 + self.model.norm_eps)
    y_BxLxD = wide_BxLxD * scale_BxLx1 * gain_D[None, None]
    return y_BxLxD.astype(x_BxLxD.dtype)


def rotate(x_BxHxLxK: jax.Array, theta: float) -> jax.Array:
  """Rotary positions 0 to L - 1, on the pairs (i, i + K / 2).

  Su et al, `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021, equation 34,
  with the pairs as in GPT-NeoX and Hugging Face's Llama.
  """
  length, half = x_BxHxLxK.shape[2], x_BxHxLxK.shape[3] // 2
  # In float64 on the host, so that far positions keep their precision.
  frequency = theta ** (-np.arange(half) / half)
  angle_1x1xLxI = np.outer(np.arange(length), frequency)[None, None]
  cos_1x1xLxI = np.cos(angle_1x1xLxI).astype(np.float32)
  sin_1x1xLxI = np.sin(angle_1x1xLxI).astype(np.float32)
  a_BxHxLxI, b_BxHxLxI = jnp.split(x_BxHxLxK.astype(jnp.float32), 2, axis=-1)
  y_BxHxLxK = jnp.concatenate(
    [
      a_BxHxLxI * cos_1x1xLxI - b_BxHxLxI * sin_1x1xLxI,
      b_BxHxLxI * cos_1x1xLxI + a_BxHxLxI * sin_1x1xLxI,
    ],
    axis=-1,
  )
  return y_BxHxLxK.astype(x_BxHxLxK.dtype)


class Attention(nn.Module):
  """Causal grouped-query attention.

  Ainslie et al, `GQA <https://arxiv.org/abs/2305.13245>`_, 2023: `heads` query
  heads; each group of heads / kv_heads shares one key and value head.
  """

  model: config.Model

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    m = self.model
    B, L, D = x_BxLxD.shape
    N, G, K = m.kv_heads, m.heads // m.kv_heads, m.width // m.heads

    def project(name, heads):
      y_BxLxHK = _linear(x_BxLxD, _weight(self, name, (D, heads * K)))
      return y_BxLxHK.reshape(B, L, heads, K).swapaxes(1, 2)

    q_BxHxLxK = rotate(project('query', N * G), m.rope_theta)
    k_BxNxLxK = rotate(project('key', N), m.rope_theta)
    v_BxNxLxK = project('value', N)

    # The G queries that share a key are rows of one product: Q = G * L. Heads
    # come before positions, so that each product is of contiguous matrices.
    q_BxNxQxK = q_BxHxLxK.reshape(B, N, G * L, K) * (1 / math.sqrt(K))
    score_BxNxQxL = jnp.einsum(
      'bnqk,bnlk->bnql',
      q_BxNxQxK,
      k_BxNxLxK,
      preferred_element_type=jnp.float32,
    )
    position_Q = jnp.tile(jnp.arange(L), G)
    seen_QxL = position_Q[:, None] >= jnp.arange(L)[None]
    score_BxNxQxL = jnp.where(seen_QxL[None, None], score_BxNxQxL, -1e30)
    top_BxNxQx1 = jnp.max(score_BxNxQxL, axis=-1, keepdims=True)
    p_BxNxQxL = jnp.exp(score_BxNxQxL - jax.lax.stop_gradient(top_BxNxQx1))
    # Softmax's division after the product: K wide, not L.
    z_BxNxQx1 = jnp.sum(p_BxNxQxL, axis=-1, keepdims=True)
    y_BxNxQxK = jnp.einsum(
      'bnql,bnlk->bnqk',
      p_BxNxQxL.astype(v_BxNxLxK.dtype),
      v_BxNxLxK,
      preferred_element_type=jnp.float32,
    )
    y_BxNxQxK = (y_BxNxQxK / z_BxNxQx1).astype(x_BxLxD.dtype)

    y_BxLxHxK = y_BxNxQxK.reshape(B, N * G, L, K).swapaxes(1, 2)
    w_HKxD = _weight(self, 'output', (N * G * K, D), _branch_stddev(m))
    return _linear(y_BxLxHxK.reshape(B, L, N * G * K), w_HKxD)


class SwiGLU(nn.Module):
  """Shazeer, `GLU variants <https://arxiv.org/abs/2002.05202>`_, 2020."""

  model: config.Model

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    D, F = self.model.width, self.model.ffn_width
    gate_BxLxF = _linear(x_BxLxD, _weight(self, 'gate', (D, F)))
    up_BxLxF = _linear(x_BxLxD, _weight(self, 'up', (D, F)))
    w_FxD = _weight(self, 'down', (F, D), _branch_stddev(self.model))
    return _linear(nn.silu(gate_BxLxF) * up_BxLxF, w_FxD)


class Block(nn.Module):
  """One layer: attention, then the feed-forward network, each a residual."""

  model: config.Model

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    m = self.model
    y_BxLxD = RMSNorm(m, name='attention_norm')(x_BxLxD)
    x_BxLxD = x_BxLxD + Attention(m, name='attention')(y_BxLxD)
    y_BxLxD = RMSNorm(m, name='ffn_norm')(x_BxLxD)
    return x_BxLxD + SwiGLU(m, name='ffn')(y_BxLxD)


class Llama(nn.Module):
  """tokens_BxL -> logits_BxLxV, float32."""

  model: config.Model

  @nn.compact
  def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
    m = self.model
    table_VxD = self.param(
      'embedding',
      nn.initializers.normal(_STDDEV),
      (m.vocab_size, m.width),
      jnp.float32,
    )
    # Cast after the look-up: its gradient is then summed in float32.
    x_BxLxD = table_VxD[tokens_BxL].astype(m.compute_dtype)
    block: Any = Block
    if m.remat != 'none':
      dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      block = nn.remat(
        Block,
        prevent_cse=not m.scan_layers,
        policy=dots if m.remat == 'dots' else None,
      )
    if m.scan_layers:
      scan = nn.scan(
        lambda layer, x_BxLxD, _: (layer(x_BxLxD), None),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=m.layers,
      )
      x_BxLxD, _ = scan(block(m, name='layers'), x_BxLxD, None)
    else:
      for i in range(m.layers):
        x_BxLxD = block(m, name=f'layers_{i}')(x_BxLxD)
    x_BxLxD = RMSNorm(m, name='final_norm')(x_BxLxD)
    if m.tie_embeddings:
      w_DxV = table_VxD.T.astype(m.compute_dtype)
    else:
      w_DxV = _weight(self, 'unembedding', (m.width, m.vocab_size))
    return _linear(x_BxLxD, w_DxV, jnp.float32)


def init(model: config.Model, seed_key: jax.Array) -> Any:
  """Float32 parameters: normal(0.02), residual outputs scaled, gains 1."""
  return Llama(model).init(seed_key, jnp.zeros((1, 1), jnp.int32))['params']


def apply(model: config.Model, params: Any, tokens_BxL: jax.Array) -> jax.Array:
  """The float32 logits_BxLxV that predict the token after each position."""
  logits_BxLxV: Any = Llama(model).apply({'params': params}, tokens_BxL)
  return logits_BxLxV


def num_params(model: config.Model) -> int:
  """The number of parameters, exactly, without building the model."""
  m = model
  kv_width = m.width // m.heads * m.kv_heads
  attention = 2 * m.width * (m.width + kv_width)
  ffn = 3 * m.width * m.ffn_width
  tables = 1 if m.tie_embeddings else 2
  return (
    tables * m.vocab_size * m.width
    + m.layers * (attention + ffn + 2 * m.width)
    + m.width
  )
