"""The exact arithmetic of the protocol, specified in NumPy.

From decoded messages and old state to new state, bit for bit as every node
computes it. docs/protocol.md describes the rounding rules in words.
"""

import math
from collections.abc import Sequence

import numpy as np

F = np.float32
WHOLE = 64  # parts of a weight of 1


def product(a, b) -> np.ndarray:
  """a * b in float32, then rounded to 22 explicit bits, then flushed."""
  p = np.asarray(np.multiply(F(a), F(b), dtype=F))
  bits = p.view(np.uint32)
  bits = (bits + (bits >> np.uint32(1) & np.uint32(1))) & ~np.uint32(1)
  cut = bits.view(F)
  return np.where(np.abs(cut) < F(2.0**-100), F(0), cut)


def norm(values: Sequence[np.ndarray]) -> np.float32:
  """The L2 norm of values in units of 2^-14 of the largest's power of two."""
  flat = np.abs(np.concatenate([np.ravel(v) for v in values] + [np.zeros(1)]))
  largest = float(flat.max())
  if largest < 2.0**-100:
    return F(0)
  exponent = math.frexp(largest)[1] - 1
  units = np.rint(np.ldexp(flat.astype(np.float64), 14 - exponent))
  total = sum(int(u) ** 2 for u in units)
  root = math.isqrt(total)
  beyond = max(root.bit_length() - 24, 0)
  return F(math.ldexp(root >> beyond, exponent - 14 + beyond))


def quotient(a: np.float32, b: np.float32) -> np.float32:
  """min(1, a / b), rounded down to a multiple of 2^-22."""
  if a >= b or b < 2.0**-100:
    return F(1)
  if a < 2.0**-100:
    return F(0)
  (m, e), (n, d) = math.frexp(float(a)), math.frexp(float(b))
  m, n = int(m * 2**24), int(n * 2**24)
  return F(math.ldexp((m << 22) // n >> (d - e), -22))
