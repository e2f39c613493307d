"""Numbers as they pass between stages: in four or eight bits, and a scale.

Of each position the numbers are sent as multiples of a step, that of the
largest being 7 or 127; the step goes along in bfloat16. The gradient comes back
in the same form. The rank of what passes and the bits of each number are two
ways to send less (covenant/train/pipeline/subspace.py), and a few bits of many
directions tell more than all bits of a few.

Shapes: ... positions, K numbers of each.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = (4, 8)


class Coarse(NamedTuple):
  codes: jax.Array  # int8 [..., K]; of four bits two in one uint8, [..., K / 2]
  step: jax.Array  # bfloat16 [..., 1]


def pack(c: jax.Array, bits: int) -> Coarse:
  """Of numbers [..., K]; K is even with four bits."""
  most = 2 ** (bits - 1) - 1
  c = c.astype(jnp.float32)
  step = (jnp.max(jnp.abs(c), -1, keepdims=True) / most).astype(jnp.bfloat16)
  wide = step.astype(jnp.float32)
  codes = jnp.round(c / jnp.where(wide > 0, wide, 1))
  codes = jnp.clip(codes, -most, most).astype(jnp.int8)
  if bits == 4:
    nibbles = codes.astype(jnp.uint8) & 15
    codes = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
  return Coarse(codes, step)


def unpack(coarse: Coarse, dtype: jax.typing.DTypeLike) -> jax.Array:
  """[..., K], of what `pack` gave."""
  codes = coarse.codes
  if codes.dtype == jnp.uint8:
    nibbles = jnp.stack([codes & 15, codes >> 4], -1)
    nibbles = nibbles.reshape(*codes.shape[:-1], -1)
    codes = (nibbles ^ 8).astype(jnp.int8) - 8
  wide = coarse.step.astype(jnp.float32)
  return (codes.astype(jnp.float32) * wide).astype(dtype)


def position_bytes(rank: int, bits: int, dtype: jax.typing.DTypeLike) -> int:
  """What of one position passes a boundary, one way.

  >>> position_bytes(20, 4, 'float32'), position_bytes(20, 0, 'float32')
  (12, 80)
  """
  if not bits:
    return rank * jnp.dtype(dtype).itemsize
  return rank * bits // 8 + 2


Move = Callable[[jax.Array], jax.Array]


def _stay(x: jax.Array) -> jax.Array:
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def passed(
  c: jax.Array, bits: int, forth: Move = _stay, back: Move = _stay
) -> jax.Array:
  """What arrives of numbers [..., K], and of their gradient on its way back.

  Args:
    c: the numbers.
    bits: of each; 0: as they are.
    forth: moves an array to where it arrives.
    back: moves it back.
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
