"""Numbers between stages as multiples of a step, and their bytes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Move = Callable[[jax.Array], jax.Array]


class Quantized(NamedTuple):
  """Numbers [..., K] as they are sent."""

  codes: jax.Array  # int8 [..., K]; with four bits uint8 [..., K / 2]
  step: jax.Array  # bfloat16 [..., 1]


def pack(c: jax.Array, bits: int) -> Quantized:
  """Quantizes numbers [..., K]; K is even with four bits."""
  most = 2 ** (bits - 1) - 1
  c = c.astype(jnp.float32)
  step = (jnp.max(jnp.abs(c), -1, keepdims=True) / most).astype(jnp.bfloat16)
  wide = step.astype(jnp.float32)
  codes = jnp.round(c / jnp.where(wide > 0, wide, 1))
  codes = jnp.clip(codes, -most, most).astype(jnp.int8)
  if bits == 4:
    nibbles = codes.astype(jnp.uint8) & 15
    codes = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
  return Quantized(codes, step)


def unpack(quantized: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns the numbers [..., K] that `pack` quantized."""
  codes = quantized.codes
  if codes.dtype == jnp.uint8:
    nibbles = jnp.stack([codes & 15, codes >> 4], -1)
    nibbles = nibbles.reshape(*codes.shape[:-1], -1)
    codes = (nibbles ^ 8).astype(jnp.int8) - 8
  wide = quantized.step.astype(jnp.float32)
  return (codes.astype(jnp.float32) * wide).astype(dtype)


def _stay(x: jax.Array) -> jax.Array:
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def passed(
  c: jax.Array, bits: int, forth: Move = _stay, back: Move = _stay
) -> jax.Array:
  """Returns numbers [..., K] as they arrive; their gradient passes likewise.

  Args:
    c: the numbers.
    bits: bits per number; 0 leaves them as they are.
    forth: moves an array to the receiver.
    back: moves an array back to the sender.
  """
  if not bits:
    return forth(c)
  return unpack(jax.tree.map(forth, pack(c, bits)), c.dtype)


def _forward(c, bits, forth, back):
  return passed(c, bits, forth, back), None


def _backward(bits, forth, back, _, g):
  del forth
  return (passed(g, bits, back),)


passed.defvjp(_forward, _backward)
