"""Every parser of strangers' bytes, on many mutations of what is right.

A mutant is refused by the parser's own error, or it is the one encoding of what
was parsed. Anything else is a failure. The long form runs 100,000 mutations per
parser.
"""

import functools
import json
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant import files
from covenant import metrics
from covenant.chain import keys
from covenant.optim import quantize
from covenant.optim import sparseloco as sl
from covenant.pool import messages
from covenant.pool import visitors
from covenant.pool import worker as worker_lib
from covenant.protocol import apply
from covenant.protocol import checksums
from covenant.protocol import published_checkpoint
from covenant.store import location as location_lib
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment
from covenant.wire import commitment
from covenant.wire import manifest
from covenant.wire import payload
from tests import helpers
from tests import mutations

RUN = b'r' * 16
AMENDMENT = amendment.make(
  RUN,
  9,
  {
    'rounds': 40,
    'optim.outer.learning_rate': 0.7,
    'data.phases': [
      {'start': 9, 'mixture': [{'path': 'a', 'weight': 1, 'digest': '0' * 64}]}
    ],
  },
)
SIGNATURE = bytes(64)
HEADER = payload.Header(RUN, 3, 7, b'h' * 16, b'c' * 16, 64)
LIKE = {
  'matrix': jax.ShapeDtypeStruct((40, 30), np.float32),
  'norm': jax.ShapeDtypeStruct((30,), np.float32),
}
COMPRESSIONS = {
  'sign': (sl.TopK(k=4, block=(8, 8), quantizer=sl.Sign()), 'elias-fano'),
  'statistical': (sl.TopK(k=4, block=(8, 8)), 'rice'),
  'sign-magnitude': (
    sl.TopK(k=4, block=(8, 8), quantizer=quantize.SignMagnitude()),
    'elias-fano',
  ),
  'exact': (sl.TopK(k=4, block=(8, 8), quantizer=sl.Exact()), 'rice'),
  'dense': (sl.Dense(), 'elias-fano'),
}


def anybody(*args):
  return True


class PayloadParser:
  """Signed again by a peer that has a key: only the contents are wrong."""

  def __init__(self, name):
    compression, codec = COMPRESSIONS[name]
    self.spec = payload.make_spec(LIKE, compression, codec)
    self.seeds = []
    for seed in range(3):
      rng = np.random.default_rng(seed)
      delta = {
        name: rng.standard_normal(x.shape).astype(np.float32)
        for name, x in LIKE.items()
      }
      message = jax.device_get(sl.compress(delta, None, compression, 0.0)[0])
      self.seeds.append(self.encode(HEADER, message)[:-96])

  def encode(self, header, message):
    return payload.encode(header, message, LIKE, self.spec, lambda _: SIGNATURE)

  def __call__(self, mutant):
    data = mutant + payload._digest(mutant) + SIGNATURE
    expected = HEADER._replace(receipt=b'', sequences=0)
    try:
      header, got = payload.decode(data, expected, LIKE, self.spec, anybody)
    except payload.PayloadError as e:
      assert isinstance(e.reason, payload.Reason)
      return str(e)
    assert self.encode(header, got) == data
    return 'accepted'


class ManifestParser:
  def __init__(self):
    entries = tuple(
      manifest.Entry(uid, keys.Key.from_seed(bytes([uid] * 32)).address,
                     bytes([uid] * 32))
      for uid in (0, 3, 200)
    )  # fmt: skip
    whole = manifest.Manifest(RUN, 3, b'o' * 32, '0f' * 16, 'leader', entries)
    supports = tuple(amendment.Support(x, SIGNATURE) for x in ('one', 'two'))
    adoption = amendment.Adoption(AMENDMENT, supports)
    self.seeds = [
      manifest.encode(x, lambda _: SIGNATURE)[:-64]
      for x in (
        whole,
        whole._replace(entries=()),
        whole._replace(round=0),
        whole._replace(entries=(), adoption=adoption),
      )
    ]

  def __call__(self, mutant):
    try:
      found = manifest.decode(mutant + SIGNATURE, anybody)
    except manifest.ManifestError as e:
      return str(e)
    assert manifest.encode(found, lambda _: SIGNATURE)[:-64] == mutant
    return 'accepted'


