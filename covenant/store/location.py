"""The location of a bucket and how others read it, as text and chain bytes.

A location is public: it goes on the chain. Its read-only credentials are
public by design; credentials to write are never part of it.
"""

import base64
import binascii
import dataclasses
import re
import urllib.parse

MAX_BYTES = 84  # of a 128-byte commitment; the rest is the caller's
_MAX_TEXT = 1024
# Kind and variant (jurisdiction or style); the index is the first byte.
_HEADS = (
  ('memory', ''),
  ('file', ''),
  ('s3', ''),
  ('r2', ''),
  ('r2', 'eu'),
  ('r2', 'fedramp'),
  ('s3', 'virtual'),
)
_QUERY = {
  'memory': (),
  'file': (),
  's3': ('endpoint', 'region', 'style', 'key_id', 'secret'),
  'r2': ('jurisdiction', 'key_id', 'secret'),
}
# The endings of Amazon's hosts in the regions of its other partitions.
_PARTITIONS = {'cn-': 'amazonaws.com.cn', 'eusc-': 'amazonaws.eu'}
_R2_HOST = re.compile(
  r'https://(\w{32})(?:\.(eu|fedramp))?\.r2\.cloudflarestorage\.com'
)
# Field -> its pattern, and the pattern in words.
_BUCKET = (
  r'[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]',
  '3 to 63 of a-z, 0-9, "." and "-"',
)
_ENDPOINT = (
  r'(https?://[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(:\d{1,5})?)?',
  'https://HOST or https://HOST:PORT',
)
_REGION = (r'(?!xn--)[a-z0-9-]{0,32}', '32 of a-z, 0-9 and "-" at most')
_STYLE = (r'(virtual)?', '"virtual" or none')
_JURISDICTION = (r'(eu|fedramp)?', '"eu", "fedramp" or none')
_HEX32 = (r'[0-9a-f]{32}', '32 hex digits')
_HEX64 = (r'[0-9a-f]{64}', '64 hex digits')
_KEY = (r'[A-Za-z0-9+/=_.-]{1,128}', '1 to 128 of A-Z, a-z, 0-9 and "+/=_.-"')
_NAME = (r'[A-Za-z0-9._-]{1,64}', '1 to 64 of A-Z, a-z, 0-9 and "._-"')
_PATH = (r'/[^\0]*', 'an absolute path')
_NONE = ('', 'none')
_ASCII, _HEX, _BASE64 = range(3)  # how a field is packed


