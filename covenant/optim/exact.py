"""Arithmetic with the same bits on every IEEE-754 machine and compiler.

Nodes must agree on parameters bit for bit, and compilers do not: they contract
a * b + c into one rounding where the hardware can, sum in orders of their own,
approximate divisions and roots, and treat denormals differently. These
functions leave no choice:

- A product is rounded to 24 bits by the multiplication and to 23 by
  `lax.reduce_precision`, which no compiler contracts with an addition.
  Products below 2^-100 are zero, so sums of products are multiples of 2^-123
  and never denormal.
- A norm is an integer root of a sum of squared integers, which has no order.
- A quotient of norms is an integer long division.

An addition of two numbers and a comparison need no care.
`tests/reference/protocol.py` specifies the results in NumPy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BITS = 22  # explicit bits of the mantissa of a product, and of a quotient
SMALLEST = 2.0**-100  # smaller products and norms are zero
_UNIT = 14  # a norm's values are integers in units of 2^-14 of the largest
_LIMB = 15  # bits of one limb of a large integer
_LIMBS = 5
_ROW = 4096  # numbers in one sum
_ROOT = 24  # bits of a norm


class Square(NamedTuple):
  """A sum of squares: the integer of `limbs` times 4^(exponent - 14)."""

  limbs: jax.Array  # uint32 [5, ...], 15 bits each, the lowest first
  exponent: jax.Array  # int32 [...], of the largest value


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns float32 a * b, rounded to 22 explicit bits of mantissa."""
  cut = jax.lax.reduce_precision(a * b, exponent_bits=8, mantissa_bits=BITS)
  return jnp.where(jnp.abs(cut) < SMALLEST, jnp.zeros_like(cut), cut)


def square(values: Sequence[jax.Array], axes: tuple[str, ...] = ()) -> Square:
  """Returns the sum of squares of all values.

  Args:
    values: finite float32 arrays.
    axes: the mesh axes over which they are sharded, in `jax.shard_map`.
  """
  largest = jnp.float32(0)
  for x in values:
    largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0.0))
  if axes:
    largest = jax.lax.pmax(largest, axes)
  exponent = jnp.where(largest < SMALLEST, -127, _exponent(largest))
  unit = _power(jnp.where(largest < SMALLEST, -126, _UNIT - exponent))
  limbs = jnp.zeros(_LIMBS, jnp.uint32)
  for x in values:
    units = jnp.round(jnp.abs(x) * unit).astype(jnp.uint32)  # at most 2^15
    limbs = _carry(limbs + _sum_of_squares(units))
  if axes:
    limbs = _carry(jax.lax.psum(limbs, axes))
  return Square(limbs, exponent)


def norm(of: Square) -> jax.Array:
  """Returns square roots, float32 [...], rounded down to 24 bits.

  The digits come one by one, from pairs of bits of the 75-bit integer.
  """
  bits = [(of.limbs[i // _LIMB] >> (i % _LIMB)) & 1 for i in range(75)]
  bits.append(jnp.zeros_like(bits[0]))
  pairs = [a + 2 * b for a, b in zip(bits[::2], bits[1::2], strict=True)]

  def digit(state, pair):
    root, rest, beyond = state
    full = root >= 1 << (_ROOT - 1)
    rest_ = (rest << 2) | pair
    trial = (root << 2) | 1
    fits = rest_ >= trial
    root_ = (root << 1) | fits.astype(jnp.uint32)
    rest_ = jnp.where(fits, rest_ - trial, rest_)
    return (
      jnp.where(full, root, root_),
      jnp.where(full, rest, rest_),
      beyond + full.astype(jnp.int32),
    ), None

  zeros = jnp.zeros_like(bits[0])
  start = zeros, zeros, zeros.astype(jnp.int32)
  (root, _, beyond), _ = jax.lax.scan(digit, start, jnp.stack(pairs[::-1]))
  exponent = jnp.maximum(of.exponent - _UNIT + beyond, -126)
  return jnp.where(
    of.exponent < -126, 0.0, root.astype(jnp.float32) * _power(exponent)
  )


def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns min(1, a / b), rounded down to a multiple of 2^-22.

  Args:
    a: float32, 0 or more.
    b: float32, 0 or more; the quotient by 0 is 1.
  """
  divisor = _mantissa(b)

  def digit(_, state):
    rest, digits = state
    fits = rest >= divisor
    rest = jnp.where(fits, rest - divisor, rest) << 1
    return rest, (digits << 1) | fits.astype(jnp.uint32)

  start = _mantissa(a), jnp.zeros_like(divisor)
  _, digits = jax.lax.fori_loop(0, BITS + 1, digit, start)
  apart = jnp.clip(_exponent(b) - _exponent(a), 0, 31).astype(jnp.uint32)
  part = (digits >> apart).astype(jnp.float32) * jnp.float32(2.0**-BITS)
  part = jnp.where(a < SMALLEST, 0.0, part)
  return jnp.where((a >= b) | (b < SMALLEST), 1.0, part)


def reciprocals(total: int, count: int, whole: int, size: int) -> np.ndarray:
  """Returns whole / max(n, total / count) for n below `size`, float32 [size].

  Divides in float64 on the host, and rounds once more.

  Args:
    total: parts of all peers.
    count: peers; 1 or more.
    whole: the parts of 1.
    size: the number of entries.
  """
  parts_N = np.maximum(np.arange(size, dtype=np.float64) * count, total)
  return (np.float64(whole * count) / parts_N).astype(np.float32)


def _exponent(x: jax.Array) -> jax.Array:
  """Returns floor(log2(x)) as int32; -127 for zero."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return ((bits >> 23) & 0xFF) - 127


def _mantissa(x: jax.Array) -> jax.Array:
  """Returns the 24-bit integer mantissa of a normal float32."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return (bits & 0x7FFFFF) | 0x800000


def _power(exponent: jax.Array) -> jax.Array:
  """Returns 2^exponent as float32, for the exponents of normal numbers."""
  return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _sum_of_squares(units: jax.Array) -> jax.Array:
  """Returns the limbs, uint32 [5], of a sum of squares of numbers to 2^15."""
  squares_NxR = _rows(units.reshape(1, -1))[0]
  squares_NxR = squares_NxR * squares_NxR  # at most 2^30
  low_N = jnp.sum(squares_NxR & 0x7FFF, axis=1, dtype=jnp.uint32)
  high_N = jnp.sum(squares_NxR >> _LIMB, axis=1, dtype=jnp.uint32)
  zero_N = jnp.zeros_like(low_N)
  limbs = _carry(jnp.stack([low_N, high_N, zero_N, zero_N, zero_N]))
  while limbs.shape[1] > 1:
    limbs = _carry(jnp.sum(_rows(limbs), axis=2, dtype=jnp.uint32))
  return limbs[:, 0]


def _rows(x_LxM: jax.Array) -> jax.Array:
  """Pads and reshapes to [L, N, R], R at most 4096."""
  size = x_LxM.shape[1]
  width = min(max(size, 1), _ROW)
  padded = jnp.pad(x_LxM, ((0, 0), (0, -size % width if size else 1)))
  return padded.reshape(x_LxM.shape[0], -1, width)


def _carry(limbs: jax.Array) -> jax.Array:
  """Normalizes limbs along the first axis to 15 bits each."""
  found, carry = [], jnp.zeros_like(limbs[0])
  for limb in limbs:
    found.append((limb + carry) & 0x7FFF)
    carry = (limb + carry) >> _LIMB
  return jnp.stack(found)
