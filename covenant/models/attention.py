"""Causal grouped-query attention and rotary positions, as pure functions.

Shapes: B batch, L length, H query heads, N key and value heads, G = H / N
queries that share one, K head width, Q = G * L, I = K / 2.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from covenant import config
from covenant import typing as ct

_OLDEST_FUSED = 8.0  # compute capability: Ampere
_WIDEST_FUSED = 128  # a head; wider ones need the newest GPUs


def kernel(model: config.Model) -> Callable[..., jax.Array]:
  """Returns `attend` or `attend_fused`, as `model.attention` says.

  'auto' is fused where all devices and the model allow it; what a miner
  computes need not be the same bits as elsewhere.
  """
  head = model.width // model.heads
  if model.attention == 'auto':
    is_fused = (
      model.compute_dtype == 'bfloat16'
      and head % 8 == 0
      and head <= _WIDEST_FUSED
      and all(map(_fuses, jax.devices()))
    )
  else:
    is_fused = model.attention == 'cudnn'
  return attend_fused if is_fused else attend


def _fuses(device: jax.Device) -> bool:
  """Returns True for a GPU that has the kernels of `attend_fused`."""
  version = float(getattr(device, 'compute_capability', 0))
  return 'NVIDIA' in device.device_kind and version >= _OLDEST_FUSED


def frequencies(model: config.Model) -> np.ndarray:
  """Returns the rotation of each pair per position, in radians: float64 [I].

  Those that turn seldom within `model.rope_context` are slowed by
  `model.rope_factor` (The Llama 3 Herd of Models, arXiv 2407.21783, and the
  published config of Llama 3.1).
  """
  half = model.width // model.heads // 2
  frequency_I = model.rope_theta ** (-np.arange(half) / half)
  if model.rope_factor == 1:
    return frequency_I
  turns_I = model.rope_context * frequency_I / (2 * np.pi)
  kept_I = (turns_I - model.rope_low) / (model.rope_high - model.rope_low)
  kept_I = np.clip(kept_I, 0, 1)
  return frequency_I * (kept_I + (1 - kept_I) / model.rope_factor)


def turns(
  length: int, frequency_I: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the cosine and sine of positions 0 to L - 1: float32 [L, I]."""
  # In float64 on the host, so that far positions keep their precision.
  angle_LxI = np.outer(np.arange(length), frequency_I)
  cos_LxI, sin_LxI = np.cos(angle_LxI), np.sin(angle_LxI)
  return cos_LxI.astype(np.float32), sin_LxI.astype(np.float32)


def turn(x_xLxK: jax.Array, cos_LxI: ct.Array, sin_LxI: ct.Array) -> jax.Array:
  """Rotates the pairs (i, i + K / 2) of positions, of any number of heads.

  RoFormer (arXiv 2104.09864), eq. 34, with the pairs of Hugging Face's Llama.
  """
  axes = tuple(range(x_xLxK.ndim - 2))
  cos_xLxI, sin_xLxI = (jnp.expand_dims(x, axes) for x in (cos_LxI, sin_LxI))
  a_xLxI, b_xLxI = jnp.split(x_xLxK.astype(jnp.float32), 2, axis=-1)
  y_xLxK = jnp.concatenate(
    [
      a_xLxI * cos_xLxI - b_xLxI * sin_xLxI,
      b_xLxI * cos_xLxI + a_xLxI * sin_xLxI,
    ],
    axis=-1,
  )
  return y_xLxK.astype(x_xLxK.dtype)


def rotate(x_BxHxLxK: jax.Array, frequency_I: np.ndarray) -> jax.Array:
  """Applies rotary positions 0 to L - 1; see `frequencies` and `turn`."""
  return turn(x_BxHxLxK, *turns(x_BxHxLxK.shape[2], frequency_I))


def attend(
  q_BxHxLxK: jax.Array,
  k_BxNxLxK: jax.Array,
  v_BxNxLxK: jax.Array,
  document_BxL: jax.Array | None = None,
) -> jax.Array:
  """Computes causal attention of query heads to their group's key and value.

  Args:
    q_BxHxLxK: the queries.
    k_BxNxLxK: the keys.
    v_BxNxLxK: the values.
    document_BxL: the document of each position (`llama.documents`), which
      attends to no other; None: all positions are of one.
  """
  B, H, L, K = q_BxHxLxK.shape
  N = k_BxNxLxK.shape[1]
  G = H // N
  # The G queries that share a key are rows of one product: Q = G * L. Heads
  # come before positions, so that each product has contiguous matrices.
  q_BxNxQxK = q_BxHxLxK.reshape(B, N, G * L, K) * (1 / math.sqrt(K))
  score_BxNxQxL = jnp.einsum(
    'bnqk,bnlk->bnql',
    q_BxNxQxK,
    k_BxNxLxK,
    preferred_element_type=jnp.float32,
  )
  position_Q = jnp.tile(jnp.arange(L), G)
  seen_QxL = position_Q[:, None] >= jnp.arange(L)[None]
  seen_BxNxQxL = seen_QxL[None, None]
  if document_BxL is not None:
    seen_BxNxQxL &= jnp.tile(_same(document_BxL), (1, G, 1))[:, None]
  score_BxNxQxL = jnp.where(seen_BxNxQxL, score_BxNxQxL, -1e30)
  top_BxNxQx1 = jnp.max(score_BxNxQxL, axis=-1, keepdims=True)
  p_BxNxQxL = jnp.exp(score_BxNxQxL - jax.lax.stop_gradient(top_BxNxQx1))
  # The division of softmax follows the product, K wide instead of L.
  z_BxNxQx1 = jnp.sum(p_BxNxQxL, axis=-1, keepdims=True)
  y_BxNxQxK = jnp.einsum(
    'bnql,bnlk->bnqk',
    p_BxNxQxL.astype(v_BxNxLxK.dtype),
    v_BxNxLxK,
    preferred_element_type=jnp.float32,
  )
  y_BxNxQxK = (y_BxNxQxK / z_BxNxQx1).astype(q_BxHxLxK.dtype)
  return y_BxNxQxK.reshape(B, H, L, K)


def _same(document_BxL: jax.Array) -> jax.Array:
  """Returns whether positions are of one document, bool [B, L, L]."""
  return document_BxL[:, :, None] == document_BxL[:, None, :]


def attend_fused(
  q_BxHxLxK: jax.Array,
  k_BxNxLxK: jax.Array,
  v_BxNxLxK: jax.Array,
  document_BxL: jax.Array | None = None,
) -> jax.Array:
  """Computes `attend` by cuDNN; raises ConfigError where that is missing."""
  if q_BxHxLxK.dtype != jnp.bfloat16:
    raise config.ConfigError(
      "model.attention: 'cudnn' needs model.compute_dtype='bfloat16', got "
      f"{q_BxHxLxK.dtype}; use 'portable'"
    )
  kinds = {device.device_kind for device in jax.devices()}
  if not any('NVIDIA' in kind for kind in kinds):
    raise config.ConfigError(
      "model.attention: 'cudnn' needs an NVIDIA GPU, got "
      f"{', '.join(sorted(kinds))}; use 'portable'"
    )
  by_position = (x.swapaxes(1, 2) for x in (q_BxHxLxK, k_BxNxLxK, v_BxNxLxK))
  mask_Bx1xLxL = None if document_BxL is None else _same(document_BxL)[:, None]
  return jax.nn.dot_product_attention(
    *by_position, mask=mask_Bx1xLxL, is_causal=True, implementation='cudnn'
  ).swapaxes(1, 2)