@dataclasses.dataclass(frozen=True)
class Location:
  """The location of a bucket. Fields that its kind lacks are empty.

  >>> Location.parse('s3://runs?endpoint=https://s3.example.org')
  Location(kind='s3', bucket='runs', endpoint='https://s3.example.org')

  Raises:
    ValueError: names the field. Values are not repeated: they may be secret.
  """

  kind: str  # 'memory', 'file', 's3' or 'r2'
  bucket: str  # its name; of 'file' the absolute path of the folder
  account: str = ''  # r2: 32 hex digits
  endpoint: str = ''  # s3: 'https://host[:port]'; empty is Amazon's
  region: str = ''  # s3; empty is us-east-1
  key_id: str = dataclasses.field(default='', repr=False)  # to read
  secret: str = dataclasses.field(default='', repr=False)  # to read
  # s3: 'virtual' for https://BUCKET.HOST/KEY; empty: https://HOST/BUCKET/KEY
  style: str = ''
  jurisdiction: str = ''  # r2: 'eu' or 'fedramp'; empty: none

  def __post_init__(self):
    match self.kind:
      case 'memory':
        _check(self, bucket=_NAME)
      case 'file':
        _check(self, bucket=_PATH)
        if not self.bucket.isprintable() or '..' in self.bucket.split('/'):
          raise ValueError('path: expected printable characters and no ".."')
      case 's3':
        keys = {'key_id': _KEY, 'secret': _KEY}
        _check(
          self,
          bucket=_BUCKET,
          endpoint=_ENDPOINT,
          region=_REGION,
          style=_STYLE,
          **(keys if self.key_id or self.secret else {}),
        )
        if self.style and '.' in self.bucket:
          raise ValueError(
            's3, bucket: expected none of "." with style=virtual: no '
            'certificate covers it'
          )
      case 'r2':  # which has no anonymous reading over S3
        _check(
          self,
          bucket=_BUCKET,
          account=_HEX32,
          key_id=_HEX32,
          secret=_HEX64,
          jurisdiction=_JURISDICTION,
        )
      case _:
        raise ValueError(f'kind: expected one of {", ".join(_QUERY)}')

  def __repr__(self) -> str:
    shown = [f for f in dataclasses.fields(self) if f.repr]
    values = [(f.name, getattr(self, f.name)) for f in shown]
    return f'Location({", ".join(f"{k}={v!r}" for k, v in values if v)})'

  @property
  def name(self) -> str:
    """The name of the bucket for people, without any credentials."""
    if self.kind == 'r2':
      return f'r2://{self.account}/{self.bucket}'
    at = f' at {self.endpoint}' if self.endpoint else ''
    return f'{self.kind}://{self.bucket}{at}'

  @property
  def url(self) -> str:
    """The server of an s3 or r2, without the bucket."""
    if self.kind == 'r2':
      within = f'{self.jurisdiction}.' if self.jurisdiction else ''
      return f'https://{self.account}.{within}r2.cloudflarestorage.com'
    region, domain = self.region or 'us-east-1', 'amazonaws.com'
    for prefix, other in _PARTITIONS.items():
      domain = other if region.startswith(prefix) else domain
    return self.endpoint or f'https://s3.{region}.{domain}'

  def __str__(self) -> str:
    """Returns the public text, with read-only credentials; see `parse`."""
    query = {k: getattr(self, k) for k in _QUERY[self.kind] if getattr(self, k)}
    path = urllib.parse.quote(self.bucket)
    path = f'{self.account}/{path}' if self.kind == 'r2' else path
    tail = f'?{urllib.parse.urlencode(query, safe=":/")}' if query else ''
    return f'{self.kind}://{path}{tail}'

  @classmethod
  def parse(cls, text: str) -> 'Location':
    """Parses the text of a location, in one of these forms.

        file:///absolute/folder
        memory://NAME
        s3://BUCKET?endpoint=https://HOST&region=R&key_id=K&secret=S
        s3://BUCKET?endpoint=https://HOST&style=virtual
        r2://ACCOUNT/BUCKET?key_id=K&secret=S
        r2://ACCOUNT/BUCKET?jurisdiction=eu&key_id=K&secret=S

    The part after the question mark of s3 is optional; the default is Amazon's
    us-east-1, read anonymously, with the bucket in the path. R2 has no
    anonymous reading; an s3 whose endpoint is a server of R2 is an r2.

    Raises:
      ValueError: the text is malformed; names the field and repeats no value.
    """
    if len(text) > _MAX_TEXT or not text.isprintable():
      raise ValueError(
        f'location: expected printable text of {_MAX_TEXT} characters at most'
      )
    kind, separator, rest = text.partition('://')
    if not separator or kind not in _QUERY:
      raise ValueError(f'location: expected one of {", ".join(_QUERY)} + "://"')
    path, mark, query = rest.partition('?')
    pairs = urllib.parse.parse_qsl(query, True, True) if mark else []
    fields = dict(pairs)
    if len(fields) < len(pairs) or not fields.keys() <= set(_QUERY[kind]):
      allowed = ', '.join(_QUERY[kind]) or 'nothing'
      raise ValueError(f'{kind}: expected {allowed} after "?", each once')
    if kind == 'r2':
      fields['account'], _, path = path.partition('/')
    if server := _R2_HOST.fullmatch(fields.get('endpoint', '')):
      kind, fields['account'] = 'r2', server[1]
      fields['jurisdiction'] = server[2] or ''
      for name in 'endpoint', 'style':
        fields.pop(name, None)
      if fields.get('region') in ('auto', 'us-east-1'):  # its names of one
        del fields['region']
    return cls(kind, urllib.parse.unquote(path), **fields)

  def to_bytes(self) -> bytes:
    """Encodes the location for the chain: at most MAX_BYTES bytes.

    R2 takes 65 bytes and the bucket's name.

    Raises:
      ValueError: it does not fit; take a shorter name or path.
    """
    if self.kind == 'r2':
      packed = bytes.fromhex(self.account + self.key_id + self.secret)
      packed += self.bucket.encode()
    elif self.kind == 's3':
      host = self.endpoint.removeprefix('https://')
      packed = b''.join(
        _pack(field)
        for field in (self.bucket, host, self.region, self.key_id, self.secret)
      )
    else:
      packed = self.bucket.encode()
    head = self.kind, self.jurisdiction or self.style
    data = bytes([_HEADS.index(head)]) + packed
    if len(data) > MAX_BYTES:
      raise ValueError(
        f'{self.name} takes {len(data)} bytes on the chain, which has room '
        f'for {MAX_BYTES}: take a shorter bucket name or path'
      )
    return data

  @classmethod
  def from_bytes(cls, data: bytes) -> 'Location':
    """Decodes the location whose `to_bytes` is exactly `data`.

    Raises:
      ValueError: there is no such location.
    """
    if not 2 <= len(data) <= MAX_BYTES or data[0] >= len(_HEADS):
      raise ValueError(
        f'location: expected 2 to {MAX_BYTES} bytes of a known kind'
      )
    (kind, variant), rest = _HEADS[data[0]], bytes(data[1:])
    try:
      if kind == 'r2':
        hexes = rest[:16].hex(), rest[16:32].hex(), rest[32:64].hex()
        account, key_id, secret = hexes
        bucket = rest[64:].decode('ascii')
        found = cls(
          kind,
          bucket,
          account,
          key_id=key_id,
          secret=secret,
          jurisdiction=variant,
        )
      elif kind == 's3':
        fields = []
        for _ in range(5):
          field, rest = _unpack(rest)
          fields.append(field)
        bucket, host, region, key_id, secret = fields
        if host and not host.startswith('http://'):
          host = f'https://{host}'
        found = cls(
          kind, bucket, '', host, region, key_id, secret, style=variant
        )
      else:
        found = cls(kind, rest.decode())
      if found.to_bytes() == data:  # one location, one encoding
        return found
    except (ValueError, IndexError):  # UnicodeDecodeError is a ValueError
      pass
    raise ValueError('location: malformed bytes')


