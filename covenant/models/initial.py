"""Initial parameters with the same bits on every machine.

Every element is a function of the seed, the tensor's name and its own position:
64 bits of Threefry-2x32 (Salmon et al., SC 2011) give five uniform integers of
12 bits, whose sum is nearly normal. The standard deviation is rounded to nine
bits, so that each element is an exact product of two integers and a power of
two. Shards can be made where they lie, in any order.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_FIELD = 0xFFF
# Of twice the sum of five uniform integers below 2^12.
_DEVIATION = (4 * 5 * (2**24 - 1) / 12) ** 0.5


def normal(
  seed: Any, name: str, shape: Sequence[int], deviation: float
) -> jax.Array:
  """Returns nearly normal float32 values with mean 0.

  Args:
    seed: uint32 [2].
    name: the tensor's; equal names give equal values.
    shape: with at least one axis, and less than 2^32 rows.
    deviation: the standard deviation, rounded to nine bits.
  """
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  key = jnp.asarray(seed, jnp.uint32) ^ np.frombuffer(digest, '<u4')
  # The position as (row, column), since elements may be more than 2^32.
  row, stride = jnp.zeros(tuple(shape), jnp.uint32), 1
  for axis in reversed(range(len(shape) - 1)):
    along = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
    row, stride = row + along * jnp.uint32(stride), stride * shape[axis]
  column = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), len(shape) - 1)
  x, y = threefry(key[0], key[1], row, column)
  fields = x, x >> 12, y, y >> 12, (x >> 24) | ((y >> 24) << 8)
  total = sum(((f & _FIELD).astype(jnp.int32) for f in fields), jnp.int32(0))
  centered = (2 * total - 5 * _FIELD).astype(jnp.float32)
  return centered * jnp.float32(step(deviation))


def step(deviation: float) -> float:
  """Returns the value of one unit: `deviation`'s, rounded to nine bits."""
  mantissa, exponent = np.frexp(deviation / _DEVIATION)
  return float(np.ldexp(np.rint(mantissa * 2**9), exponent - 9))


def threefry(
  key0: jax.Array, key1: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Encrypts counters (x, y) by 20 rounds of Threefry-2x32; all uint32."""
  keys = key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY)
  x, y = x + keys[0], y + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      x = x + y
      y = ((y << rotation) | (y >> (32 - rotation))) ^ x
    x = x + keys[(group + 1) % 3]
    y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
  return x, y
