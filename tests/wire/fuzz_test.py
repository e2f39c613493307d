"""Hostile bytes: refused with a reason, or exactly what their message says.

Mutants get a right digest and signature more often than not: a hostile peer
can make them, and wrong ones would hide every later check.
"""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.optim import preset
from covenant.optim import quantize
from covenant.optim import sparseloco as sl
from covenant.wire import payload

HEADER = payload.Header(
  payload.run_id('a run'),
  round=3,
  uid=7,
  root=b'h' * 16,
  receipt=b'c' * 16,
  sequences=64,
)
KEY = keys.Key.from_seed(b'm' * 32)
TAIL = 32 + 64  # bytes: the digest, the signature
LIKE = {
  'matrix': jax.ShapeDtypeStruct((96, 70), jnp.float32),
  'norm': jax.ShapeDtypeStruct((70,), jnp.float32),
}
CASES = (
  (sl.TopK(quantizer=sl.Sign()), 'elias-fano'),
  (sl.TopK(k=50, quantizer=quantize.SignMagnitude()), 'elias-fano'),
  (sl.TopK(k=16, block=(16, 16), quantizer=sl.Exact()), 'elias-fano'),
  (sl.TopK(quantizer=sl.Sign()), 'rice'),
  (preset.templar().compression, 'elias-fano'),
  (sl.Dense(), 'elias-fano'),
)
# What decoding takes beside the message: the unpacked bits of one run of
# blocks and their temporaries, about six times codec._TRANSIENT_BITS, and
# Python objects.
TRANSIENT = 2 * 2**20


def make(compression, codec, like):
  """(spec, message, payload) of a random delta."""
  spec = payload.make_spec(like, compression, codec)
  rng = np.random.default_rng(0)
  message = jax.device_get(
    {
      name: jax.jit(compression.compress)(
        rng.standard_normal(x.shape, np.float32)
      )
      for name, x in like.items()
    }
  )
  return spec, message, payload.encode(HEADER, message, like, spec, KEY.sign)


def decode(data, like, spec):
  def verify(text, signature):
    return keys.verify(KEY.address, text, signature)

  return payload.decode(data, HEADER, like, spec, verify)


def resigned(data):
  """`data` with its digest and signature made right again."""
  digest = payload._digest(data[:-TAIL])
  return data[:-TAIL] + digest + KEY.sign(digest)


def mutate(rng, data):
  """`data`, damaged in one of the ways that networks and liars have."""
  mutant = bytearray(data)
  start = int(rng.integers(len(mutant)))
  stop = start + int(rng.integers(1, 40))
  match rng.integers(9):
    case 0:
      del mutant[start:]  # truncated
    case 1:
      del mutant[start:stop]
    case 2:
      mutant[start:start] = rng.bytes(stop - start)
    case 3:
      mutant += rng.bytes(stop - start)
    case 4:
      mutant[start:stop] = bytes(len(mutant[start:stop]))
    case 5:
      mutant[start:stop] = b'\xff' * len(mutant[start:stop])
    case 6:
      mutant[start:stop] = rng.bytes(len(mutant[start:stop]))
    case 7:
      piece = mutant[start:stop]  # a piece of it, elsewhere
      at = int(rng.integers(len(mutant) - len(piece) + 1))
      mutant[at : at + len(piece)] = piece
    case 8:
      for bit in rng.integers(8 * len(mutant), size=rng.integers(1, 4)):
        mutant[bit // 8] ^= 1 << bit % 8
  fate = rng.random()
  if fate < 0.9:
    return resigned(bytes(mutant))
  if fate < 0.95:  # who is no peer can digest, but not sign
    mutant[-TAIL:-64] = payload._digest(mutant[:-TAIL])
  return bytes(mutant)


class FuzzTest(parameterized.TestCase):
  def fuzz(self, mutants):
    rng = np.random.default_rng(0)
    cases = [make(*case, LIKE) for case in CASES]
    reasons, accepted = set(), 0
    for i in range(mutants):
      spec, _, data = cases[i % len(cases)]
      mutant = mutate(rng, data)
      try:
        header, got = decode(mutant, LIKE, spec)
      except payload.PayloadError as e:
        reasons.add(e.reason)
        continue
      accepted += 1
      again = payload.encode(header, got, LIKE, spec, KEY.sign)
      self.assertEqual(again, mutant, f'mutant {i}')
    self.assertEqual(reasons, set(payload.Reason))
    # Other codes, other values: a hostile peer's, but well-formed.
    self.assertGreater(accepted, mutants // 100)

  @pytest.mark.slow
  def test_two_thousand_mutants(self):
    self.fuzz(2_000)

  @pytest.mark.thorough
  def test_a_hundred_thousand_mutants(self):
    self.fuzz(100_000)

  @parameterized.parameters(*CASES)
  @pytest.mark.rows(1)
  def test_memory_is_the_message_and_a_constant(self, compression, codec):
    like = {'w': jax.ShapeDtypeStruct((2048, 2048), jnp.float32)}
    spec, message, data = make(compression, codec, like)
    declared = sum(x.nbytes for x in jax.tree.leaves(message))
    bad = bytearray(data)
    bad[-TAIL - 8 : -TAIL] = b'\xff' * 8  # refused at the end, or accepted
    bad = resigned(bytes(bad))
    for attempt in (data, bad, data[:-1], data + b'\0', data[:40]):
      tracemalloc.start()
      try:
        decode(attempt, like, spec)
      except payload.PayloadError:
        pass
      _, peak = tracemalloc.get_traced_memory()
      tracemalloc.stop()
      self.assertLessEqual(peak, declared + TRANSIENT)
      if len(attempt) != len(data):  # refused before it cost anything
        self.assertLess(peak, 2**16)


if __name__ == '__main__':
  absltest.main()