class SupportsParser:
  """The amendments that a validator supports."""

  def __init__(self):
    other = amendment.make(RUN, 12, {'protocol': 2, 'release': '1.2'})
    self.seeds = [
      amendment.encode_supports(x)
      for x in ({AMENDMENT: SIGNATURE, other: SIGNATURE}, {})
    ]

  def __call__(self, mutant):
    try:
      found = amendment.decode_supports(mutant, RUN, 'me', anybody)
    except amendment.AmendmentError as e:
      return str(e)
    assert amendment.encode_supports(found) == mutant
    return 'accepted'


class AdoptedParser:
  """The amendments that a validator says that the run has adopted."""

  def __init__(self):
    other = amendment.make(RUN, 12, {'phases.round_blocks': 40})
    self.seeds = [
      amendment.encode_adopted(x, RUN, lambda _: SIGNATURE)[:-64]
      for x in ((AMENDMENT, other), ())
    ]

  def __call__(self, mutant):
    try:
      found = amendment.decode_adopted(mutant + SIGNATURE, RUN, 'me', anybody)
    except amendment.AmendmentError as e:
      return str(e)
    assert amendment.encode_adopted(found, RUN, lambda _: b'') == mutant
    return 'accepted'


class CommitmentParser:
  def __init__(self):
    role = commitment.Role
    self.seeds = [
      commitment.encode(commitment.Commitment(*fields))
      for fields in (
        (role.MINER, b'place', 3, b'd' * 32),
        (role.VALIDATOR, b'', 0, bytes(32)),
        (role.MINER, b'x' * 91),
      )
    ]

  def __call__(self, mutant):
    found = commitment.decode(mutant)
    if found is None:
      return 'none'
    if len(found.location) <= commitment.MAX_LOCATION:
      assert commitment.encode(found) == mutant
    return f'accepted {found.role}'


class LocationParser:
  def __init__(self):
    self.seeds = [
      location_lib.Location.parse(text).to_bytes()
      for text in (
        'file:///a/b',
        'memory://name',
        's3://runs?endpoint=https://s3.example.org&region=eu-1',
        's3://runs?key_id=AKIA&secret=c2VjcmV0',
        f'r2://{"a" * 32}/bucket?key_id={"b" * 32}&secret={"c" * 64}',
      )
    ]

  def __call__(self, mutant):
    try:
      found = location_lib.Location.from_bytes(mutant)
    except ValueError as e:
      return str(e)
    assert found.to_bytes() == mutant
    assert location_lib.Location.parse(str(found)) == found
    return f'accepted {found.kind}'


class IndexParser:
  def __init__(self):
    overrides = ['optim.outer.momentum=0.5']
    config = config_lib.load(f'{helpers.CONFIGS}/tiny.py', overrides)
    shared_model = shared_state_lib.SharedModel(config)
    self.layout = published_checkpoint.layout(shared_model)
    place = apply.Position(0, b'o' * 32, shared_model.init())
    for digest in (b'a' * 32, None):
      place = place.advance(digest, place.shared)
    files_ = {name: ['0f' * 32] for name in self.layout.tensors}
    self.seeds = [
      published_checkpoint.encode(
        published_checkpoint.Index(
          place.round,
          place.root.hex(),
          published_checkpoint.fingerprint_of(files_, adopted),
          files_,
          amendment.list_to_json(adopted),
        )
      )
      for adopted in ((), (AMENDMENT,))
    ]

  def __call__(self, mutant):
    try:
      found = published_checkpoint.decode(
        mutant + SIGNATURE, self.layout, 'me', anybody
      )
    except apply.OutOfSyncError as e:
      return str(e)
    assert published_checkpoint.encode(found) == mutant
    return 'accepted'


class LeaseParser:
  """A lease, as a worker gets it from a pool that may be hostile."""

  def __init__(self):
    tokens = np.arange(24, dtype='<i4').tobytes()
    text = {'round': 1, 'number': 2, 'base': '0f' * 16, 'step': 3, 'steps': 2}
    self.seeds = [json.dumps(text).encode() + b'\n' + tokens]

  def __call__(self, mutant):
    try:
      job = worker_lib.read_lease(*messages.unpack(mutant), context=5)
    except (ValueError, worker_lib.PoolUnreachableError) as e:
      return str(e)
    job.header(RUN)
    assert job.batch * job.steps == len(job.tokens_NxL1)
    return 'accepted'


