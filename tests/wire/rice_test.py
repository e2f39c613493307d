import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.optim import sparseloco as sl
from covenant.wire import codec
from covenant.wire import payload
from covenant.wire import rice

HEADER = payload.Header(
  payload.run_id('a run'),
  round=3,
  uid=7,
  root=b'r' * 16,
  receipt=b'c' * 16,
  sequences=64,
)


def draw(n, size, k, bits, seed=0):
  rng = np.random.default_rng(seed)
  order = np.argsort(rng.random((n, size)), axis=1)[:, :k]
  codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
  return np.sort(order, axis=1), codes


@st.composite
def messages(draw_):
  """(indices, codes, block_size, bits) of a few blocks of any size."""
  size = draw_(st.integers(1, 300))
  k = draw_(st.integers(1, size))
  bits = draw_(st.integers(0, 8))
  n, seed = draw_(st.integers(0, 20)), draw_(st.integers(0, 2**32 - 1))
  return *draw(n, size, k, bits, seed), size, bits


class RiceTest(parameterized.TestCase):
  @hypothesis.given(messages())
  @hypothesis.settings(deadline=None)
  def test_round_trip_within_the_stated_bounds(self, message):
    indices, codes, size, bits = message
    region = (len(indices), size, indices.shape[1], bits)
    data = rice.pack(indices, codes, size, bits)
    self.assertBetween(
      len(data), rice.least_bytes(*region), rice.section_bytes(*region)
    )
    self.assertEqual(rice.length(data + b'more', *region), len(data))
    got_indices, got_codes = rice.unpack(data, *region)
    np.testing.assert_array_equal(got_indices, indices)
    np.testing.assert_array_equal(got_codes, codes)

  @hypothesis.given(messages(), st.data())
  @hypothesis.settings(max_examples=300)
  def test_whatever_is_accepted_is_what_its_message_encodes_to(
    self, message, data
  ):
    indices, codes, size, bits = message
    packed = bytearray(rice.pack(indices, codes, size, bits))
    hypothesis.assume(packed)
    for _ in range(data.draw(st.integers(1, 4))):
      bit = data.draw(st.integers(0, 8 * len(packed) - 1))
      packed[bit // 8] ^= 1 << bit % 8
    del packed[data.draw(st.sampled_from([2**20, -1, 3])) :]
    region = (len(indices), size, indices.shape[1], bits)
    try:
      got = rice.unpack(bytes(packed), *region)
    except codec.CodecError:
      return
    self.assertEqual(rice.pack(*got, size, bits), bytes(packed))

  @parameterized.parameters((64, 4096), (1, 1), (1, 300), (7, 50), (32, 32))
  def test_the_bounds_are_reached(self, k, size):
    low = rice.low_bits(size, k)
    # All at the start; then the last one at the end.
    first = np.arange(k)[None]
    last = np.append(np.arange(k - 1), size - 1)[None]
    zero = np.zeros((1, k), np.uint8)
    least = rice.pack(first, zero, size, 1)
    self.assertLen(least, rice.least_bytes(1, size, k, 1))
    most = rice.pack(last, zero, size, 1)
    self.assertLen(most, rice.section_bytes(1, size, k, 1))
    self.assertEqual(int.from_bytes(most[:4], 'little'), size - k >> low)

  def test_the_layout_by_hand(self):
    """L = 16, k = 2: l = 2. Indices 1 and 12 have gaps 1 and 10 = 2 * 4 + 2.

    Low bits 01 and 10, codes 1 and 0, unary 1 and 001; low bit first:
    10 01 | 10 | 1 001. Two zeros in unary.
    """
    data = rice.pack(np.array([[1, 12]]), np.array([[1, 0]]), 16, 1)
    self.assertEqual(data[:4], b'\2\0\0\0')
    bits = np.unpackbits(np.frombuffer(data[4:], np.uint8), bitorder='little')
    self.assertEqual(''.join(map(str, bits)), '1001101001000000')

  def test_half_a_bit_an_index_less_than_elias_fano(self):
    indices, codes = draw(400, 4096, 64, 1)
    ours, theirs = (
      8 * len(module.pack(indices, codes, 4096, 1)) / indices.size
      for module in (rice, codec)
    )
    self.assertBetween(theirs - ours, 0.48, 0.52)

  def test_many_frames(self):
    indices, codes = draw(2000, 512, 40, 2)
    data = rice.pack(indices, codes, 512, 2)
    got = rice.unpack(memoryview(data), 2000, 512, 40, 2)
    np.testing.assert_array_equal(got[0], indices)
    np.testing.assert_array_equal(got[1], codes)

  @parameterized.parameters(
    (b'\2\0\0', 'before its prefix'),
    (b'\4\0\0\0\x59\x02', '4 zeros > 3'),
    (b'\2\0\0\0\x59', 'expected 6 bytes, got 5'),
    (b'\2\0\0\0\x59\x02\0', 'expected 6 bytes, got 7'),
    (b'\2\0\0\0\x59\x06', 'padding'),
    (b'\2\0\0\0\x59\x00', '2 gaps in 2 zeros, got 1'),
    (b'\2\0\0\0\xd9\x00', '2 gaps in 2 zeros, got 2'),  # a zero at the end
    (b'\3\0\0\0\x5f\x04', 'not below 16'),
  )
  def test_refuses_what_no_message_packs_to(self, data, message):
    with self.assertRaisesRegex(codec.CodecError, message):
      rice.unpack(data, 1, 16, 2, 1)


class PayloadTest(parameterized.TestCase):
  @parameterized.parameters(
    (sl.TopK(),), (sl.TopK(k=16, block=(16, 16), quantizer=sl.Exact()),)
  )
  def test_round_trip_and_what_follows_it(self, compression):
    like = {
      'matrix': jax.ShapeDtypeStruct((100, 70), jnp.float32),
      'norm': jax.ShapeDtypeStruct((70,), jnp.float32),
    }
    rng = np.random.default_rng(0)
    message = jax.device_get(
      {
        name: jax.jit(compression.compress)(
          rng.standard_normal(x.shape, np.float32)
        )
        for name, x in like.items()
      }
    )
    spec = payload.make_spec(like, compression, 'rice')
    self.assertNotEqual(
      spec.digest, payload.make_spec(like, compression).digest
    )

    def sign(digest):
      return 2 * digest

    def verify(digest, signature):
      return signature == sign(digest)

    data = payload.encode(HEADER, message, like, spec, sign)
    self.assertBetween(len(data), spec.least_bytes, spec.payload_bytes)
    got = payload.decode(data, HEADER, like, spec, verify)
    jax.tree.map(np.testing.assert_array_equal, got.message, message)
    body = data[:-96]
    for wrong in (body + b'\0', body[:-1]):
      digest = payload._digest(wrong)
      with self.assertRaises(payload.PayloadError) as caught:
        payload.decode(
          wrong + digest + sign(digest), HEADER, like, spec, verify
        )
      self.assertEqual(caught.exception.reason, payload.Reason.LENGTH)


if __name__ == '__main__':
  absltest.main()
