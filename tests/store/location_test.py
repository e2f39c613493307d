"""Locations as text and as chain bytes, from hostile strangers too."""

import hypothesis
from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import strategies as st

from covenant.store import location as location_lib

_R2 = f'r2://{"0a" * 16}/my-bucket-of-19-chs?key_id={"1b" * 16}'
_R2 += f'&secret={"2c" * 32}'
_TEXTS = (
  'memory://miner-3.a_b',
  'file:///tmp/a%20b/run',
  's3://runs',
  's3://runs?region=eu-west-1',
  's3://runs?endpoint=http://127.0.0.1:5000',
  's3://runs?endpoint=https://s3.example.org:9000&region=auto',
  's3://runs?key_id=AKIAIOSFODNN7EXAMPLE'
  '&secret=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY',
  _R2,
  _R2.replace('?', '?jurisdiction=eu&'),
  _R2.replace('?', '?jurisdiction=fedramp&'),
  's3://runs?endpoint=https://s3.example.org&style=virtual',
)
_KEYS = st.text('0123456789abcdefXYZ+/=_.-', min_size=1, max_size=20)


class LocationTest(parameterized.TestCase):
  @parameterized.parameters(*_TEXTS)
  def test_there_and_back(self, text):
    location = location_lib.Location.parse(text)
    self.assertEqual(str(location), text)
    data = location.to_bytes()
    self.assertLessEqual(len(data), location_lib.MAX_BYTES)
    self.assertEqual(location_lib.Location.from_bytes(data), location)

  def test_sizes_on_chain(self):
    sizes = [
      len(location_lib.Location.parse(text).to_bytes()) for text in _TEXTS
    ]
    self.assertEqual(sizes, [12, 13, 9, 18, 30, 31, 54, 84, 84, 84, 23])

  @hypothesis.given(
    bucket=st.from_regex(r'[a-z0-9][a-z0-9.-]{1,10}[a-z0-9]', fullmatch=True),
    keys=st.none() | st.tuples(_KEYS, _KEYS),
    host=st.sampled_from(['', 'http://a:1', 'https://a.org', 'https://0a']),
    region=st.sampled_from(['', 'auto', 'abcd', '0a1b']),
    style=st.sampled_from(['', 'virtual']),
  )
  def test_any_s3_there_and_back(self, bucket, keys, host, region, style):
    key_id, secret = keys or ('', '')
    style = '' if '.' in bucket else style
    location = location_lib.Location(
      's3', bucket, '', host, region, key_id, secret, style
    )
    parsed = location_lib.Location.parse(str(location))
    self.assertEqual(parsed, location)
    decoded = location_lib.Location.from_bytes(location.to_bytes())
    self.assertEqual(decoded, location)

  @hypothesis.given(
    st.binary(max_size=90)
    | st.builds(lambda k, d: bytes([k]) + d, st.integers(0, 7), st.binary())
  )
  def test_any_bytes_are_a_location_or_refused(self, data):
    try:
      location = location_lib.Location.from_bytes(data)
    except ValueError:
      return
    self.assertEqual(location.to_bytes(), data)
    self.assertEqual(location_lib.Location.parse(str(location)), location)
    self.assertTrue(str(location).isprintable())

  @hypothesis.given(st.sampled_from(_TEXTS), st.data())
  def test_damaged_bytes_are_no_other_encoding(self, text, data):
    good = location_lib.Location.parse(text).to_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    for some in (bytes(bad), good[:at], good + b'\0'):
      try:
        location = location_lib.Location.from_bytes(some)
      except ValueError:
        continue
      self.assertEqual(location.to_bytes(), some)

  @parameterized.parameters(
    b'',
    b'\0',
    b'\1relative',
    b'\1/a\n',
    b'\1/a/../b',
    b'\1/\xff',
    b'\1/\xe2\x80\xae',  # turns the direction of writing
    b'\0a/b',
    b'\4abc',
    b'\7abc',
    b'\6\4a.bc\0\0\0\0',  # a dot with style=virtual
    b'\4' + bytes(64) + b'AB',
    b'\2\4runs\0\0\0',  # a field is missing
    b'\2\4runs\0\0\0\0\0',  # one too many
    b'\2\xc4runs\0\0\0\0',  # a form that there is not
    b'\2\4runs\7a\nb.org\0\0\0',
    b'\2\4runs\6a@b.de\0\0\0',
    b'\2\4runs\0\0\1k\0',  # half of the credentials
    b'\2\x08deadbeef\0\0\0\0',  # hex in a longer form
    b'\3' + bytes(64) + b'AB',
    b'\3' + bytes(64) + b'bucket-of-20-chars-x',
    b'\3' + bytes(63),
  )
  def test_refuses_bytes(self, data):
    with self.assertRaises(ValueError):
      location_lib.Location.from_bytes(data)

  @parameterized.parameters(
    'runs',
    'http://runs',
    'file://host/a',
    'file:///a/../b',
    'file:///a%00',
    'file:///a%0a',
    'file:///a?x=1',
    'memory://',
    'memory://a/b',
    's3://Runs',
    's3://ab',
    's3://runs/folder',
    's3://runs?endpoint=ftp://a',
    's3://runs?endpoint=https://a/path',
    's3://runs?endpoint=https://user:pw@a',
    's3://runs?endpoint=https://a%0d%0aHost:b',
    's3://runs?region=a_b',
    's3://runs?style=path',
    's3://ru.ns?style=virtual',
    's3://runs?jurisdiction=eu',
    's3://runs?region=xn--',
    's3://runs?key_id=a',
    's3://runs?key_id=a&key_id=b&secret=c',
    's3://runs?write_secret=abc',
    's3://runs?account=' + 'a' * 32,
    's3://runs?region',
    's3://runs#x',
    f'r2://{"0a" * 16}/runs',
    f'r2://{"0A" * 16}/runs?key_id={"1b" * 16}&secret={"2c" * 32}',
    f'r2://runs?key_id={"1b" * 16}&secret={"2c" * 32}',
    _R2.replace('?', '?jurisdiction=us&'),
    _R2.replace('?', '?style=virtual&'),
    f's3://runs?endpoint=https://{"0a" * 16}.eu.r2.cloudflarestorage.com',
    's3://runs?region=' + 'a' * 2000,
    's3://runs\n',
  )
  def test_refuses_text(self, text):
    with self.assertRaises(ValueError):
      location_lib.Location.parse(text)

  @parameterized.parameters('', 'eu', 'fedramp')
  def test_the_s3_of_r2_is_an_r2(self, jurisdiction):
    within = f'.{jurisdiction}' if jurisdiction else ''
    server = f'https://{"0a" * 16}{within}.r2.cloudflarestorage.com'
    for region in '', '&region=auto', '&region=us-east-1':
      location = location_lib.Location.parse(
        f's3://my-bucket-of-19-chs?endpoint={server}{region}'
        f'&key_id={"1b" * 16}&secret={"2c" * 32}'
      )
      self.assertEqual(location.kind, 'r2')
      self.assertEqual(location.jurisdiction, jurisdiction)
      self.assertEqual(location.url, server)
      self.assertLen(location.to_bytes(), location_lib.MAX_BYTES)

  def test_what_is_too_long_for_the_chain_says_so(self):
    for location in (
      location_lib.Location('file', '/' + 'a' * 83),
      location_lib.Location.parse(_R2.replace('chs?', 'chars?')),
    ):
      with self.assertRaisesRegex(ValueError, 'takes 8[56] bytes'):
        location.to_bytes()

  @parameterized.parameters(*_TEXTS[-5:-1])
  def test_credentials_are_shown_only_where_they_belong(self, text):
    location = location_lib.Location.parse(text)
    with self.assertRaises(ValueError) as e:
      location_lib.Location.parse(f'{text}\x7f&secret={location.secret}!')
    with self.assertRaises(ValueError) as f:
      location_lib.Location.parse(text.replace('secret=', 'secret=!'))
    for shown in (repr(location), location.name, *map(str, (e, f))):
      self.assertNotIn(location.key_id, shown)
      self.assertNotIn(location.secret, shown)
    self.assertNotIn(location.secret, str(e.exception) + str(f.exception))


if __name__ == '__main__':
  absltest.main()
