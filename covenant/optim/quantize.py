"""Few bits a value: what stands for the selected values on the wire.

A quantizer turns the values of one region into `codes`, one small integer a
value, and `scales`, the few floats that give the codes their meaning. What is
decoded, not what was encoded, is what error feedback subtracts: the loss of
quantization is sent later, not lost.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Quantizer(Protocol):
  """A frozen, hashable value object."""

  @property
  def bits(self) -> int:
    """Of one code; 32 stands for the float32 value itself."""
    ...

  @property
  def scale_dtype(self) -> jnp.dtype: ...

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    """Shape of the scales of a region of `num_blocks` blocks."""
    ...

  def encode(self, values_NxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [N, K] -> codes uint8 [N, K] and scales."""
    ...

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    """Codes and scales -> float32 [N, K]."""
    ...


@dataclasses.dataclass(frozen=True)
class Exact:
  """No quantizer: the 'codes' are the float32 values themselves."""

  bits: int = 32
  scale_dtype: jnp.dtype = jnp.dtype(jnp.float32)

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    del num_blocks
    return (0, 0)

  def encode(self, values_NxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    return values_NxK, jnp.zeros((0, 0), jnp.float32)

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    del scales
    return codes_NxK


@dataclasses.dataclass(frozen=True)
class Sign:
  """One bit a value and the mean magnitude of each block, in bfloat16.

  After top-k the values of a block lie in two lobes, so a sign and one
  magnitude say nearly all that two bits could (reference/papers.md 1.4). The
  scale is rounded before it is used: sender and receiver decode the same.
  """

  bits: int = 1
  scale_dtype: jnp.dtype = jnp.dtype(jnp.bfloat16)

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    return (num_blocks, 1)

  def encode(self, values_NxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    scales_Nx1 = jnp.mean(jnp.abs(values_NxK), axis=1, keepdims=True)
    codes_NxK = (values_NxK >= 0).astype(jnp.uint8)
    return codes_NxK, scales_Nx1.astype(jnp.bfloat16)

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    scales_Nx1 = scales.astype(jnp.float32)
    return jnp.where(codes_NxK == 1, scales_Nx1, -scales_Nx1)


@dataclasses.dataclass(frozen=True)
class Statistical:
  """The deployed quantizer: a grid of 2**bits bins, decoded to bin means.

  The grid spans `span` standard deviations around the mean of all values of
  the tensor; each bin is decoded to the mean of what fell in it
  (reference/templar.md 3.6, papers.md 1.4). Scales are the mean, then the
  2**bits bin means relative to it, in float32.
  """

  bits: int = 2
  span: float = 6.0
  scale_dtype: jnp.dtype = jnp.dtype(jnp.float32)

  def scale_shape(self, num_blocks: int) -> tuple[int, int]:
    del num_blocks
    return (1, 1 + 2**self.bits)

  def encode(self, values_NxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    bins = 2**self.bits
    shift = jnp.mean(values_NxK)
    centred = values_NxK - shift
    degrees = max(values_NxK.size - 1, 1)
    deviation = jnp.sqrt(jnp.sum(centred * centred) / degrees)
    width = self.span * deviation / bins
    width = jnp.where((width > 0) & jnp.isfinite(width), width, 1.0)
    grid = jnp.round(centred / width + bins // 2)  # half to even
    codes_NxK = jnp.clip(grid, 0, bins - 1).astype(jnp.uint8)
    grid_B = jnp.arange(bins, dtype=jnp.uint8)[None, None]
    member = codes_NxK[..., None] == grid_B
    count = jnp.sum(member, axis=(0, 1))
    total = jnp.sum(jnp.where(member, centred[..., None], 0.0), axis=(0, 1))
    means = total / jnp.maximum(count, 1).astype(jnp.float32)
    return codes_NxK, jnp.concatenate([shift[None], means])[None]

  def decode(self, codes_NxK: jax.Array, scales: jax.Array) -> jax.Array:
    shift, means = scales[0, 0], scales[0, 1:]
    return means[codes_NxK] + shift
