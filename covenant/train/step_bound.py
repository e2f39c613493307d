"""The bound of a round's step: no step is far longer than those before.

The size of a round is the weighted mean of the norms of its messages, after
each of their tensors was clipped to the round's median. It bounds the norm of
their mean. A median says nothing about a round in which all messages are one
party's, so the size is also held against the rounds before: what is longer than
`LARGEST` times their median is scaled down to that. So not even a majority of
the validators' stake can throw the parameters in one round. In a warm-up each
round is longer than the last, so if the median of the newest `FEWEST` rounds is
larger than that of all that are kept, it counts.

The sizes of the last rounds are part of the shared state. All of this is exact:
`tests/reference/protocol.py` specifies it in NumPy.
"""

import math

import numpy as np

from covenant.optim import exact
from covenant.optim import reduce

ROUNDS = 16  # sizes that are kept; each of a round with a message
FEWEST = 3  # sizes below which there is no bound
LARGEST = np.float32(4)  # in medians; a power of two, so that it is exact
_UNIT = 22  # bits of the largest norm in an integer; see `exact`
_ROOT = 24  # bits of a total norm


def total_norms(norms_RxP: np.ndarray) -> np.ndarray:
  """Returns the norms of messages from those of their tensors, float32 [R].

  They are those of `exact.norms`, computed on the host: a number for each
  tensor needs no program.

  >>> total_norms(np.array([[3, 4], [0, 0]], np.float32))
  array([5., 0.], dtype=float32)
  """
  totals = []
  for norms_P in np.asarray(norms_RxP, np.float64):
    largest = norms_P.max(initial=0.0)
    if largest < exact.SMALLEST:
      totals.append(0.0)
      continue
    exponent = math.frexp(largest)[1] - 1
    units = np.rint(np.ldexp(norms_P, _UNIT - exponent)).astype(np.int64)
    root = math.isqrt(int(np.sum(units * units)))
    beyond = max(root.bit_length() - _ROOT, 0)
    totals.append(math.ldexp(root >> beyond, exponent - _UNIT + beyond))
  return np.array(totals, np.float32)


def size(
  norms_RxP: np.ndarray, factors_RxP: np.ndarray, parts_R: np.ndarray
) -> np.float32:
  """Returns the size of a round.

  Args:
    norms_RxP: the norm of each tensor of R messages, float32.
    factors_RxP: their clip factors, without weights, float32.
    parts_R: the weights of the messages, in parts of a whole.
  """
  norms_R = total_norms(exact.product(norms_RxP, factors_RxP))
  # One after another in float64, whose products of 24 and 7 bits are exact.
  total = 0.0
  for norm, parts in zip(norms_R, parts_R, strict=True):
    total += float(norm) * int(parts)
  return np.float32(total / int(np.sum(parts_R, dtype=np.int64)))


def usual(sizes: np.ndarray) -> np.float32:
  """Returns the usual size of a round; 0 if there are too few before it.

  Args:
    sizes: those of the rounds before, newest first; 0 stands for none.
  """
  known = sizes[sizes > 0]
  if known.size < FEWEST:
    return np.float32(0)
  return max(reduce.lower_median(x) for x in (known, known[:FEWEST]))


def factor(found: np.float32, sizes: np.ndarray) -> np.float32:
  """Returns the factor of a round's messages, at most 1.

  Args:
    found: the size of the round.
    sizes: as in `usual`.

  >>> factor(np.float32(80), np.array([9, 10, 11, 0], np.float32))
  np.float32(0.5)
  """
  most = usual(sizes)
  if not most:
    return np.float32(1)
  limit = exact.product(np.array([most]), np.array([LARGEST]))
  return exact.quotient(limit, np.array([found]))[0]


def remember(sizes: np.ndarray, found: np.float32) -> np.ndarray:
  """Returns the sizes with that of one more round, which come first."""
  if not found:
    return sizes
  sizes = np.concatenate([np.full(1, found, np.float32), sizes])
  return np.pad(sizes, (0, ROUNDS))[:ROUNDS]
