import hashlib

import hypothesis
import hypothesis.strategies as st
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import interface
from covenant.store import location as location_lib
from covenant.wire import commitment as commitment_lib

Role = commitment_lib.Role
COMMITMENT = commitment_lib.Commitment(Role.MINER, b'a bucket', 7, b'd' * 32)
COMMITMENTS = st.builds(
  commitment_lib.Commitment,
  st.sampled_from(Role),
  st.binary(max_size=commitment_lib.MAX_LOCATION),
  st.integers(0, 2**32 - 2),
  st.binary(min_size=32, max_size=32),
) | st.builds(
  lambda role, location: commitment_lib.Commitment(role, location),
  st.sampled_from(Role),
  st.binary(max_size=commitment_lib.MAX_LOCATION),
)


class CommitmentTest(parameterized.TestCase):
  @hypothesis.given(COMMITMENTS)
  def test_round_trip_within_what_the_chain_takes(self, commitment):
    data = commitment_lib.encode(commitment)
    self.assertLessEqual(len(data), interface.MAX_COMMITMENT)
    self.assertEqual(commitment_lib.decode(data), commitment)

  def test_every_location_fits(self):
    self.assertGreaterEqual(commitment_lib.MAX_LOCATION, location_lib.MAX_BYTES)
    longest = bytes(commitment_lib.MAX_LOCATION)
    data = commitment_lib.encode(COMMITMENT._replace(location=longest))
    self.assertLen(data, interface.MAX_COMMITMENT)

  def test_layout(self):
    """It is on the chain: role, round, digest, location."""
    for role, first in ((Role.MINER, b'\2'), (Role.VALIDATOR, b'\3')):
      data = commitment_lib.encode(COMMITMENT._replace(role=role))
      self.assertEqual(data, first + b'\7\0\0\0' + b'd' * 32 + b'a bucket')

  def test_commitments_without_a_role_are_of_an_earlier_format(self):
    data = commitment_lib.encode(COMMITMENT)
    self.assertIsNone(commitment_lib.decode(b'\1' + data[1:]))

  def test_a_location_that_is_too_long_is_refused(self):
    location = bytes(commitment_lib.MAX_LOCATION + 1)
    with self.assertRaisesRegex(ValueError, r'92 bytes .* at most 91'):
      commitment_lib.encode(COMMITMENT._replace(location=location))

  @hypothesis.given(st.binary(max_size=128))
  @hypothesis.example(b'\2' + b'\xff' * 4 + b'd' * 32)
  @hypothesis.example(b'\2' + bytes(35))
  @hypothesis.example(b'\1' + bytes(40))
  @hypothesis.example(b'\4' + bytes(40))
  @hypothesis.example(b'\3' + bytes(36))
  def test_anything_is_one_in_the_only_form_or_none(self, data):
    got = commitment_lib.decode(data)
    if got is not None:
      self.assertEqual(commitment_lib.encode(got), data)
    elif len(data) >= 37 and data[1:5] != b'\xff' * 4:
      self.assertNotIn(data[0], (2, 3))

  @hypothesis.given(st.integers(0, len(commitment_lib.encode(COMMITMENT)) - 1))
  def test_every_change_is_seen(self, at):
    data = bytearray(commitment_lib.encode(COMMITMENT))
    data[at] ^= 1
    self.assertNotEqual(commitment_lib.decode(bytes(data)), COMMITMENT)

  def test_digest_is_blake2b(self):
    want = hashlib.blake2b(b'bytes', digest_size=32).digest()
    self.assertEqual(commitment_lib.digest(b'bytes'), want)


if __name__ == '__main__':
  absltest.main()