class LinesParser:
  """JSON lines: whatever comes, the whole lines around it are there."""

  def __init__(self, folder):
    self.path = pathlib.Path(folder, 'lines.jsonl')
    self.seeds = [b'{"round": 1, "x": [1, {"a": null}]}', b'\0\0', b'{"round"']

  def __call__(self, mutant):
    mutant = mutant.replace(b'\n', b' ')
    lines = b'{"round":1}\n' + mutant + b'\n{"round":2}\n'
    with mock.patch.object(pathlib.Path, 'read_bytes', lambda _: lines):
      found = files.read_records(self.path, 'round')
    assert found.objects[0] == {'round': 1}
    assert found.objects[-1] == {'round': 2}
    assert len(found.objects) + found.lost in (2, 3)
    return f'{len(found.objects)}, {found.lost}'


class MetricsParser:
  def __init__(self):
    evaluation = metrics.Evaluation(4, 9, 7, 2.0, 1.5, 2.2, 8, 0.5)
    self.seeds = [metrics.encode(evaluation).encode()]

  def __call__(self, mutant):
    try:
      found = metrics.decode(mutant)
    except metrics.MetricsError as e:
      return str(e)
    assert metrics.decode(metrics.encode(found)) == found
    return 'accepted'


class TokenParser:
  def __init__(self):
    self.tokens = visitors.Tokens()
    self.seeds = [self.tokens.issue('a').encode()]
    self.whole = set(self.seeds)

  def __call__(self, mutant):
    text = mutant.decode('latin-1')
    if self.tokens.accept('a', text, 1):
      assert mutant in self.whole, text
      return 'accepted'
    return 'refused'


class AddressParser:
  def __init__(self):
    self.key = keys.Key.from_seed(bytes(32))
    self.seeds = [self.key.address.encode()]

  def __call__(self, mutant):
    text = mutant.decode('latin-1')
    if not keys.is_address(text):
      return 'none'
    assert keys._address(keys._public(text)) == text
    return 'accepted'


class ChecksumsParser:
  """The file of checksums, on a disk that forgets bits."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    (self.folder / 'data').write_bytes(b'data')
    checksums.write(self.folder)
    self.path = self.folder / 'checksums.json'
    self.seeds = [self.path.read_bytes()]

  def __call__(self, mutant):
    with mock.patch.object(pathlib.Path, 'read_bytes', lambda _: mutant):
      try:
        assert checksums.check(self.folder)
      except checksums.ChecksumError as e:
        return str(e)
    assert json.loads(mutant) == json.loads(self.seeds[0])
    return 'accepted'


def parser(name, folder):
  kinds = {
    'manifest': ManifestParser,
    'commitment': CommitmentParser,
    'supports': SupportsParser,
    'adopted': AdoptedParser,
    'location': LocationParser,
    'index': IndexParser,
    'lease': LeaseParser,
    'lines': functools.partial(LinesParser, folder),
    'metrics': MetricsParser,
    'token': TokenParser,
    'address': AddressParser,
    'checksums': functools.partial(ChecksumsParser, folder),
  }
  if name.startswith('payload '):
    return PayloadParser(name.partition(' ')[2])
  return kinds[name]()


NAMES = (
  *(f'payload {name}' for name in COMPRESSIONS),
  'manifest', 'supports', 'adopted', 'commitment', 'location', 'index', 'lease',
  'lines', 'metrics',
  'token', 'address', 'checksums',
)  # fmt: skip


class ParsersTest(parameterized.TestCase):
  def run_parser(self, name, count, seed):
    parse = parser(name, self.create_tempdir().full_path)
    outcomes = mutations.parse_many(parse, count, seed)
    self.assertEqual(sum(outcomes.values()), count)
    return outcomes

  @parameterized.parameters(*NAMES)
  @pytest.mark.rows(1)
  def test_some(self, name):
    self.run_parser(name, 4_000, seed=1)

  @parameterized.parameters(*NAMES)
  @pytest.mark.thorough
  def test_a_hundred_thousand(self, name):
    print(name, self.run_parser(name, 100_000, seed=2))


if __name__ == '__main__':
  absltest.main()
