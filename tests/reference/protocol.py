"""The exact arithmetic of the protocol, specified in NumPy.

From decoded messages and old state to new state, bit for bit as every node
computes it. docs/protocol.md describes the rounding rules in words.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

F = np.float32
WHOLE = 64  # parts of a weight of 1


def product(a, b) -> np.ndarray:
  """A * b in float32, then rounded to 22 explicit bits, then flushed."""
  p = np.asarray(np.multiply(F(a), F(b), dtype=F))
  bits = p.view(np.uint32)
  bits = (bits + (bits >> np.uint32(1) & np.uint32(1))) & ~np.uint32(1)
  cut = bits.view(F)
  return np.where(np.abs(cut) < F(2.0**-100), F(0), cut)


def norm(values: Sequence[np.ndarray]) -> np.float32:
  """The L2 norm of values in units of 2^-22 of the largest's power of two."""
  flat = np.abs(np.concatenate([np.ravel(v) for v in values] + [np.zeros(1)]))
  largest = float(flat.max())
  if largest < 2.0**-100:
    return F(0)
  exponent = math.frexp(largest)[1] - 1
  units = np.rint(np.ldexp(flat.astype(np.float64), 22 - exponent))
  total = sum(int(u) ** 2 for u in units)
  root = math.isqrt(total)
  beyond = max(root.bit_length() - 24, 0)
  return F(math.ldexp(root >> beyond, exponent - 22 + beyond))


def quotient(a: np.float32, b: np.float32) -> np.float32:
  """min(1, a / b) with a quotient of mantissas rounded down to 2^-22."""
  if a >= b or b < 2.0**-100:
    return F(1)
  if a < 2.0**-100:
    return F(0)
  (m, e), (n, d) = math.frexp(float(a)), math.frexp(float(b))
  m, n = int(m * 2**24), int(n * 2**24)
  part = math.ldexp((m << 22) // n, e - d - 22)
  return F(part if part >= 2.0**-100 else 0)


def threefry(key: np.ndarray, x: np.ndarray, y: np.ndarray):
  """Threefry-2x32 with 20 rounds on uint32 counters."""
  keys = [key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
  x, y = x + keys[0], y + keys[1]
  for i in range(20):
    r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
    x = x + y
    y = (y << np.uint32(r) | y >> np.uint32(32 - r)) ^ x
    if i % 4 == 3:
      j = i // 4 + 1
      x, y = x + keys[j % 3], y + keys[(j + 1) % 3] + np.uint32(j)
  return x, y


def initial(seed: int, name: str, shape: Sequence[int], deviation: float):
  """Initial values of the tensor `name`: multiples of one exact unit."""
  words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  key = words ^ np.frombuffer(digest, '<u4')
  at = np.arange(math.prod(shape), dtype=np.uint64)
  rows, columns = at // shape[-1], at % shape[-1]
  x, y = threefry(key, rows.astype(np.uint32), columns.astype(np.uint32))
  last = x >> np.uint32(24) | y >> np.uint32(24) << np.uint32(8)
  fields = (x, x >> np.uint32(12), y, y >> np.uint32(12), last)
  total = sum((f & np.uint32(4095)).astype(np.int64) for f in fields)
  unit = deviation / math.sqrt(20 * (2**24 - 1) / 12)
  mantissa, exponent = math.frexp(unit)
  unit = math.ldexp(round(mantissa * 512), exponent - 9)
  return ((2 * total - 5 * 4095) * unit).astype(F).reshape(shape)
