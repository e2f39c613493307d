import hashlib
import json

import hypothesis
import hypothesis.strategies as st
from absl.testing import absltest
from absl.testing import parameterized

from covenant.chain import keys
from covenant.wire import manifest as manifest_lib

KEY = keys.Key.from_seed(b'v' * 32)
OTHER = keys.Key.from_seed(b'w' * 32)
MANIFEST = manifest_lib.Manifest(
  run=b'r' * 16,
  round=7,
  root=b'h' * 32,
  fingerprint='0f' * 16,
  hotkey=KEY.address,
  entries=tuple(
    manifest_lib.Entry(uid, OTHER.address, bytes([uid]) * 32)
    for uid in (0, 3, 12)
  ),
)
DATA = manifest_lib.encode(MANIFEST, KEY.sign)
BODY = DATA[:-64]


def decode(data):
  return manifest_lib.decode(data, keys.verify)


def signed(body):
  """Any body, signed as its maker would: a hostile validator can."""
  return body + KEY.sign(manifest_lib._hash(b'body', body))


def edited(**changes):
  return json.dumps(json.loads(BODY) | changes, separators=(',', ':')).encode()


@st.composite
def manifests(draw):
  uids = sorted(draw(st.sets(st.integers(0, 2**63 - 1), max_size=20)))
  digest = st.binary(min_size=32, max_size=32)
  return manifest_lib.Manifest(
    draw(st.binary(min_size=16, max_size=16)),
    draw(st.integers(0, 2**63 - 1)),
    draw(digest),
    draw(st.text(max_size=200)),
    KEY.address,
    tuple(
      manifest_lib.Entry(uid, draw(st.text(max_size=200)), draw(digest))
      for uid in uids
    ),
  )


