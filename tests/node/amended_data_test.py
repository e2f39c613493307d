"""The data of an amendment: here, elsewhere, or missing."""

import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.config import amend
from covenant.data import corpus
from covenant.data import remote
from covenant.data import shards
from covenant.data import tokenizer
from covenant.node import amended_data
from covenant.node import workdir as workdir_lib
from covenant.protocol import amendments
from covenant.wire import amendment as amendment_lib
from tests import helpers


class AmendedDataTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    old, new = self.write("o'ld", 'abc '), self.write('new', 'xyz ')
    self.new = str(self.folder / 'new')
    self.moved = str(self.folder / 'moved')
    self.digest = new
    phases = [self.phase(0, "o'ld", old)]
    self.config = config_lib.edit(
      helpers.tiny('rounds=20'),
      ['data.source=shards', f'data.phases={json.dumps(phases)}'],
    )
    later = [*phases, self.phase(9, 'new', new)]
    values = amend.parse([f'data.phases={json.dumps(later)}'])
    self.amendment = amendment_lib.make(b'r' * 16, 9, values)

  def write(self, name, text):
    """Writes shards; returns the digest of their manifest."""
    path = str(self.folder / name)
    document = corpus.Document('a', text * 500)
    made = corpus.Corpus((document,), (document,))
    shards.write(path, made, tokenizer.Bytes())
    return shards.read_manifest(path).digest

  def phase(self, start, name, digest):
    path = str(self.folder / name)
    return {'start': start, 'mixture': [{'path': path, 'digest': digest}]}

  def record(self, config):
    return amendments.record(config, (), self.amendment, 5)

  def amended(self, config):
    return amendments.config_at(config, [self.amendment], 9)

  def test_they_are_here(self):
    self.assertEqual(
      amended_data.missing(self.record(self.config), self.config), ''
    )
    data = amended_data.load(self.amended(self.config), self.config)
    self.assertLen(data.train.parts, 2)

  def test_they_are_elsewhere(self):
    pathlib.Path(self.new).rename(self.moved)
    lacking = amended_data.missing(self.record(self.config), self.config)
    self.assertRegex(lacking, f'before round 9, .*{self.digest}.*data.places')
    with self.assertRaisesRegex(config_lib.ConfigError, 'data.places'):
      amended_data.load(self.amended(self.config), self.config)
    place = f'data.places={self.digest}={self.moved}'
    config = config_lib.edit(self.config, [place])
    amended_data.check_places(config)
    self.assertEqual(amended_data.missing(self.record(config), config), '')
    data = amended_data.load(self.amended(config), config)
    self.assertLen(data.train.parts, 2)

  def test_other_data_at_the_path_are_none(self):
    pathlib.Path(self.new).rename(self.moved)
    self.write('new', 'uvw ')
    place = f'data.places={self.digest}={self.new}'
    with self.assertRaisesRegex(config_lib.ConfigError, self.digest):
      amended_data.check_places(config_lib.edit(self.config, [place]))
    self.assertIn(
      self.digest, amended_data.missing(self.record(self.config), self.config)
    )

  def test_a_server_that_the_own_config_does_not_name(self):
    """It is not even contacted: the request would be signed."""
    first = self.config.data.phases[0].mixture[0].digest
    here = [self.phase(0, "o'ld", first)]
    for url, own in (
      ('http://127.0.0.1:1/latest', 'https://data.example/x'),
      ('s3://other/x?endpoint=http://127.0.0.1:1', 's3://own/x'),
      ('r2://stranger/b/x', 'r2://own/b/x'),
    ):
      share = {'path': url, 'digest': 'b' * 64}
      later = [*here, {'start': 9, 'mixture': [share]}]
      values = amend.parse([f'data.phases={json.dumps(later)}'])
      one = amendment_lib.make(b'r' * 16, 9, values)
      config = config_lib.edit(self.config, [f'data.places={"c" * 64}={own}'])
      with mock.patch.object(
        remote, 'RemoteFolder', side_effect=AssertionError('contacted')
      ):
        lacking = amended_data.missing(
          amendments.record(self.config, (), one, 5), config
        )
        self.assertRegex(lacking, 'is not contacted.*data.places')
      amended_data.check_servers(config, [own + '/y', '/a/path'])

  def test_other_amendments_need_none(self):
    one = amendment_lib.make(b'r' * 16, 9, {'rounds': 30})
    record = amendments.record(self.config, (), one, 5)
    self.assertEqual(amended_data.missing(record, self.config), '')

  def test_what_is_missing_is_an_event(self):
    pathlib.Path(self.new).rename(self.moved)
    folder = self.create_tempdir().full_path
    with workdir_lib.Workdir(folder, 'miner', '5F') as workdir:
      amended_data.adopted(workdir, self.config, self.record(self.config))
      lines = pathlib.Path(workdir.path, 'events.jsonl').read_text()
      self.assertIn('before round 9', json.loads(lines)['error'])
      self.assertTrue(pathlib.Path(workdir.path, 'amendments.jsonl').exists())

  @parameterized.parameters('x=/a', '0' * 64, '0' * 64 + '=')
  def test_malformed_places(self, place):
    with self.assertRaisesRegex(config_lib.ConfigError, 'DIGEST=PATH'):
      config_lib.edit(self.config, [f'data.places={place}'])


if __name__ == '__main__':
  absltest.main()
