import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant.wire import codec


@st.composite
def messages(draw):
  """(indices, codes, block_size, bits) of a few blocks of any size."""
  block_size = draw(st.integers(1, 300))
  k = draw(st.integers(1, block_size))
  n = draw(st.integers(0, 4))
  bits = draw(st.integers(0, 8))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  indices = np.array(
    [np.sort(rng.choice(block_size, k, replace=False)) for _ in range(n)],
    np.int32,
  ).reshape(n, k)
  codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
  return indices, codes, block_size, bits


class CodecTest(parameterized.TestCase):
  @hypothesis.given(messages())
  @hypothesis.settings(deadline=None)
  def test_round_trip_at_exactly_the_stated_size(self, message):
    indices, codes, block_size, bits = message
    data = codec.pack(indices, codes, block_size, bits)
    n, k = indices.shape
    self.assertLen(data, codec.section_bytes(n, block_size, k, bits))
    got_indices, got_codes = codec.unpack(data, n, block_size, k, bits)
    np.testing.assert_array_equal(got_indices, indices)
    np.testing.assert_array_equal(got_codes, codes)

  @hypothesis.given(messages(), st.data())
  @hypothesis.settings(max_examples=300)
  def test_whatever_is_accepted_is_what_its_message_encodes_to(
    self, message, data
  ):
    """Canonical: flipping any bit gives another message or a refusal."""
    indices, codes, block_size, bits = message
    packed = bytearray(codec.pack(indices, codes, block_size, bits))
    hypothesis.assume(packed)
    for _ in range(data.draw(st.integers(1, 4))):
      bit = data.draw(st.integers(0, 8 * len(packed) - 1))
      packed[bit // 8] ^= 1 << bit % 8
    shape = (*indices.shape[:1], block_size, indices.shape[1], bits)
    try:
      got = codec.unpack(bytes(packed), *shape)
    except codec.CodecError:
      return
    self.assertEqual(codec.pack(*got, block_size, bits), bytes(packed))

  def test_the_layout_by_hand(self):
    """L = 8, k = 2: l = 2; low bits 01 and 10, bitmap 10.01 -> high 0 and 1.

    Indices 1 = 0b001 and 6 = 0b110 have low bits 1 and 2, high parts 0 and 1:
    bitmap positions 0 + 0 and 1 + 1. Codes 1 and 0, one bit each. Low bit
    first: 10 01 | 1010 | 10.
    """
    data = codec.pack(np.array([[1, 6]]), np.array([[1, 0]]), 8, 1)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder='little')
    self.assertEqual(''.join(map(str, bits[:10])), '1001101010')
    self.assertEqual(codec.index_bits(8, 2), 8)

  @parameterized.parameters(
    (b'', 'expected 80 bytes, got 0'),
    (b'\0' * 80, 'expected 64 indices, got 0'),
    (b'\xff' * 80, 'expected 64 indices, got 128'),
  )
  def test_says_what_is_wrong(self, data, message):
    with self.assertRaisesRegex(codec.CodecError, message):
      codec.unpack(data, 1, 4096, 64, 2)

  def test_refuses_an_index_beyond_the_block(self):
    data = codec.pack(np.array([[0, 1, 15]]), np.zeros((1, 3), int), 16, 0)
    with self.assertRaisesRegex(codec.CodecError, 'not below 15'):
      codec.unpack(data, 1, 15, 3, 0)

  def test_refuses_a_repeated_index(self):
    data = codec.pack(np.array([[3, 3]]), np.zeros((1, 2), int), 16, 0)
    with self.assertRaisesRegex(codec.CodecError, 'strictly increasing'):
      codec.unpack(data, 1, 16, 2, 0)

  def test_refuses_bits_after_the_last_block(self):
    data = bytearray(codec.pack(np.array([[3]]), np.array([[1]]), 16, 1))
    data[-1] |= 0x80
    with self.assertRaisesRegex(codec.CodecError, 'padding'):
      codec.unpack(bytes(data), 1, 16, 1, 1)


if __name__ == '__main__':
  absltest.main()
