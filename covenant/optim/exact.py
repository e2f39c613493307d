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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covenant import typing as ct

BITS = 22  # explicit bits of the mantissa of a product, and of a quotient
SMALLEST = 2.0**-100  # smaller products and norms are zero
_UNIT = 22  # a norm's values are integers in units of 2^-22 of the largest
_LIMB = 12  # bits of one limb of a large integer
_LIMBS = 7
_ROW = 4096  # limbs in one sum
_SQUARES = 128  # squares in one sum
_ROOT = 24  # bits of a norm


class Square(NamedTuple):
  """A sum of squares: the integer of `limbs` times 4^(exponent - 22)."""

  limbs: jax.Array  # uint32 [7, ...], 12 bits each, the lowest first
  exponent: jax.Array  # int32 [...], of the largest value


def product(a: ct.Scalar, b: ct.Scalar) -> Any:
  """Returns float32 a * b, rounded to 22 explicit bits of mantissa.

  NumPy arrays are computed on the host.
  """
  if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
    bits = np.multiply(a, b, dtype=np.float32).view(np.uint32)
    bits = (bits + ((bits >> 1) & 1)) & np.uint32(0xFFFFFFFE)
    cut = bits.view(np.float32)
    return np.where(np.abs(cut) < SMALLEST, np.float32(0), cut)
  wide = jnp.asarray(a) * b
  cut = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=BITS)
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
    units = jnp.round(jnp.abs(x) * unit).astype(jnp.uint32)  # at most 2^23
    limbs = _carry(limbs + _sum_of_squares(units))
  if axes:
    limbs = _carry(jax.lax.psum(limbs, axes))
  return Square(limbs, exponent)


def norms(squares: Sequence[Square]) -> jax.Array:
  """Returns the square root of each square, float32 [N]."""
  return norm(
    Square(
      jnp.stack([s.limbs for s in squares], axis=1),
      jnp.stack([s.exponent for s in squares]),
    )
  )


def norm(of: Square) -> jax.Array:
  """Returns square roots, float32 [...], rounded down to 24 bits.

  The digits come one by one, from pairs of bits of the 84-bit integer.
  """
  count = _LIMB * _LIMBS
  bits = [(of.limbs[i // _LIMB] >> (i % _LIMB)) & 1 for i in range(count)]
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


def quotient(a: Any, b: Any) -> Any:
  """Returns min(1, a / b), rounded down to 22 or 23 bits.

  NumPy arrays are computed on the host, without a program per shape.

  Args:
    a: float32, 0 or more.
    b: float32, 0 or more; the quotient by 0 is 1.
  """
  if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
    (m, e), (n, d) = np.frexp(a), np.frexp(b)
    m, n = (np.ldexp(x, 24).astype(np.int64) for x in (m, n))
    digits = (m << BITS) // np.maximum(n, 1)
    part = np.ldexp(digits.astype(np.float32), e - d - BITS)
    none = (a < SMALLEST) | (part < SMALLEST)
    part = np.where(none, np.float32(0), part)
    return np.where((a >= b) | (b < SMALLEST), np.float32(1), part)
  a, b = jnp.broadcast_arrays(jnp.asarray(a), jnp.asarray(b))
  divisor = _mantissa(b)

  def digit(_, state):
    rest, digits = state
    fits = rest >= divisor
    rest = jnp.where(fits, rest - divisor, rest) << 1
    return rest, (digits << 1) | fits.astype(jnp.uint32)

  start = _mantissa(a), jnp.zeros_like(divisor)
  _, digits = jax.lax.fori_loop(0, BITS + 1, digit, start)
  exponent = jnp.maximum(_exponent(a) - _exponent(b) - BITS, -126)
  part = digits.astype(jnp.float32) * _power(jnp.minimum(exponent, 0))
  part = jnp.where((a < SMALLEST) | (part < SMALLEST), 0.0, part)
  return jnp.where((a >= b) | (b < SMALLEST), 1.0, part)


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
  """Returns the limbs, uint32 [7], of a sum of squares of numbers to 2^23."""
  low, high = units & 0xFFF, units >> _LIMB
  products = low * low, 2 * low * high, high * high  # each at most 2^24
  limbs = jnp.stack(
    [_row_sums(x.reshape(1, -1), _SQUARES)[0] for x in products]
  )
  limbs = _carry(jnp.pad(limbs, ((0, _LIMBS - len(products)), (0, 0))))
  while limbs.shape[1] > 1:
    limbs = _carry(_row_sums(limbs, _ROW))
  return limbs[:, 0]


def _row_sums(x_LxM: jax.Array, width: int) -> jax.Array:
  """Returns sums of up to `width` numbers each: uint32 [L, N]."""
  size = x_LxM.shape[1]
  width = min(max(size, 1), width)
  padded = jnp.pad(x_LxM, ((0, 0), (0, -size % width if size else 1)))
  rows_LxNxR = padded.reshape(x_LxM.shape[0], -1, width)
  return jnp.sum(rows_LxNxR, axis=2, dtype=jnp.uint32)


def _carry(limbs: jax.Array) -> jax.Array:
  """Normalizes limbs along the first axis to 12 bits each."""
  found, carry = [], jnp.zeros_like(limbs[0])
  for limb in limbs:
    found.append((limb + carry) & 0xFFF)
    carry = (limb + carry) >> _LIMB
  return jnp.stack(found)
