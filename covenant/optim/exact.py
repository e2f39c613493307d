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

import functools
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
ROW = 128  # squares in one sum
_MOST_LIMBS = 2**20  # limbs in one sum
_ROOT = 24  # bits of a norm


class Counted(NamedTuple):
  """Rows of values, each of which is there several times."""

  values_NxC: jax.Array  # float32
  counts_NxC: jax.Array  # integers, at most `ROW` in a row


# Compiles a function called eagerly as one program, not one per operation.
_inlined = functools.partial(jax.jit, inline=True)


def product(a: ct.Scalar, b: ct.Scalar) -> Any:
  """Returns float32 a * b, rounded to 22 explicit bits of mantissa.

  NumPy arrays are computed on the host.
  """
  if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
    bits = np.multiply(a, b, dtype=np.float32).view(np.uint32)
    bits = (bits + ((bits >> 1) & 1)) & np.uint32(0xFFFFFFFE)
    cut = bits.view(np.float32)
    return np.where(np.abs(cut) < SMALLEST, np.float32(0), cut)
  return _product(a, b)


@_inlined
def _product(a: ct.Scalar, b: ct.Scalar) -> jax.Array:
  wide = jnp.asarray(a, jnp.float32) * jnp.asarray(b, jnp.float32)
  cut = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=BITS)
  return jnp.where(jnp.abs(cut) < SMALLEST, jnp.zeros_like(cut), cut)


@functools.partial(jax.jit, static_argnames=('axes',), inline=True)
def norms(
  values_P: Sequence[Sequence[jax.Array | Counted]],
  axes: tuple[str, ...] = (),
) -> jax.Array:
  """Returns the L2 norms of P tensors, float32 [P], rounded down to 24 bits.

  Args:
    values_P: the values of each tensor, finite float32 arrays or `Counted`.
    axes: the mesh axes over which all are sharded, in `jax.shard_map`.
  """
  if not values_P:
    return jnp.zeros(0, jnp.float32)
  parts_P = [_flat(v) for v in values_P]
  largest_P = jnp.stack(
    [functools.reduce(jnp.maximum, map(_largest, v)) for v in parts_P]
  )
  if axes:
    largest_P = jax.lax.pmax(largest_P, axes)
  unit_P = _unit(largest_P)
  sums = [_square_sums(v, unit_P[i]) for i, v in enumerate(parts_P)]
  limbs = _limbs(jnp.concatenate(sums, axis=1))
  if any(x.shape[1] > 1 for x in sums):
    ends = np.cumsum([x.shape[1] for x in sums])[:-1]
    limbs = jnp.concatenate(
      [_add_up(x) for x in jnp.split(limbs, ends, axis=1)], axis=1
    )
  if axes:
    limbs = jax.lax.psum(limbs, axes)
  return norms_of_squares(limbs, largest_P)


def _flat(
  values: Sequence[jax.Array | Counted],
) -> list[jax.Array | Counted]:
  """Returns the values of a tensor with all that are arrays in one."""
  counted = [x for x in values if isinstance(x, Counted)]
  plain = [x.reshape(-1) for x in values if not isinstance(x, Counted)]
  return [*counted, *([jnp.concatenate(plain)] if plain else [])]


def _largest(x: jax.Array | Counted) -> jax.Array:
  if isinstance(x, Counted):
    x = jnp.where(x.counts_NxC > 0, x.values_NxC, 0).reshape(-1)
  return largest(x)


def largest(values: jax.Array) -> jax.Array:
  """Returns the largest magnitude along the last axis, 0 of no values."""
  return jnp.max(jnp.abs(values), axis=-1, initial=jnp.float32(0))


def row_squares(rows: jax.Array, largest: jax.Array) -> jax.Array:
  """Returns the sum of squares of each row, in parts: uint32 [3, ...].

  Args:
    rows: finite float32 [..., W] of up to 128 values of a tensor.
    largest: the largest magnitude of the whole tensor of each row.
  """
  products = _products(rows, _unit(largest)[..., None])
  # One pass for all three.
  sums = jax.lax.reduce(
    products, [jnp.int32(0)] * 3,
    lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
    (rows.ndim - 1,),
  )  # fmt: skip
  return jnp.stack(sums).astype(jnp.uint32)


