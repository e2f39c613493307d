import json

from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.wire import amendment
from covenant.wire import manifest

RUN = b'r' * 16
ONE = keys.Key.from_seed(b'1' * 32)
TWO = keys.Key.from_seed(b'2' * 32)
CHANGES = {'rounds': 40, 'optim.outer.learning_rate': 0.7}
MADE = amendment.make(RUN, 9, CHANGES)


def adoption(*signers, of=MADE):
  supports = [amendment.sign(of, key.address, key.sign) for key in signers]
  return amendment.Adoption(of, tuple(sorted(supports)))


def signed(**changes):
  whole = manifest.Manifest(RUN, 7, b'o' * 32, '0f' * 16, ONE.address, ())
  return manifest.encode(whole._replace(**changes), ONE.sign)


class AmendmentTest(parameterized.TestCase):
  def test_values_are_what_was_given(self):
    self.assertEqual(MADE.values, CHANGES)
    self.assertEqual(
      MADE, amendment.make(RUN, 9, dict(reversed(CHANGES.items())))
    )
    self.assertNotEqual(MADE.digest, amendment.make(RUN, 8, CHANGES).digest)
    self.assertNotEqual(
      MADE.digest, amendment.make(b's' * 16, 9, CHANGES).digest
    )

  @parameterized.parameters(
    (0, {'rounds': 4}, 'expected a round from 1'),
    (10**8, {'rounds': 4}, 'expected a round from 1'),
    (9, {}, 'expected 1 to 64 changes'),
    (9, {f'a{i}': 1 for i in range(65)}, 'expected 1 to 64 changes'),
    (9, {'A': 1}, 'the path of a field'),
    (9, {'rounds': 'x' * amendment.MAX_BYTES}, 'at most 65536 bytes'),
  )
  def test_bounds(self, round_index, values, error):
    with self.assertRaisesRegex(amendment.AmendmentError, error):
      amendment.make(RUN, round_index, values)

  def test_a_manifest_adopts_it(self):
    data = signed(adoption=adoption(ONE, TWO))
    found = manifest.decode(data, keys.verify)
    self.assertEqual(found.adoption, adoption(ONE, TWO))
    self.assertEqual(manifest.encode(found, ONE.sign), data)

  def test_a_manifest_without_one_has_the_bytes_of_earlier_releases(self):
    body = signed()[:-64]
    self.assertEqual(
      [*json.loads(body)],
      ['run', 'round', 'root', 'fingerprint', 'hotkey', 'entries'],
    )

  def test_a_manifest_refuses_it(self):
    forged = amendment.Support(TWO.address, bytes(64))
    other = amendment.make(b's' * 16, 9, CHANGES)
    for changes, error in (
      ({'adoption': amendment.Adoption(MADE, (forged,))}, 'did not sign'),
      ({'adoption': adoption(ONE, of=other)}, 'of another run'),
      ({'adoption': adoption(ONE), 'round': 8}, 'from round 10 on, got one'),
      (
        {'adoption': amendment.Adoption(MADE, adoption(ONE).supports * 2)},
        'each hotkey once',
      ),
    ):
      with self.assertRaisesRegex(manifest.ManifestError, error):
        manifest.decode(signed(**changes), keys.verify)

  def test_supports(self):
    signature = adoption(ONE).supports[0].signature
    data = amendment.encode_supports({MADE: signature})
    decode = amendment.decode_supports
    found = decode(data, RUN, ONE.address, keys.verify)
    self.assertEqual(found, {MADE: signature})
    for run, hotkey, error in (
      (b's' * 16, ONE.address, 'another run'),
      (RUN, TWO.address, 'did not sign'),
    ):
      with self.assertRaisesRegex(amendment.AmendmentError, error):
        decode(data, run, hotkey, keys.verify)
    with self.assertRaisesRegex(amendment.AmendmentError, 'canonical'):
      decode(data + b' ', RUN, ONE.address, keys.verify)
    with self.assertRaisesRegex(amendment.AmendmentError, 'at most'):
      decode(bytes(1 << 20), RUN, ONE.address, keys.verify)

  def test_adopted(self):
    adopted = MADE, amendment.make(RUN, 12, {'gauntlet.burn': 0.5})
    data = amendment.encode_adopted(adopted, RUN, ONE.sign)
    decode = amendment.decode_adopted
    self.assertEqual(decode(data, RUN, ONE.address, keys.verify), adopted)
    for run, hotkey in ((b's' * 16, ONE.address), (RUN, TWO.address)):
      with self.assertRaisesRegex(amendment.AmendmentError, 'not signed'):
        decode(data, run, hotkey, keys.verify)


if __name__ == '__main__':
  absltest.main()