def _check(location: Location, **forms: tuple[str, str]) -> None:
  """Checks that each field has its form; fields without one are empty."""
  for field in dataclasses.fields(location):
    value = getattr(location, field.name)
    pattern, words = forms.get(field.name, _NONE)
    if field.name != 'kind' and not re.fullmatch(pattern, value):
      raise ValueError(
        f'{location.kind}, {field.name}: expected {words}, got '
        f'{len(value)} characters that are not that'
      )


def _pack(text: str) -> bytes:
  """Encodes a text: a header byte (form, length), then its shortest form."""
  forms = [(len(text), _ASCII, text.encode())]
  if re.fullmatch(r'([0-9a-f]{2})+', text):
    forms.append((len(text) // 2, _HEX, bytes.fromhex(text)))
  if re.fullmatch(r'([A-Za-z0-9+/]{4})+', text):
    forms.append((len(text) // 4 * 3, _BASE64, base64.b64decode(text)))
  length, form, packed = min(forms)
  if length >= 64:
    raise ValueError(f'a field takes {length} bytes on the chain, 63 at most')
  return bytes([form << 6 | length]) + packed


def _unpack(data: bytes) -> tuple[str, bytes]:
  """Returns the first packed field, and the bytes after it."""
  form, end = data[0] >> 6, 1 + (data[0] & 63)
  packed, rest = data[1:end], data[end:]
  match form:
    case 0:
      return packed.decode('ascii'), rest
    case 1:
      return packed.hex(), rest
    case 2:
      return binascii.b2a_base64(packed, newline=False).decode(), rest
  raise ValueError('location: unknown form of a field')