def tensor_squares(
  parts_3xTxR: jax.Array, owners_T: np.ndarray, count: int
) -> jax.Array:
  """Returns sums of squares as integers in limbs: uint32 [7, count, R].

  Args:
    parts_3xTxR: of `row_squares`.
    owners_T: the tensor of each row.
    count: the number of tensors.
  """
  halves = [x for part in parts_3xTxR for x in (part & 0xFFFF, part >> 16)]
  limbs_7xTxR = _limbs(jnp.stack(halves))
  if len(owners_T) > _MOST_LIMBS:  # more than a sum has room for
    parts_T = np.arange(len(owners_T)) // _MOST_LIMBS
    pairs_2xN, rows_T = np.unique(
      np.stack([parts_T, owners_T]), axis=1, return_inverse=True
    )
    rows_T = rows_T.reshape(-1)
    limbs_7xTxR = _carry(_add_owned(limbs_7xTxR, rows_T, pairs_2xN.shape[1]))
    owners_T = pairs_2xN[1]
  return _carry(_add_owned(limbs_7xTxR, owners_T, count))


def _add_owned(
  limbs_7xTxR: jax.Array, owners_T: np.ndarray, count: int
) -> jax.Array:
  shape = limbs_7xTxR.shape[0], count, limbs_7xTxR.shape[2]
  return jnp.zeros(shape, jnp.uint32).at[:, owners_T].add(limbs_7xTxR)


def norms_of_squares(limbs: jax.Array, largest: jax.Array) -> jax.Array:
  """Returns square roots, float32 [...], rounded down to 24 bits.

  Args:
    limbs: uint32 [7, ...], of `tensor_squares`, or their sums over shards.
    largest: float32 [...], those that the squares were computed with.
  """
  exponent = jnp.where(largest < SMALLEST, -127, _exponent(largest))
  return _root(_carry(limbs), exponent)


def quotient(a: Any, b: Any) -> Any:
  """Returns min(1, a / b), rounded down to 22 or 23 bits.

  NumPy arrays are computed on the host, without a program per shape.

  Args:
    a: float32, 0 or more.
    b: float32, 0 or more; the quotient by 0 is 1, and that by an infinite norm
      0.
  """
  if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
    endless = np.isinf(b)
    (m, e), (n, d) = (np.frexp(np.where(np.isinf(x), 1, x)) for x in (a, b))
    m, n = (np.ldexp(x, 24).astype(np.int64) for x in (m, n))
    digits = (m << BITS) // np.maximum(n, 1)
    part = np.ldexp(digits.astype(np.float32), e - d - BITS)
    none = endless | (a < SMALLEST) | (part < SMALLEST)
    part = np.where(none, np.float32(0), part)
    return np.where((a >= b) | (b < SMALLEST), np.float32(1), part)
  return _quotient(a, b)


@_inlined
def _quotient(a: ct.Scalar, b: ct.Scalar) -> jax.Array:
  a, b = jnp.broadcast_arrays(jnp.asarray(a), jnp.asarray(b))
  digits, rest = _divmod(_mantissa(a), _mantissa(b))
  for bits in (8, 8, BITS - 16):
    digit, rest = _divmod(rest << bits, _mantissa(b))
    digits = (digits << bits) | digit
  exponent = jnp.maximum(_exponent(a) - _exponent(b) - BITS, -126)
  part = digits.astype(jnp.float32) * _power(jnp.minimum(exponent, 0))
  none = jnp.isinf(b) | (a < SMALLEST) | (part < SMALLEST)
  part = jnp.where(none, 0.0, part)
  return jnp.where((a >= b) | (b < SMALLEST), 1.0, part)


def ratio(a: Any, b: Any) -> jax.Array:
  """Returns the float32 nearest to a / b, of integers from 1 to 2^16 - 1."""
  a, b = jnp.asarray(a, jnp.uint32), jnp.asarray(b, jnp.uint32)
  shifts = [jax.lax.clz(x) - jnp.uint32(16) for x in (a, b)]
  divisor = b << shifts[1]
  digits, rest = _divmod(a << shifts[0] << 15, divisor)  # both have 16 bits
  low, rest = _divmod(rest << 15, divisor)
  # More bits than a mantissa has, and one for all that is below them.
  digits = (digits << 15) | low | (rest > 0).astype(jnp.uint32)
  exponent = shifts[1].astype(jnp.int32) - shifts[0].astype(jnp.int32)
  return digits.astype(jnp.float32) * _power(exponent - 30)


