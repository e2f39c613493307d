"""The memory that decoding a payload of megabytes takes, by its spec."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import compression as compression_lib
from covenant.optim import sparseloco as sl
from covenant.wire import lazy
from covenant.wire import payload

HEADER = payload.Header(
  payload.run_id('a run'),
  round=3,
  uid=7,
  root=b'r' * 16,
  receipt=b'c' * 16,
  sequences=64,
)
LIKE = {'w': jax.ShapeDtypeStruct((16384, 16384), jnp.float32)}
# The unpacked bits of some hundred blocks and their temporaries.
TRANSIENT = 2 * 2**20


def sign(digest):
  return 2 * digest


def verify(digest, signature):
  return signature == sign(digest)


def make_payload(codec):
  """(spec, payload): 4.8 MB, made without the gigabyte that it stands for."""
  spec = payload.make_spec(LIKE, sl.TopK(), codec)
  ((region,),) = [t.regions for t in spec.tensors]
  n, k = region.num_blocks, region.k
  rng = np.random.default_rng(0)
  places_NxK = rng.integers(0, region.block_size // k, (n, k), np.uint16)
  places_NxK += np.arange(
    0, region.block_size, region.block_size // k, np.uint16
  )
  packet = compression_lib.Packet(
    places_NxK,
    rng.integers(0, 2, (n, k), np.uint8),
    rng.random((n, 1)).astype(jnp.bfloat16),
  )
  return spec, payload.encode(HEADER, {'w': (packet,)}, LIKE, spec, sign)


def declared_bytes(spec):
  """Returns the bytes of a message: 2 per index, 1 per code, 2 per scale."""
  regions = [r for t in spec.tensors for r in t.regions]
  return sum(r.num_blocks * (3 * r.k + 2) for r in regions)


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters('elias-fano', 'rice')
  def test_is_what_the_spec_declares_and_a_constant(self, codec):
    spec, data = make_payload(codec)
    self.assertGreater(len(data), 4_000_000)
    tracemalloc.start()
    try:
      got = payload.decode(data, HEADER, LIKE, spec, verify)
      _, peak = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    held = sum(x.nbytes for x in jax.tree.leaves(got.message))
    self.assertEqual(held, declared_bytes(spec))
    self.assertLessEqual(peak, declared_bytes(spec) + TRANSIENT)
    # The payload itself, which is there before, and the message.
    declared = len(data) + declared_bytes(spec)
    self.assertLessEqual(len(data) + peak, 2 * declared)
    self.assertLessEqual(peak, 3.2 * len(data))

  @parameterized.parameters('elias-fano', 'rice')
  def test_a_message_that_stays_packed_takes_no_more(self, codec):
    spec, data = make_payload(codec)
    lazy.reopen(data, LIKE, spec)  # numpy's own memory is there now
    tracemalloc.start()
    try:
      message = lazy.reopen(data, LIKE, spec)
      held, _ = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    self.assertIsNotNone(message)
    self.assertLess(held, len(data) / 100)

  def test_a_liar_costs_nothing(self):
    """A frame that says it has more zeros than its blocks can have."""
    spec, data = make_payload('rice')
    start = payload._HEADER.size
    body = data[:start] + b'\xff' * 4 + data[start + 4 : -96]
    digest = payload._digest(body)
    lie = body + digest + sign(digest)
    tracemalloc.start()
    try:
      with self.assertRaisesRegex(payload.PayloadError, 'zeros >'):
        payload.decode(lie, HEADER, LIKE, spec, verify)
      _, peak = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    self.assertLess(peak, TRANSIENT)


if __name__ == '__main__':
  absltest.main()
