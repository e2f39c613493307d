"""The exact arithmetic of the protocol: payloads and old state to new state.

docs/protocol.md describes the rules in words.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

F = np.float32
WHOLE = 64  # parts of a weight of 1


def product(a, b) -> np.ndarray:
  """A * b in float32, then rounded to 22 explicit bits, then flushed."""
  bits = np.asarray(np.multiply(F(a), F(b), dtype=F)).view(np.uint32)
  bits = (bits + (bits >> np.uint32(1) & np.uint32(1))) & ~np.uint32(1)
  cut = bits.view(F)
  return np.where(np.abs(cut) < F(2.0**-100), F(0), cut)


def norm(values: Sequence[np.ndarray]) -> np.float32:
  """The L2 norm of values in units of 2^-22 of the largest's power of two."""
  flat = np.abs(np.concatenate([np.ravel(v) for v in values] + [np.zeros(1)]))
  if flat.max() < 2.0**-100:
    return F(0)
  exponent = math.frexp(flat.max())[1] - 1
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
  part = math.ldexp((int(m * 2**24) << 22) // int(n * 2**24), e - d - 22)
  return F(part if part >= 2.0**-100 else 0)


def threefry(key: np.ndarray, x: np.ndarray, y: np.ndarray):
  """Threefry-2x32 with 20 rounds on uint32 counters."""
  keys = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
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
  mantissa, exponent = math.frexp(deviation / math.sqrt(5 * (2**24 - 1) / 3))
  unit = math.ldexp(round(mantissa * 512), exponent - 9)
  return ((2 * total - 5 * 4095) * unit).astype(F).reshape(shape)


class Tensor(NamedTuple):  # its layout on the wire
  shape: tuple[int, ...]
  block: tuple[int, int]  # height and width
  k: int  # values of a full block


def spans(size: int, side: int) -> list[tuple[int, int, int]]:
  """(start, stop, block side): whole blocks, then the rest."""
  cut = size // side * side
  return [x for x in ((0, cut, side), (cut, size, size - cut)) if x[1] > x[0]]


def positions(tensor: Tensor) -> list[np.ndarray]:
  """Flat positions of every region's elements: int [blocks, block size]."""
  *stack, rows, columns = (1, *tensor.shape)[-max(len(tensor.shape), 2) :]
  height, width = tensor.block
  if len(tensor.shape) < 2:
    height, width = 1, height * width
  at = np.arange(math.prod(tensor.shape)).reshape(-1, rows, columns)
  found = []
  for top, bottom, h in spans(rows, height):
    for left, right, w in spans(columns, width):
      part = at[:, top:bottom, left:right]
      tiles = part.reshape(len(at), (bottom - top) // h, h, -1, w)
      found.append(tiles.transpose(0, 1, 3, 2, 4).reshape(-1, h * w))
  return found


def unpack(bits: np.ndarray, size: int, k: int, width: int):
  """One block's bits -> indices and codes (Elias-Fano, low bit first)."""
  low = (size // k).bit_length() - 1
  number = lambda b: int(sum(int(x) << i for i, x in enumerate(b)))  # noqa: E731
  ones = np.flatnonzero(bits[k * low : len(bits) - k * width])
  lows = [number(bits[i * low : (i + 1) * low]) for i in range(k)]
  indices = [int(o) - i << low | lows[i] for i, o in enumerate(ones)]
  codes = bits[len(bits) - k * width :].reshape(k, width)
  return indices, [number(c) for c in codes]


def values(codes: np.ndarray, scales: np.ndarray, quantizer: str) -> np.ndarray:
  """The values that codes [N, K] stand for."""
  if quantizer == 'sign':
    return np.where(codes == 1, scales, -scales)
  if quantizer == 'sign-magnitude':
    size = np.where(codes >= 2, scales[1], scales[0]) * scales[2:]
    return np.where(codes % 2 == 1, size, -size)
  if quantizer == 'statistical':
    return scales[0, 1:][codes] + scales[0, 0]
  if quantizer == 'linear':
    steps = codes.astype(F) - F(2)
    return (product(steps, scales[0, 1]) + scales[0, 0]).astype(F)
  return codes


QUANTIZERS = {  # bits of a code, type of the scales, their shape for N blocks
  'sign': (1, ml_dtypes.bfloat16, lambda n: (n, 1)),
  'sign-magnitude': (2, ml_dtypes.bfloat16, lambda n: (n + 2, 1)),
  'statistical': (2, F, lambda n: (1, 5)),
  'linear': (2, F, lambda n: (1, 2)),
  'none': (32, F, lambda n: (0, 0)),
}


def decode(data: bytes, tensors: Sequence[Tensor], quantizer: str):
  """A payload -> for each tensor the flat positions and values it sends."""
  body, at = data[86:-96], 0  # after the header; before digest and signature
  width, dtype, scale_shape = QUANTIZERS[quantizer]
  message = []
  for tensor in tensors:
    where, what = [], []
    for places in positions(tensor):
      n, size = places.shape
      full = tensor.block[0] * tensor.block[1]
      k = max(1, math.floor(tensor.k * size / full + 0.5))
      coded, low = width % 32, (size // k).bit_length() - 1
      each = k * low + k + -(-size // 2**low) + k * coded
      length = -(-n * each // 8)
      packed = np.frombuffer(body[at : at + length], np.uint8)
      bits = np.unpackbits(packed, bitorder='little')[: n * each]
      blocks = [unpack(b, size, k, coded) for b in bits.reshape(n, each)]
      at += length
      codes = np.array([codes for _, codes in blocks])
      if width == 32:
        codes = np.frombuffer(body[at : at + 4 * n * k], '<f4').reshape(n, k)
        at += 4 * n * k
      length = math.prod(shape := scale_shape(n)) * np.dtype(dtype).itemsize
      scales = np.frombuffer(body[at : at + length], dtype).reshape(shape)
      at += length
      rows = np.array([p[i] for p, (i, _) in zip(places, blocks, strict=True)])
      where.append(rows.ravel())
      what.append(values(codes, scales.astype(F), quantizer).ravel())
    message.append((np.concatenate(where), np.concatenate(what).astype(F)))
  return message


def bound(messages, weights, steps) -> tuple[np.float32, np.float32]:
  """The factor of a round's messages, and the round's size.

  Args:
    messages: for each message the positions and values of every tensor.
    weights: parts of 64.
    steps: the sizes of the rounds before, newest first; 16 are kept.
  """
  norms = [[norm([what]) for _, what in message] for message in messages]
  medians = [sorted(column)[(len(norms) - 1) // 2] for column in zip(*norms)]  # noqa: B905
  total = 0.0
  for row, parts in zip(norms, weights, strict=True):
    clipped = [product(x, quotient(m, x)) for x, m in zip(row, medians)]  # noqa: B905
    total += float(norm([np.array(clipped)])) * parts
  size = F(total / sum(weights))
  known = [F(x) for x in steps if x]
  if len(known) < 3:
    return F(1), size
  middle = [sorted(x)[(len(x) - 1) // 2] for x in (known, known[:3])]
  factor = quotient(F(product(max(middle), F(4))), size)
  return factor, F(product(factor, size)) if factor < 1 else size


def outer_step(
  payloads, weights, params, traces, tensors, quantizer, rate, mu, steps=()
):
  """Payloads in uid order move flat params and their momentum, in place.

  Weights are parts of 64; rate and mu are those of the outer step; steps are
  the sizes of the rounds before. Returns these with that of this round.
  """
  messages = [decode(data, tensors, quantizer) for data in payloads]
  limit, size = bound(messages, weights, steps)
  total, count = max(sum(weights), 1), max(len(weights), 1)
  for p, (theta, trace) in enumerate(zip(params, traces, strict=True)):
    norms = [norm([message[p][1]]) for message in messages]
    above = sorted(n for n in norms if n > 0) or [F(0)]
    median = above[(len(above) - 1) // 2]
    sums, senders = np.zeros_like(theta), np.zeros(theta.shape, np.int64)
    for message, length, parts in zip(messages, norms, weights, strict=True):
      where, what = message[p]
      factor = product(quotient(median, length), F(parts) / F(WHOLE))
      factor = product(factor, limit) if limit < 1 else factor
      sums[where] += product(factor, what)
      senders[where] += parts
    divisors = np.maximum(senders * float(count), float(total))
    delta = product(sums, (float(WHOLE * count) / divisors).astype(F))
    trace[:] = delta + product(F(mu), trace)
    theta[:] = theta - product(F(rate), delta + product(F(mu), trace))
  return [size, *steps][:16] if size else list(steps)


def fingerprint(arrays: Sequence[np.ndarray]) -> str:
  """A digest of the bits of arrays."""
  data = b''.join(np.asarray(a, '<f4').tobytes() for a in arrays)
  return hashlib.blake2b(data, digest_size=16).hexdigest()