def _divmod(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  digit = jax.lax.div(a, b)
  return digit, a - digit * b


def _root(limbs: jax.Array, exponent: jax.Array) -> jax.Array:
  """Returns the root of an 84-bit integer times 2^(exponent - 22).

  The digits come one by one, from pairs of bits.

  Args:
    limbs: uint32 [7, ...], 12 bits each, the lowest first.
    exponent: int32 [...].
  """
  # The barrier keeps XLA from computing the limbs anew for each pair.
  limbs = jax.lax.optimization_barrier(limbs)
  shape = limbs.shape[1:]
  shifts = jnp.arange(0, _LIMB, 2, dtype=jnp.uint32)
  shifts = shifts.reshape(1, -1, *[1] * len(shape))
  pairs = ((limbs[:, None] >> shifts) & 3).reshape(_LIMBS * _LIMB // 2, *shape)

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

  zeros = jnp.zeros_like(limbs[0])
  start = zeros, zeros, zeros.astype(jnp.int32)
  (root, _, beyond), _ = jax.lax.scan(digit, start, pairs[::-1])
  scale = _power(jnp.maximum(exponent - _UNIT + beyond, -126))
  return jnp.where(exponent < -126, 0.0, root.astype(jnp.float32) * scale)


def _unit(largest: jax.Array) -> jax.Array:
  """Returns the power of two by which values become integers of 23 bits."""
  small = largest < SMALLEST
  return _power(jnp.where(small, -126, _UNIT - _exponent(largest)))


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


def _products(values: jax.Array, unit: jax.Array) -> list[jax.Array]:
  """Returns the squares of values in units, in three parts: int32.

  With low and high 12 bits of each integer, these are low^2, 2 low high and
  high^2, at most 2^24 each.
  """
  # Units are at most 2^23; processors convert to signed integers faster.
  units = jnp.round(jnp.abs(values) * unit).astype(jnp.int32)
  low, high = units & 0xFFF, units >> _LIMB
  return [low * low, 2 * low * high, high * high]


def _square_sums(
  parts: Sequence[jax.Array | Counted], unit: jax.Array
) -> jax.Array:
  """Returns the sum of squares of values in units, as six sums of parts.

  128 of each of the products are added, and of these sums the low and the high
  16 bits, of up to 2^16, so that nothing overflows.

  Returns:
    uint32 [6, C], one column for each 2^23 values.
  """
  rows_3xM = jnp.concatenate([_rows(x, unit) for x in parts], axis=1)
  halves_3x2xM = jnp.stack([rows_3xM & 0xFFFF, rows_3xM >> 16], axis=1)
  return _row_sums(halves_3x2xM.reshape(6, -1), 2**16)


def _rows(x: jax.Array | Counted, unit: jax.Array) -> jax.Array:
  """Returns the sums of `_products` of up to 128 values: uint32 [3, M]."""
  if isinstance(x, Counted):
    counts_NxC = x.counts_NxC.astype(jnp.int32)
    products = [p * counts_NxC for p in _products(x.values_NxC, unit)]
    return jnp.sum(jnp.stack(products), axis=2).astype(jnp.uint32)
  products_3xN = jnp.stack(_products(x, unit))
  return _row_sums(products_3xN, ROW).astype(jnp.uint32)


def _limbs(sums_6xM: jax.Array) -> jax.Array:
  """Returns the integers of sums of parts: uint32 [7, M], of 12 bits."""
  limbs: list[ct.Scalar] = [0] * _LIMBS
  for i, x in enumerate(sums_6xM):
    # The low or the high half of a product, each 12 bits above the last.
    first, shift = (i // 2, 0) if i % 2 == 0 else (i // 2 + 1, 4)
    limbs[first] += (x << shift) & 0xFFF
    limbs[first + 1] += (x >> (_LIMB - shift)) & 0xFFF
    limbs[first + 2] += (x >> (2 * _LIMB - shift)) & 0xFFF
  return _carry(jnp.stack([jnp.zeros_like(sums_6xM[0]) + x for x in limbs]))


def _add_up(limbs: jax.Array) -> jax.Array:
  """Returns the sum of the columns: uint32 [7, 1]."""
  while limbs.shape[1] > 1:
    limbs = _carry(_row_sums(limbs, _ROW))
  return limbs


def _row_sums(x_LxM: jax.Array, width: int) -> jax.Array:
  """Returns sums of up to `width` numbers each: uint32 [L, N]."""
  size = x_LxM.shape[1]
  width = min(max(size, 1), width)
  padded = jnp.pad(x_LxM, ((0, 0), (0, -size % width if size else 1)))
  # Sums along the last axis would not be vectorized.
  rows_LxRxN = padded.reshape(x_LxM.shape[0], width, -1)
  return jnp.sum(rows_LxRxN, axis=1, dtype=x_LxM.dtype)


def _carry(limbs: jax.Array) -> jax.Array:
  """Normalizes limbs along the first axis to 12 bits each."""
  found, carry = [], jnp.zeros_like(limbs[0])
  for limb in limbs:
    found.append((limb + carry) & 0xFFF)
    carry = (limb + carry) >> _LIMB
  return jnp.stack(found)