class ManifestTest(parameterized.TestCase):
  @hypothesis.given(manifests())
  @hypothesis.settings(deadline=None)
  def test_round_trip(self, manifest):
    data = manifest_lib.encode(manifest, KEY.sign)
    self.assertEqual(decode(data), manifest)
    self.assertEqual(manifest_lib.encode(decode(data), KEY.sign), data)

  def test_can_be_read_by_people(self):
    self.assertEqual(json.loads(BODY)['entries'][1][0], 3)

  def test_an_empty_one_is_one(self):
    empty = MANIFEST._replace(entries=())
    self.assertEqual(decode(manifest_lib.encode(empty, KEY.sign)), empty)

  def test_no_byte_can_be_changed(self):
    for at in range(len(DATA)):
      mutant = bytearray(DATA)
      mutant[at] ^= 1 << at % 8
      with self.assertRaises(manifest_lib.ManifestError, msg=f'byte {at}'):
        decode(bytes(mutant))

  @hypothesis.given(st.data())
  @hypothesis.settings(max_examples=300)
  def test_a_signed_mutant_is_refused_or_means_what_it_says(self, data):
    """Its maker may be the liar: then the form alone decides."""
    body = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 3))):
      at = data.draw(st.integers(0, len(body) - 1))
      body[at : at + data.draw(st.integers(0, 2))] = data.draw(
        st.binary(max_size=2) | st.sampled_from([b'0', b'-', b'"', b' ', b'A'])
      )
    mutant = signed(bytes(body))
    try:
      got = decode(mutant)
    except manifest_lib.ManifestError:
      return
    self.assertEqual(manifest_lib.encode(got, KEY.sign), mutant)

  @hypothesis.given(st.binary(max_size=300))
  @hypothesis.settings(deadline=None)
  def test_noise_is_refused(self, noise):
    for data in (noise, signed(noise)):
      with self.assertRaises(manifest_lib.ManifestError):
        decode(data)

  @parameterized.parameters(
    ('uids', [[3, 'a', '00' * 32], [0, 'b', '00' * 32]]),
    ('uids', [[3, 'a', '00' * 32], [3, 'b', '00' * 32]]),
    ('integer', [[-1, 'a', '00' * 32]]),
    ('integer', [[True, 'a', '00' * 32]]),
    ('integer', [[1.0, 'a', '00' * 32]]),
    ('integer', [['1', 'a', '00' * 32]]),
    ('integer', [[2**63, 'a', '00' * 32]]),
    ('text', [[1, None, '00' * 32]]),
    ('unpack', [[1, 'a', '00' * 32, 0]]),
    ('unpack', [[1, 'a']]),
    ('canonical', [[1, 'a', 'AB' * 32]]),
    ('canonical', [[1, 'a', '00 ' * 32]]),
    ('TypeError', [[1, 'a', 7]]),
    ('32 bytes', [[1, 'a', '00' * 31]]),
    ('32 bytes', [[1, 'a', '']]),
    ('TypeError', None),
    ('unpack', 'text'),
  )
  def test_entries_that_are_none(self, message, entries):
    with self.assertRaisesRegex(manifest_lib.ManifestError, message):
      decode(signed(edited(entries=entries)))

  @parameterized.parameters(
    ('canonical', edited(extra=1)),
    ('canonical', BODY.replace(b',', b', ')),
    ('canonical', b' ' + BODY),
    ('canonical', BODY.replace(b'"round":7', b'"round":7,"round":7')),
    ('canonical', BODY.replace(b'"round":7', b'"round":3,"round":7')),
    ('canonical', json.dumps(json.loads(BODY), sort_keys=True).encode()),
    ('canonical', BODY.decode().encode('utf-16')),
    ('KeyError', BODY.replace(b'"root"', b'"roots"')),
    ('integer', edited(round=-7)),
    ('integer', edited(round='7')),
    ('integer', BODY.replace(b'"round":7', b'"round":NaN')),
    ('ValueError', BODY.replace(b'"round":7', b'"round":' + b'7' * 5000)),
    ('16 bytes', edited(run='00' * 15)),
    ('32 bytes', edited(root='00' * 33)),
    ('text', edited(fingerprint=7)),
    ('text', edited(hotkey=None)),
    ('TypeError', b'[]'),
    ('TypeError', b'7'),
    ('JSONDecodeError', BODY + b'{}'),
    ('RecursionError', b'[' * 100_000),
    ('UnicodeDecodeError', b'"\xff"'),
  )  # fmt: skip
  def test_bodies_that_are_none(self, message, body):
    with self.assertRaisesRegex(manifest_lib.ManifestError, message):
      decode(signed(body))

  @parameterized.parameters('', 'x', '\ud800', '\0', KEY.address + ' ')
  def test_a_hotkey_that_is_none_has_signed_nothing(self, hotkey):
    with self.assertRaisesRegex(
      manifest_lib.ManifestError, 'did not sign|Unicode'
    ):
      decode(signed(edited(hotkey=hotkey)))

  @parameterized.parameters(
    dict(fingerprint='f' * 900_000), dict(hotkey='h' * 900_000),
    dict(round='7' * 900_000), dict(fingerprint=['f' * 900_000]),
  )  # fmt: skip
  def test_an_error_repeats_little(self, **fields):
    with self.assertRaises(manifest_lib.ManifestError) as caught:
      decode(signed(edited(**fields)))
    self.assertLess(len(str(caught.exception)), 300)

  def test_only_the_named_hotkey_can_sign(self):
    with self.assertRaisesRegex(manifest_lib.ManifestError, 'did not sign'):
      decode(manifest_lib.encode(MANIFEST, OTHER.sign))
    with self.assertRaisesRegex(manifest_lib.ManifestError, 'did not sign'):
      decode(BODY + KEY.sign(BODY))  # as signed for another purpose

  def test_too_long_is_refused_unread(self):
    def verify(*_):
      raise AssertionError('looked at')

    with self.assertRaisesRegex(manifest_lib.ManifestError, 'bytes'):
      manifest_lib.decode(bytes(manifest_lib.MAX_BYTES + 1), verify)


class HistoryTest(absltest.TestCase):
  def test_every_step_is_in_the_root(self):
    digest = hashlib.blake2b(DATA, digest_size=32).digest()
    start = manifest_lib.genesis(b'r' * 16)
    roots = [
      start,
      manifest_lib.genesis(b's' * 16),
      manifest_lib.extend(start, 0, digest),
      manifest_lib.extend(start, 1, digest),
      manifest_lib.extend(start, 0, bytes(32)),
      manifest_lib.extend(start, 0, None),
      manifest_lib.extend(start, 1, None),
      manifest_lib.extend(digest, 0, digest),
    ]
    self.assertLen(set(roots), len(roots))
    self.assertEqual({len(root) for root in roots}, {32})

  def test_a_known_history(self):
    """Roots are on chains and in checkpoints: they must never change."""
    root = manifest_lib.genesis(bytes(16))
    root = manifest_lib.extend(root, 0, bytes(32))
    root = manifest_lib.extend(root, 1, None)
    known = 'f7ef936b6ea2982d279b64ebb2bd770c9ef90304692d12e88206d06aa04ce9b4'
    self.assertEqual(root.hex(), known)


if __name__ == '__main__':
  absltest.main()
