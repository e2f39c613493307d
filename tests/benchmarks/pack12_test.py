import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from benchmarks import pack12
from covenant.wire import codec
from tests import helpers

GOLDEN = helpers.GOLDEN / 'pack12.npz'
NAMES = ('a', 'b', 'c', 'd', 'e', 'f', 'g', '3d')


@st.composite
def messages(draw):
  """(indices, codes, block_size, bits) with an even number of indices."""
  block_size = draw(st.integers(1, 4096))
  k = draw(st.integers(1, min(70, block_size)))
  n = draw(st.integers(0, 4))
  hypothesis.assume(n * k % 2 == 0)
  bits = draw(st.integers(0, 8))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  indices = np.array(
    [np.sort(rng.choice(block_size, k, replace=False)) for _ in range(n)],
    np.int32,
  ).reshape(n, k)
  codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
  return indices, codes, block_size, bits


class Pack12Test(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_bytes_are_those_of_the_reference_system(self, name):
    with np.load(GOLDEN) as golden:
      indices = golden[f'pack_in_{name}']
      want = golden[f'pack_out_{name}'].tobytes()
    self.assertEqual(pack12.pack12(indices), want)
    np.testing.assert_array_equal(pack12.unpack12(want), np.ravel(indices))

  @parameterized.parameters(
    ([1, 2, 3], 'even number, got 3'),
    ([0, 4096], 'index 4096 does not fit 12 bits'),
    # Accepted by the reference, which reads it back as 4095.
    ([-1, 0], 'index -1 does not fit 12 bits'),
  )
  def test_refuses_what_does_not_fit(self, indices, message):
    with self.assertRaisesRegex(codec.CodecError, message):
      pack12.pack12(np.array(indices))

  def test_nothing_is_no_bytes(self):
    self.assertEqual(pack12.pack12(np.zeros((0, 64), np.int32)), b'')

  def test_refuses_half_a_pair(self):
    with self.assertRaisesRegex(codec.CodecError, 'got 4 bytes'):
      pack12.unpack12(b'1234')


class SectionTest(parameterized.TestCase):
  def test_fourteen_bits_a_value(self):
    self.assertEqual(pack12.section_bytes(8, 4096, 64, 2), 8 * 64 * 14 // 8)

  @hypothesis.given(messages())
  @hypothesis.settings(deadline=None)
  def test_round_trip_at_exactly_the_stated_size(self, message):
    indices, codes, block_size, bits = message
    data = pack12.pack(indices, codes, block_size, bits)
    n, k = indices.shape
    self.assertLen(data, pack12.section_bytes(n, block_size, k, bits))
    got_indices, got_codes = pack12.unpack(data, n, block_size, k, bits)
    np.testing.assert_array_equal(got_indices, indices)
    np.testing.assert_array_equal(got_codes, codes)

  @parameterized.parameters((codec, 408 * 3 + 5), (pack12, 4096 + 7))
  def test_round_trip_of_many_runs_of_blocks(self, module, n):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((n, 256))
    indices = np.sort(np.argsort(scores, axis=1)[:, :40], axis=1)
    codes = rng.integers(0, 4, (n, 40))
    data = module.pack(indices, codes, 256, 2)
    self.assertLen(data, module.section_bytes(n, 256, 40, 2))
    got = module.unpack(data, n, 256, 40, 2)
    np.testing.assert_array_equal(got[0], indices)
    np.testing.assert_array_equal(got[1], codes)

  @parameterized.parameters(
    ((1, 4097, 64, 2), 'blocks of 4096, not of 4097'),
    ((3, 64, 1, 2), 'even number, got 3 x 1'),
  )
  def test_says_which_blocks_cannot_travel(self, region, message):
    with self.assertRaisesRegex(codec.CodecError, message):
      pack12.section_bytes(*region)

  @parameterized.parameters(
    (b'', 'expected 4 bytes, got 0'),
    (pack12.pack12(np.array([5, 5])) + b'\0', 'strictly increasing'),
    (pack12.pack12(np.array([5, 3])) + b'\0', 'strictly increasing'),
    (pack12.pack12(np.array([5, 64])) + b'\0', 'not below 64'),
    (pack12.pack12(np.array([5, 6])) + b'\x10', 'padding'),
  )
  def test_refuses_what_no_message_packs_to(self, data, message):
    with self.assertRaisesRegex(codec.CodecError, message):
      pack12.unpack(data, 1, 64, 2, 2)


if __name__ == '__main__':
  absltest.main()
