import copy
import hashlib
import pickle
from unittest import mock

import bittensor_core
import hypothesis
import hypothesis.strategies as st
import pytest
from absl.testing import absltest
from absl.testing import parameterized
from nacl import signing

from covenant.chain import keys

SEED = hashlib.blake2b(b'a secret', digest_size=32).digest()
KEY = keys.Key.from_seed(SEED)


def _spelled(prefix: int) -> str:
  """Returns the address of the key on another chain."""
  with mock.patch.object(keys, '_PREFIX', bytes([prefix])):
    return keys._address(bytes(signing.SigningKey(SEED).verify_key))


class KeysTest(parameterized.TestCase):
  def test_a_seed_is_a_key(self):
    same = keys.Key.from_seed(SEED)
    self.assertEqual(KEY.address, same.address)
    self.assertEqual(KEY.sign(b'data'), same.sign(b'data'))
    self.assertLen(KEY.sign(b'data'), 64)
    self.assertTrue(keys.verify(same.address, b'data', KEY.sign(b'data')))

  def test_rfc_8032(self):
    # Test 2 of section 7.1 of RFC 8032.
    key = keys.Key.from_seed(
      bytes.fromhex(
        '4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb'
      )
    )
    self.assertEqual(
      key.sign(bytes.fromhex('72')).hex(),
      '92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da'
      '085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00',
    )

  @parameterized.parameters(b'', bytes(31), bytes(33), b'x' * 64)
  def test_seed_length(self, seed):
    message = f'^seed of a key: expected 32 bytes, got {len(seed)}$'
    with self.assertRaisesRegex(ValueError, message):
      keys.Key.from_seed(seed)

  def test_the_secret_is_not_shown(self):
    public = bytes(signing.SigningKey(SEED).verify_key)
    for shown in (repr(KEY), str(KEY), f'{KEY}', f'{KEY!r}', f'{[KEY]}'):
      self.assertIn(KEY.address, shown)
      self.assertNotIn(SEED.hex(), shown)
      self.assertNotIn(str(SEED), shown)
      self.assertNotIn(public.hex(), shown)
    with self.assertRaises(TypeError):
      pickle.dumps(KEY)
    with self.assertRaises(TypeError):
      copy.deepcopy(KEY)

  @parameterized.parameters(
    ('', b'data', KEY.sign(b'data')),
    ('5', b'data', KEY.sign(b'data')),
    (KEY.address[:-1], b'data', KEY.sign(b'data')),
    (KEY.address + ' ', b'data', KEY.sign(b'data')),
    ('\ud800', b'data', KEY.sign(b'data')),
    (None, b'data', KEY.sign(b'data')),
    (KEY.address.encode(), b'data', KEY.sign(b'data')),
    (KEY.address, 'data', KEY.sign(b'data')),
    (KEY.address, None, KEY.sign(b'data')),
    (KEY.address, b'datum', KEY.sign(b'data')),
    (KEY.address, b'data', b''),
    (KEY.address, b'data', KEY.sign(b'data')[:-1]),
    (KEY.address, b'data', KEY.sign(b'data') + b'\0'),
    (KEY.address, b'data', KEY.sign(b'data').hex()),
    (KEY.address, b'data', bytearray(KEY.sign(b'data'))),
    (KEY.address, b'data', None),
    (KEY.address, b'data', bytes(64)),
    (KEY.address, b'data', b'\xff' * 64),
    (keys.Key.from_seed(bytes(32)).address, b'data', KEY.sign(b'data')),
  )
  def test_not_a_signature(self, address, data, signature):
    self.assertIs(keys.verify(address, data, signature), False)

  def test_a_signature_has_one_encoding(self):
    order = 2**252 + 27742317777372353535851937790883648493
    signature = KEY.sign(b'data')
    s = int.from_bytes(signature[32:], 'little') + order
    other = signature[:32] + s.to_bytes(32, 'little')
    self.assertFalse(keys.verify(KEY.address, b'data', other))

  @hypothesis.given(st.binary(min_size=32, max_size=32), st.binary())
  def test_as_bittensor(self, seed, data):
    other = bittensor_core.Keypair.from_seed(
      seed, bittensor_core.CRYPTO_ED25519
    )
    key = keys.Key.from_seed(seed)
    self.assertEqual(key.address, other.ss58_address)
    self.assertEqual(key.sign(data), other.sign(data))
    self.assertTrue(keys.verify(other.ss58_address, data, other.sign(data)))

  def test_addresses(self):
    """Each has one spelling; that of another chain's prefix is none."""
    other = bittensor_core.Keypair.from_seed(
      SEED, bittensor_core.CRYPTO_ED25519
    )
    self.assertEqual(other.ss58_address, KEY.address)
    self.assertTrue(keys.is_address(KEY.address))
    for address in (
      '', KEY.address + '1', '1' + KEY.address, KEY.address[:-1],
      _spelled(0), _spelled(2), keys._address(bytes(32)), '\ud800' * 48,
    ):  # fmt: skip
      self.assertFalse(keys.is_address(address), address)
      self.assertFalse(keys.verify(address, b'data', KEY.sign(b'data')))

  def test_a_wrapped_message_is_another(self):
    signature = KEY.sign(b'<Bytes>data</Bytes>')
    self.assertFalse(keys.verify(KEY.address, b'data', signature))

  def test_keys_of_a_small_order(self):
    # Any message fits this signature where such keys are let in.
    identity = (1).to_bytes(32, 'little')
    signature = identity + bytes(32)
    p = 2**255 - 19
    order_8 = (
      '26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05',
      'c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a',
    )
    points = [bytes.fromhex(x) for x in order_8]
    points += [y.to_bytes(32, 'little') for y in (0, 1, p - 1, p, p + 1)]
    points += [x[:31] + bytes([x[31] | 128]) for x in points]  # the other x
    self.assertLen(set(points), 14)
    for public in points:
      address = keys._address(public)
      self.assertLen(address, 48)
      for other in (signature, public + bytes(32)):
        for data in (b'data', b'other', b''):
          self.assertFalse(keys.verify(address, data, other))

  @hypothesis.given(st.integers(0, 47), st.characters(codec='ascii'))
  def test_an_address_has_one_spelling(self, place, letter):
    other = KEY.address[:place] + letter + KEY.address[place + 1 :]
    self.assertEqual(
      keys.verify(other, b'data', KEY.sign(b'data')), other == KEY.address
    )

  @hypothesis.settings(deadline=None)
  @hypothesis.given(st.text(), st.binary(), st.binary(min_size=64, max_size=64))
  def test_noise_never_verifies(self, address, data, signature):
    self.assertFalse(keys.verify(address, data, signature))
    self.assertFalse(keys.verify(KEY.address, data, signature))

  @pytest.mark.slow
  @hypothesis.settings(deadline=None)
  @hypothesis.given(st.binary(), st.integers(0, 511))
  def test_a_flipped_bit(self, data, bit):
    signature = KEY.sign(data)
    self.assertTrue(keys.verify(KEY.address, data, signature))
    flipped = int.from_bytes(signature, 'little') ^ 1 << bit
    self.assertFalse(
      keys.verify(KEY.address, data, flipped.to_bytes(64, 'little'))
    )


if __name__ == '__main__':
  absltest.main()
